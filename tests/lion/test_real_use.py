"""What training for real use adds: parts of a batch, averages, precision, weights, reports."""

from __future__ import annotations

import csv
import json
import math
import resource
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from lion_models.backbones import FrozenBackbone
from lion_models.base.errors import UserError
from lion_models.base.files import replacing, write_json
from lion_models.data import Task, open_source
from lion_models.methods.base import TunedClassifier, trained_state
from lion_models.run import FitState, Run, RunConfig, build_model
from lion_models.run.averaging import Average
from lion_models.run.features import FeatureCache, Inputs, freeze_images
from lion_models.run.loss import TrainingLoss
from lion_models.run.report import class_report
from lion_models.run.seeding import seed_all
from lion_models.run.trainer import score
from lion_models.run.workbench import Workbench
from tests.support.command import CLASSES, Lion
from tests.support.small import fit_run


@pytest.fixture
def config(image_folder: Path, backbone_file: Path) -> RunConfig:
    return RunConfig.of(
        data=str(image_folder),
        backbone=str(backbone_file),
        shots=4,
        validation_shots=3,
        epochs=3,
        batch=7,
        hidden=4,
        lr=0.02,
    )


def fitted(
    config: RunConfig, frozen: FrozenBackbone, task: Task
) -> tuple[TunedClassifier, FitState]:
    seed_all(config.training.seed)
    model = build_model(config, frozen, len(task.classes))
    return model, fit_run(model, task, config)


@pytest.mark.parametrize("weights", ["none", "balanced", "balanced-softmax"])
@pytest.mark.parametrize("accumulate", [2, 3, 20])
def test_parts_of_a_batch_give_the_step_of_the_whole(
    accumulate: int, weights: str, config: RunConfig, frozen: FrozenBackbone, task: Task
):
    config = config.but(augment="affine", class_weights=weights)
    _, whole = fitted(config, frozen, task)
    _, parts = fitted(config.but(accumulate=accumulate), frozen, task)
    for name, value in whole.weights.items():
        torch.testing.assert_close(parts.weights[name], value, rtol=1e-4, atol=1e-5)
    for first, second in zip(whole.history, parts.history, strict=True):
        assert second["loss"] == pytest.approx(first["loss"], rel=1e-4)


def test_average_follows_its_formula(frozen: FrozenBackbone, config: RunConfig):
    model = build_model(config.but(method="linear"), frozen, 3)
    average = Average(0.5)
    values = [0.0, 1.0, 3.0, 3.0]
    expected = 0.0
    for step, value in enumerate(values):
        with torch.no_grad():
            model.head.bias.fill_(value)
        average.update(model, step)
        decay = min(0.5, (1 + step) / (10 + step))
        expected = value if step == 0 else decay * expected + (1 - decay) * value
        assert average.weights["head.bias"].tolist() == pytest.approx([expected] * 3)
    with average.applied(model):
        assert model.head.bias.tolist() == pytest.approx([expected] * 3)
    assert model.head.bias.tolist() == [3.0] * 3


def test_average_is_what_is_validated_and_kept(
    config: RunConfig, frozen: FrozenBackbone, task: Task
):
    model, state = fitted(config.but(ema=0.99, epochs=4), frozen, task)
    assert any(not torch.equal(state.weights[name], state.average[name]) for name in state.weights)
    assert all(torch.equal(state.best[name], value) for name, value in trained_state(model).items())
    sums = score(model, freeze_images(model, task.validation_images), task.validation_labels)
    row = state.history[state.best_epoch - 1]
    assert sums["accuracy"] / len(task.validation_labels) == row["validation_accuracy"]
    assert sums["loss"] / len(task.validation_labels) == pytest.approx(row["validation_loss"])
    _, plain = fitted(config.but(epochs=4), frozen, task)
    for name, value in plain.weights.items():  # the average changes nothing about the steps
        assert torch.equal(state.weights[name], value)


def test_training_stops_when_validation_has_not_improved(
    config: RunConfig, frozen: FrozenBackbone, task: Task
):
    _, state = fitted(config.but(lr=1e-7, epochs=60, patience=3), frozen, task)
    assert len(state.history) == state.best_epoch + 3 < 60


def test_bf16_trains_float32_weights_near_those_of_float32(
    config: RunConfig, frozen: FrozenBackbone, task: Task
):
    config = config.but(method="lion", lr=0.003)
    _, full = fitted(config, frozen, task)
    _, half = fitted(config.but(amp="bf16"), frozen, task)
    assert all(value.dtype == torch.float32 for value in half.weights.values())
    assert any(not torch.equal(half.weights[name], full.weights[name]) for name in full.weights)
    assert half.history[-1]["loss"] == pytest.approx(full.history[-1]["loss"], rel=0.05)


def test_fp16_without_a_gpu_is_refused(config: RunConfig, frozen: FrozenBackbone, task: Task):
    with pytest.raises(UserError, match="`amp` fp16: needs `device` cuda, got cpu; use `amp` bf16"):
        fitted(config.but(amp="fp16"), frozen, task)


def test_class_weights_follow_their_formulas():
    labels = torch.tensor([0] * 6 + [1] * 3 + [2])
    logits = torch.randn(10, 3)
    balanced = TrainingLoss("balanced", labels, 3)
    weight = torch.tensor([10 / 18, 10 / 9, 10 / 3])
    expected = F.cross_entropy(logits, labels, weight=weight)
    mean = balanced.sum(logits, labels) / balanced.denominator(labels)
    torch.testing.assert_close(mean, expected)
    softmax = TrainingLoss("balanced-softmax", labels, 3)
    counts = torch.tensor([6.0, 3.0, 1.0])
    shares = counts * logits.exp() / (counts * logits.exp()).sum(1, keepdim=True)
    torch.testing.assert_close(
        softmax.sum(logits, labels), -shares[torch.arange(10), labels].log().sum()
    )
    plain = TrainingLoss("none", labels, 3)
    torch.testing.assert_close(
        plain.sum(logits, labels) / plain.denominator(labels), F.cross_entropy(logits, labels)
    )


def test_class_weights_lift_the_rare_class(frozen: FrozenBackbone, config: RunConfig):
    # Pure noise: the best guess is the class frequency, and balanced losses undo it.
    images = torch.randint(0, 255, (44, 1, 12, 12), dtype=torch.uint8)
    labels = torch.tensor([0] * 40 + [1] * 4)
    task = Task(("many", "few"), images, labels, images, labels)
    chances = {}
    for kind in ("none", "balanced", "balanced-softmax"):
        model, _ = fitted(
            config.but(method="linear", class_weights=kind, lr=0.01, epochs=20), frozen, task
        )
        with torch.no_grad():
            chances[kind] = model(images.float() / 255).softmax(1)[:, 1].mean().item()
    assert chances["none"] < 0.3
    assert chances["balanced"] > chances["none"] + 0.15
    assert chances["balanced-softmax"] > chances["none"] + 0.15


def test_features_are_shared_by_runs_with_the_same_frozen_part_alone(
    config: RunConfig, frozen: FrozenBackbone, task: Task, monkeypatch: pytest.MonkeyPatch
):
    features = FeatureCache()
    images, labels = task.train_images, task.train_labels
    computed = []

    def freeze(model: TunedClassifier, some: torch.Tensor) -> torch.Tensor:
        computed.append(len(some))
        return freeze_images(model, some)

    monkeypatch.setattr("lion_models.run.features.freeze_images", freeze)
    for options in ({"method": "linear"}, {"sides": "both"}, {"sides": "output"}):
        model = build_model(config.but(**options), frozen, 3)
        inputs = Inputs(model, images, labels, features=features)
        taken = inputs.take(torch.arange(len(labels)))
        assert torch.equal(taken, freeze_images(model, images))
    # The linear probe and the output side read the same feature; the input side reads tokens.
    # One image gives the size, one of noise tells the frozen part.
    assert computed == [1, 1, 12, 1, 1, 12, 1, 1]


def test_images_are_decoded_once_for_many_runs(config: RunConfig, monkeypatch: pytest.MonkeyPatch):
    from lion_models.data import base

    decoded = []
    real = base.decode_file
    monkeypatch.setattr(
        base, "decode_file", lambda path, *rest: decoded.append(path) or real(path, *rest)
    )
    bench = Workbench()
    first, second = (
        bench.images.images(Run(name, each, bench=bench).source, torch.tensor(rows))[:]
        for name, each, rows in (("a", config, [0, 5, 7]), ("b", config.but(seed=9), [7, 1, 0]))
    )
    assert len(decoded) == len(set(decoded)) == 4
    assert torch.equal(second[0], first[2])
    assert torch.equal(second[2], first[0])
    assert torch.equal(second[1], open_source(config.data.data, 1, 12).load(torch.tensor([1]))[0])


def test_frozen_parts_that_agree_on_a_black_image_are_told_apart(frozen: FrozenBackbone):
    images = torch.randint(0, 256, (4, 1, 12, 12), dtype=torch.uint8)
    images[0] = 0
    features = FeatureCache()
    for method, pad in (("vpt-pad", 1), ("vpt-pad", 3), ("full", 2), ("bias", 2), ("linear", 2)):
        config = RunConfig.from_dict({"data": "digits", "method": method, "pad": pad})
        model = build_model(config, frozen, 3)
        inputs = Inputs(model, images, torch.zeros(4, dtype=torch.int64), features=features)
        assert torch.equal(inputs.take(torch.arange(4)), freeze_images(model, images))


def test_process_without_a_validation_image_adds_nothing(frozen: FrozenBackbone):
    model = build_model(RunConfig.of(data="digits", method="lion"), frozen, 3)
    nothing = freeze_images(model, torch.zeros(1, 1, 12, 12, dtype=torch.uint8))[:0]
    sums = score(model, nothing, torch.zeros(0, dtype=torch.int64))
    assert sums == {"accuracy": 0.0, "loss": 0.0}


def test_report_gives_precision_recall_and_f1_of_each_class():
    truth = torch.tensor([0, 0, 0, 1, 1, 2])
    predicted = torch.tensor([0, 0, 1, 1, 0, 1])
    report = class_report(("a", "b", "c"), truth, predicted)
    a, _, c = report["classes"]
    assert (a["precision"], a["recall"], a["support"]) == (pytest.approx(2 / 3), 2 / 3, 3)
    assert a["f1"] == pytest.approx(2 / 3)
    assert (c["precision"], c["recall"], c["f1"], c["support"]) == (0, 0, 0, 1)
    assert report["confusion"] == [[2, 1, 0], [1, 1, 0], [0, 1, 0]]
    assert report["accuracy"] == pytest.approx(3 / 6)
    assert report["balanced_accuracy"] == pytest.approx((2 / 3 + 1 / 2 + 0) / 3)


def test_eval_reports_the_classes_of_the_test_set_and_of_other_data(
    lion: Lion, trained: Path, image_folder: Path, tmp_path: Path
):
    shown = lion("eval", trained, "--report")
    assert shown.code == 0, shown.err
    assert all(name in shown.out for name in (*CLASSES, "precision", "balanced accuracy"))
    report = json.loads((trained / "report.json").read_text())
    recorded = json.loads((trained / "test.json").read_text())
    assert report["accuracy"] == pytest.approx(recorded["accuracy"])
    assert sum(map(sum, report["confusion"])) == recorded["images"]
    # A run that was tested before there were reports: the same weights may be scored again.
    (trained / "report.json").unlink()
    assert lion("eval", trained, "--report").code == 0
    assert json.loads((trained / "report.json").read_text()) == report
    other = lion("eval", trained, "--data", image_folder, "--report-to", tmp_path / "r")
    assert other.code == 0, other.err
    assert json.loads((tmp_path / "r" / "report.json").read_text())["images"] == 36
    assert np.asarray(Image.open(tmp_path / "r" / "confusion.png")).std() > 10


def test_tensorboard_has_the_scalars_of_every_epoch(
    lion: Lion, image_folder: Path, backbone_file: Path, tmp_path: Path
):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    done = lion("train", "--data", image_folder, "--backbone", backbone_file, "--shots", 3,
                "--validation-shots", 2, "--epochs", 2, "--runs", tmp_path, "--name", "x",
                "--no-test", "--tensorboard")  # fmt: skip
    assert done.code == 0, done.err
    events = EventAccumulator(str(tmp_path / "x" / "tensorboard"))
    events.Reload()
    tags = set(events.Tags()["scalars"])
    assert {"loss/train", "loss/validation", "accuracy/train", "accuracy/validation", "lr"} <= tags
    assert {f"solver_{figure}/{side}" for figure in ("steps", "residual", "backward_steps")
            for side in ("input", "output")} <= tags  # fmt: skip
    rows = [json.loads(line) for line in (tmp_path / "x" / "metrics.jsonl").open()]
    written = [(event.step, event.value) for event in events.Scalars("loss/train")]
    assert written == [(row["epoch"], pytest.approx(row["loss"])) for row in rows]


def test_predict_skips_unreadable_files_when_asked(
    lion: Lion, trained: Path, image_folder: Path, tmp_path: Path
):
    folder = tmp_path / "new"
    folder.mkdir()
    (folder / "broken.png").write_bytes(b"not a picture")
    whole = (image_folder / "dark" / "0.png").read_bytes()
    (folder / "cut.png").write_bytes(whole[: len(whole) // 2])
    (folder / "good.png").write_bytes(whole)
    output = tmp_path / "p.csv"
    refused = lion("predict", trained, folder, "--output", output)
    assert refused.code == 2
    assert "leave it out with --unreadable skip" in refused.err
    assert not list(tmp_path.glob("p.csv*"))
    done = lion("predict", trained, folder, "--output", output, "--unreadable", "skip")
    assert done.code == 0
    assert "skipped 2 of 3 files" in done.err
    assert "broken.png: not an image" in done.err
    assert "cut.png: damaged image" in done.err
    with output.open(newline="") as file:
        assert [row["file"] for row in csv.DictReader(file)] == [str(folder / "good.png")]
    only_bad = lion("predict", trained, folder / "cut.png", "--format", "json", "--unreadable",
                    "skip")  # fmt: skip
    assert only_bad.out.endswith("[]\n")


def test_predictions_of_a_large_folder_are_those_of_single_files(
    lion: Lion, trained: Path, tmp_path: Path
):
    folder = tmp_path / "many"
    folder.mkdir()
    for index in range(230):
        Image.new("L", (12, 12), index).save(folder / f"{index:03}.png")
    lion("predict", trained, folder, "--output", tmp_path / "all.json")
    everything = json.loads((tmp_path / "all.json").read_text())
    assert len(everything) == 230
    for index in (0, 99, 100, 229):
        lion("predict", trained, folder / f"{index:03}.png", "--output", tmp_path / "one.json")
        [one] = json.loads((tmp_path / "one.json").read_text())
        assert one["file"] == everything[index]["file"]
        assert one["probability"] == pytest.approx(everything[index]["probability"], abs=1e-5)


def test_file_that_cannot_be_written_whole_keeps_the_old_one(tmp_path: Path):
    path = tmp_path / "a.json"
    write_json(path, [1])

    def fail_half_way() -> None:
        with replacing(path) as file:
            file.write(b"half")
            raise KeyError

    with pytest.raises(KeyError):
        fail_half_way()
    assert json.loads(path.read_text()) == [1]
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.json"]
    with pytest.raises(UserError, match=r"x/a\.json: cannot be written \(No such file"):
        write_json(tmp_path / "x" / "a.json", [1])


def test_full_disk_under_predictions_is_named_and_nothing_is_left(
    lion: Lion, trained: Path, image_folder: Path, tmp_path: Path
):
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (500, before[1]))
    try:
        outcome = lion("predict", trained, image_folder, "--output", tmp_path / "p.csv")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert outcome.code == 2
    assert "p.csv: cannot be written, no space is left for it (File too large)" in outcome.err
    assert not list(tmp_path.glob("p.csv*"))


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("amp", "fp8", "`amp`: expected one of bf16, fp16, none, got 'fp8'"),
        ("accumulate", 0, "`accumulate`: expected 1 or more, got 0"),
        ("ema", 1.0, "`ema`: expected a decay such as 0.999, got 1.0"),
        ("ema", math.nan, "`ema`: expected a decay"),
        ("lr", 1e6, r"`lr`: expected a number above 0 and below 1,000, got 1000000\.0"),
        ("lr", 0.0, r"`lr`: expected a number above 0 and below 1,000, got 0\.0"),
        ("rtol", math.inf, "`rtol`: expected a number above 0 and below 1,000, got inf"),
        ("imbalance", 1e9, "`imbalance`: expected 1 or more and below 1,000,000, got 1000000000"),
        ("imbalance", 0.5, r"`imbalance`: expected 1 or more and below 1,000,000, got 0\.5"),
        ("patience", 0, "`patience`: expected 1 or more, got 0"),
        ("class_weights", "balancd", "did you mean 'balanced'"),
        ("weight_decay", math.nan, "`weight_decay`: expected 0 or more, got nan"),
        ("strength", math.nan, "`strength`: expected a number such as 1.0, got nan"),
        ("weight_decay", math.inf, "`weight_decay`: expected 0 or more, got inf"),
        ("seed", 99999999999999, "`seed`: expected a whole number within ±4294967295, got 99999"),
    ],
)
def test_bad_values_are_named(option: str, value: object, message: str):
    with pytest.raises(UserError, match=message):
        RunConfig.of(data="digits", **{option: value})
