"""What measuring a run writes: reports, scalars, predictions; and when the disk is full."""

from __future__ import annotations

import csv
import json
import resource
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from lion_models.base.errors import UserError
from lion_models.base.files import replacing, write_json
from lion_models.run.report import class_report
from tests.support.command import CLASSES, Lion


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


@pytest.mark.drawn
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
