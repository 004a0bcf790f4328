"""The `lion` command from end to end, and the message for each mistake."""

from __future__ import annotations

import csv
import io
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

import deqcore
from lion_models.backbones.tiny_vit import save_vit
from lion_models.data import BadFilesWarning
from lion_models.run.checkpoint import read_checkpoint
from tests.support.command import Lion
from tests.support.small import small_vit

QUICK = ("--shots", 3, "--validation-shots", 2, "--epochs", 2)


def picture_is_drawn(path: Path) -> bool:
    pixels = np.asarray(Image.open(path).convert("RGB"))
    return min(pixels.shape[:2]) > 300 and len(np.unique(pixels.reshape(-1, 3), axis=0)) > 50


def test_train_writes_a_whole_run(trained: Path):
    names = {path.name for path in trained.iterdir()}
    assert names == {"config.json", "data.json", "metrics.jsonl", "checkpoint.safetensors",
                     "result.json", "test.json", "report.json", "curves.png",
                     "confusion.png", "report.html"}  # fmt: skip
    rows = [json.loads(line) for line in (trained / "metrics.jsonl").read_text().splitlines()]
    assert [row["epoch"] for row in rows] == [1, 2, 3]
    assert json.loads((trained / "config.json").read_text())["hidden"] == 4
    result = json.loads((trained / "result.json").read_text())
    assert result["test"]["images"] == 12
    assert set(result["traces"]["after"]) == {"input", "output"}
    assert picture_is_drawn(trained / "curves.png")


def test_version_is_that_of_the_package(lion: Lion):
    shown = lion("--version")
    assert shown.code == 0
    assert f"deqcore {deqcore.__version__}, torch {torch.__version__}" in shown.out


def test_train_on_digits_with_the_embedded_backbone(lion: Lion, tmp_path: Path):
    done = lion("train", "--data", "digits", *QUICK, "--method", "linear", "--runs", tmp_path)
    assert done.code == 0, done.err
    assert "test accuracy" in done.out
    assert (tmp_path / "digits-linear-s42" / "checkpoint.safetensors").is_file()


def test_eval_repeats_the_recorded_figure_and_takes_other_data(
    lion: Lion, trained: Path, image_folder: Path
):
    recorded = json.loads((trained / "test.json").read_text())
    own = lion("eval", trained)
    assert f"accuracy {100 * recorded['accuracy']:.2f}%" in own.out
    other = lion("eval", trained, "--data", image_folder)
    assert "over 36 images" in other.out


def test_eval_measures_a_run_that_was_not_tested(
    lion: Lion, image_folder: Path, backbone_file: Path, tmp_path: Path
):
    lion("train", "--data", image_folder, "--backbone", backbone_file, *QUICK, "--no-test",
         "--runs", tmp_path, "--name", "x", "--method", "linear")  # fmt: skip
    assert not (tmp_path / "x" / "test.json").exists()
    assert lion("eval", tmp_path / "x").code == 0
    assert (tmp_path / "x" / "test.json").exists()


def test_predict_gives_the_same_table_csv_and_json(
    lion: Lion, trained: Path, image_folder: Path, tmp_path: Path
):
    one = image_folder / "dark" / "0.png"
    assert "probability" in lion("predict", trained, one).out
    table = lion("predict", trained, image_folder, "--format", "csv").out
    rows = list(csv.DictReader(io.StringIO(table)))
    assert len(rows) == 36
    for row in rows:
        chances = {name: float(row[f"p_{name}"]) for name in ("dark", "light", "middle")}
        assert sum(chances.values()) == pytest.approx(1, abs=1e-5)
        assert max(chances, key=chances.__getitem__) == row["class"]
    lion("predict", trained, image_folder, "--output", tmp_path / "p.json")
    written = json.loads((tmp_path / "p.json").read_text())
    assert [row["class"] for row in written] == [row["class"] for row in rows]
    assert lion("predict", trained, image_folder, "--format", "csv").out == table


@pytest.mark.drawn
def test_compare_makes_a_table_json_and_picture_and_continues(
    lion: Lion, image_folder: Path, backbone_file: Path, tmp_path: Path
):
    arguments = ("compare", "--data", image_folder, "--backbone", backbone_file, *QUICK,
                 "--hidden", 4, "--runs", tmp_path, "--name", "c",
                 "--methods", "linear,lion")  # fmt: skip
    first = lion(*arguments, "--seeds", "1")
    assert first.code == 0, first.err
    stamp = (tmp_path / "c" / "lion-s1" / "checkpoint.safetensors").stat().st_mtime_ns
    second = lion(*arguments, "--seeds", "1,2")
    assert second.code == 0, second.err
    assert (tmp_path / "c" / "lion-s1" / "checkpoint.safetensors").stat().st_mtime_ns == stamp
    written = json.loads((tmp_path / "c" / "compare.json").read_text())
    assert [(cell["method"], cell["seed"]) for cell in written["cells"]] == [
        ("linear", 1), ("lion", 1), ("linear", 2), ("lion", 2)]  # fmt: skip
    accuracies = [c["test_accuracy"] for c in written["cells"] if c["method"] == "lion"]
    row = next(row for row in written["summary"] if row["method"] == "lion")
    assert row["test_accuracy"] == pytest.approx(sum(accuracies) / 2)
    assert "±" in second.out
    assert picture_is_drawn(tmp_path / "c" / "compare.png")
    changed = lion(*arguments, "--seeds", "1", "--epochs", "3")
    assert changed.code == 2
    assert "was run with other options" in changed.err


def test_compare_refuses_what_does_not_go_together_before_it_runs_anything(
    lion: Lion, image_folder: Path, backbone_file: Path, tmp_path: Path
):
    refused = lion("compare", "--data", image_folder, "--backbone", backbone_file, *QUICK,
                   "--runs", tmp_path, "--name", "c", "--methods", "all",
                   "--checkpoint-backbone")  # fmt: skip
    assert refused.code == 2
    assert "'full' trains them" in refused.err
    assert not (tmp_path / "c").exists()


def test_compare_tests_only_the_rate_that_validation_chose(
    lion: Lion, image_folder: Path, backbone_file: Path, tmp_path: Path
):
    done = lion("compare", "--data", image_folder, "--backbone", backbone_file, *QUICK, "--runs",
                tmp_path, "--name", "c", "--methods", "linear", "--seeds", "1", "--lrs",
                "0.001,0.05")  # fmt: skip
    assert done.code == 0, done.err
    runs = sorted((tmp_path / "c").glob("linear-s1-lr*"))
    assert len(runs) == 2
    assert sum((run / "test.json").exists() for run in runs) == 1


def test_info_shows_the_backbone_and_a_run(lion: Lion, trained: Path):
    assert "tiny-vit" in lion("info").out
    assert "weights sha256" in lion("info", trained).out


def test_existing_run_is_neither_replaced_nor_continued_unasked(lion: Lion, trained: Path):
    config = json.loads((trained / "config.json").read_text())
    arguments = ("train", "--data", config["data"], "--backbone", config["backbone"], *QUICK,
                 "--name", trained.name, "--runs", trained.parent)  # fmt: skip
    refused = lion(*arguments)
    assert refused.code == 2
    assert "exists; use --resume to continue it, --overwrite to replace it" in refused.err
    conflict = lion(*arguments, "--resume")
    assert conflict.code == 2
    assert "was started with shots=4" in conflict.err
    assert lion(*arguments, "--overwrite").code == 0


def test_resume_takes_the_stored_options(lion: Lion, trained: Path):
    config = json.loads((trained / "config.json").read_text())
    done = lion("train", "--data", config["data"], "--name", trained.name, "--runs",
                trained.parent, "--resume")  # fmt: skip
    assert done.code == 0, done.err
    assert "chosen epoch" in done.out


def test_overwrite_spares_a_folder_that_is_no_run(lion: Lion, tmp_path: Path):
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / "thesis.txt").write_text("years of work")
    refused = lion("train", "--data", "digits", "--name", "x", "--runs", tmp_path, "--overwrite")
    assert refused.code == 2
    assert "x holds thesis.txt, which is no file of a run" in refused.err
    assert (tmp_path / "x" / "thesis.txt").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--data", "/no/such/place"], "'/no/such/place' is neither a folder nor one of"),
        (["--data", "digit"], "did you mean 'digits'?"),
        (["--data", "digits", "--method", "vtp-deep"], "did you mean 'vpt-deep'?"),
        (["--data", "digits", "--shots", "5000"], "class '8' has 174 images, of which 52 are kept"),
        (["--data", "digits", "--shots", "many"], "expected a whole number or 'all', got 'many'"),
        (["--data", "digits", "--backbone", "tiny-vit,readout=9"], "expected 1 to 4, got 9"),
        (["--data", "digits", "--method", "full", "--checkpoint-backbone"], "'full' trains them"),
        (["--data", "digits", "--sparsity", "1.5"], "--sparsity: expected a share from 0 to"),
        (["--data", "digits", "--threads", "-1"], "--threads: expected 1 or more, got -1"),
        (["--data", "digits", "--device", "cdua"], "did you mean 'cuda'?"),
        (["--data", "digits", "--backbone", "x.safetensors"], "x.safetensors does not exist"),
        (["--data", "digits", "--resume", "--name", "no"], "holds no run; leave --resume out"),
    ],
)
def test_train_names_what_is_wrong(lion: Lion, arguments: list[str], message: str, tmp_path: Path):
    outcome = lion("train", *arguments, "--runs", tmp_path)
    assert outcome.code == 2
    assert outcome.err.startswith("error:")
    assert message in outcome.err
    assert not any(tmp_path.iterdir())


def test_misspelt_option_is_suggested(lion: Lion):
    outcome = lion("train", "--data", "digits", "--shot", "3")
    assert outcome.code == 2
    assert "--shots" in outcome.err


def test_not_an_image_is_named_by_train_and_predict(
    lion: Lion, trained: Path, image_folder: Path, tmp_path: Path
):
    copy = tmp_path / "images"
    shutil.copytree(image_folder, copy)
    for path in copy.glob("dark/*"):
        path.write_bytes(b"not a picture")
    backbone = json.loads((trained / "config.json").read_text())["backbone"]
    for outcome in (
        lion("train", "--data", copy, "--backbone", backbone, *QUICK, "--runs", tmp_path / "r"),
        lion("predict", trained, copy),
    ):
        assert outcome.code == 2
        assert "not an image (13 bytes of something else)" in outcome.err


def test_predict_names_what_is_wrong(lion: Lion, trained: Path, tmp_path: Path):
    (tmp_path / "empty").mkdir()
    image = tmp_path / "a.png"
    Image.new("L", (5, 5)).save(image)
    for arguments, message in [
        ((trained, tmp_path / "none.png"), "none.png: no such file or folder"),
        ((trained, tmp_path / "empty"), "empty: no image in this folder"),
        ((trained, image, "--format", "jsn"), "did you mean 'json'?"),
        ((trained, image, "--output", tmp_path / "no" / "p.csv"), "does not exist; create it"),
        ((tmp_path / "run", image), "no checkpoint; expected the folder of a finished run"),
    ]:
        outcome = lion("predict", *arguments)
        assert outcome.code == 2
        assert message in outcome.err


def test_format_of_predictions_is_what_is_asked_for_and_else_the_name_s(
    lion: Lion, trained: Path, image_folder: Path, tmp_path: Path
):
    image = next(image_folder.rglob("*.png"))
    for asked, name, first in [
        (("--format", "csv"), "a.json", "file,class"),
        (("--format", "json"), "a.csv", "["),
        (("--format", "csv"), "a.txt", "file,class"),
        ((), "b.json", "["),
        ((), "b.CSV", "file,class"),
    ]:
        assert lion("predict", trained, image, *asked, "--output", tmp_path / name).code == 0
        assert (tmp_path / name).read_text().startswith(first)
    refused = lion("predict", trained, image, "--format", "table", "--output", tmp_path / "c")
    assert refused.code == 2
    assert "--format: expected one of csv, json, got 'table'" in refused.err
    for name in ("c", "c.txt", "c.jsonl"):
        refused = lion("predict", trained, image, "--output", tmp_path / name)
        assert refused.code == 2
        assert f"{name}: expected a name that ends with .csv or .json" in refused.err
        assert "add --format csv or --format json" in refused.err
        assert not (tmp_path / name).exists()


def test_run_whose_backbone_file_has_moved_is_told_its_new_place(
    lion: Lion, trained: Path, image_folder: Path, backbone_file: Path, tmp_path: Path
):
    moved = tmp_path / "moved.safetensors"
    shutil.copy(backbone_file, moved)
    weights, metadata = read_checkpoint(trained / "checkpoint.safetensors")
    metadata["backbone"] = str(tmp_path / "gone.safetensors")
    save_file(weights, trained / "checkpoint.safetensors", metadata)
    image = next(image_folder.rglob("*.png"))
    assert "gone.safetensors does not exist" in lion("predict", trained, image).err
    assert lion("predict", trained, image, "--backbone", moved).code == 0
    assert lion("eval", trained, "--data", image_folder, "--backbone", moved).code == 0


def test_eval_leaves_damaged_files_out_where_it_may(
    lion: Lion, trained: Path, image_folder: Path, tmp_path: Path
):
    other = tmp_path / "other"
    shutil.copytree(image_folder, other)
    next(other.rglob("*.png")).write_bytes(b"cut")
    refused = lion("eval", trained, "--data", other)
    assert refused.code == 2
    assert "--bad-files skip" in refused.err
    with pytest.warns(BadFilesWarning):
        shown = lion("eval", trained, "--data", other, "--bad-files", "skip")
    assert shown.code == 0, shown.err
    assert "over 35 images" in shown.out
    assert "go with --data" in lion("eval", trained, "--bad-files", "skip").err


def test_damaged_checkpoint_and_changed_backbone_are_named(
    lion: Lion, trained: Path, image_folder: Path, tmp_path: Path
):
    image = image_folder / "dark" / "0.png"
    metadata = json.loads((trained / "config.json").read_text())
    backbone = Path(metadata["backbone"])
    original = backbone.read_bytes()
    try:
        save_vit(small_vit(seed=1), backbone, {}, ("a", "b"))
        outcome = lion("predict", trained, image)
    finally:
        backbone.write_bytes(original)
    assert outcome.code == 2
    assert "was trained on backbone" in outcome.err
    half = tmp_path / "half.safetensors"
    whole = (trained / "checkpoint.safetensors").read_bytes()
    half.write_bytes(whole[: len(whole) // 2])
    outcome = lion("predict", half, image)
    assert outcome.code == 2
    assert "half.safetensors: cut off or not a safetensors file" in outcome.err


def test_eval_names_data_with_other_classes(lion: Lion, trained: Path):
    outcome = lion("eval", trained, "--data", "digits")
    assert outcome.code == 2
    assert "the run was trained for dark, light, middle" in outcome.err
