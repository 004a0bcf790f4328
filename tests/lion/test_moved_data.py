"""A run whose data, or the working directory, is elsewhere than when it was trained."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest

from lion_models.run import Run
from lion_models.run.workbench import Workbench
from tests.support.command import Lion, call


@pytest.fixture
def home(
    image_folder: Path, backbone_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Path:
    """A working directory with `photos` and runs on it, tested and not, named relatively."""
    shutil.copytree(image_folder, tmp_path / "home" / "photos")
    monkeypatch.chdir(tmp_path / "home")
    for name, *more in (("tested",), ("untested", "--no-test")):
        done = call("train", "--data", "photos", "--method", "linear", "--backbone", backbone_file,
                    "--shots", 3, "--validation-shots", 2, "--epochs", 1, "--name", name,
                    *more)  # fmt: skip
        assert done.code == 0, done.err
    return tmp_path / "home"


def test_run_is_measured_exported_and_resumed_from_another_directory(
    lion: Lion, home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    # Another folder of the same name is not the run's.
    (tmp_path / "photos" / "dark").mkdir(parents=True)
    run = home / "runs" / "untested"
    resumed = lion("train", "--data", home / "photos", "--runs", home / "runs", "--name",
                   "untested", "--resume", "--no-test")  # fmt: skip
    assert resumed.code == 0, resumed.err
    assert json.loads((run / "config.json").read_text())["data"] == "photos"
    assert lion("export", run).code == 0
    shown = lion("eval", run)
    assert shown.code == 0, shown.err
    assert "over 12 images of the run's test set" in shown.out


def test_data_that_lies_where_it_lay_is_opened_once(home: Path):
    folder = home / "runs" / "untested"
    bench = Workbench()
    run = Run.open(folder, bench=bench)
    assert run.place == "photos"
    assert run.source is Run(folder.parent / "another", run.config, bench=bench).source


def test_measured_run_is_shown_without_its_data_and_backbone(lion: Lion, home: Path):
    first = lion("eval", "runs/tested").out
    shutil.rmtree(home / "photos")
    config = json.loads((home / "runs" / "tested" / "config.json").read_text())
    config["backbone"] = "gone.safetensors"
    (home / "runs" / "tested" / "config.json").write_text(json.dumps(config))
    shown = lion("eval", "runs/tested", "--report")
    assert shown.code == 0, shown.err
    assert first in shown.out
    ledger = home / "runs" / "tested" / "test.json"
    ledger.write_text(json.dumps(json.loads(ledger.read_text()) | {"weights": "of others"}))
    assert "was read with other weights already" in lion("eval", "runs/tested").err


def test_moved_data_is_named_where_the_run_needs_it(lion: Lion, home: Path, tmp_path: Path):
    moved = shutil.move(home / "photos", tmp_path / "elsewhere")
    for command in (("eval",), ("export",)):
        refused = lion(*command, "runs/untested")
        assert refused.code == 2
        assert f"the run's data folder 'photos' (it was {home}/photos) is not there" in refused.err
        assert "name its new place with --moved-data" in refused.err
    assert lion("export", "runs/untested", "--moved-data", moved).code == 0
    training = ("train", "--data", "photos", "--name", "untested", "--resume", "--no-test")
    assert "name its new place with --moved-data" in lion(*training).err
    assert lion(*training, "--moved-data", moved).code == 0
    shown = lion("eval", "runs/untested", "--moved-data", moved)
    assert shown.code == 0, shown.err
    assert "over 12 images of the run's test set" in shown.out


def test_moved_data_has_to_be_the_data_that_the_run_was_trained_on(
    lion: Lion, home: Path, tmp_path: Path
):
    other = Path(shutil.copytree(home / "photos", tmp_path / "other"))
    shutil.copy(other / "dark" / "0.png", other / "dark" / "extra.png")
    (home / "runs" / "untested" / "result.json").rename(tmp_path / "result.json")
    resumed = lion("train", "--data", "photos", "--name", "untested", "--resume", "--moved-data",
                   other)  # fmt: skip
    assert resumed.code == 2
    assert "class 'dark' had 12 images and has 13" in resumed.err
    (tmp_path / "result.json").rename(home / "runs" / "untested" / "result.json")
    refused = lion("eval", "runs/untested", "--moved-data", other)
    assert refused.code == 2
    assert "class 'dark' had 12 images and has 13" in refused.err
    assert "goes with --resume" in lion("train", "--data", "photos", "--moved-data", other).err
    both = lion("eval", "runs/untested", "--data", "photos", "--moved-data", other)
    assert "--moved-data: is about the run's own data" in both.err


def test_run_of_a_version_that_remembered_no_folder_says_what_it_looks_for(
    lion: Lion, home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    record = home / "runs" / "untested" / "data.json"
    record.write_text(
        json.dumps({k: v for k, v in json.loads(record.read_text()).items() if k != "folder"})
    )
    monkeypatch.chdir(tmp_path)
    refused = lion("eval", home / "runs" / "untested")
    assert refused.code == 2
    assert f"the run's data folder 'photos' (relative to {tmp_path}) is not there" in refused.err
    shown = lion("eval", home / "runs" / "untested", "--moved-data", home / "photos")
    assert shown.code == 0, shown.err


def test_eval_warns_where_the_data_holds_images_that_the_run_was_trained_on(
    lion: Lion, home: Path, image_folder: Path
):
    for data in ("photos", home / "photos"):
        shown = lion("eval", "runs/tested", "--data", data)
        assert shown.code == 0, shown.err
        assert "warning: 9 of these images are training images of the run" in shown.err
    assert "warning" not in lion("eval", "runs/tested", "--data", image_folder).err
    assert "warning" not in lion("eval", "runs/tested").err


def test_eval_warns_where_the_backbone_lies_elsewhere_too(
    lion: Lion, home: Path, backbone_file: Path, tmp_path: Path
):
    old, new = tmp_path / "old.safetensors", tmp_path / "new.safetensors"
    for copy in (old, new):
        shutil.copy(backbone_file, copy)
    done = lion("train", "--data", "photos", "--method", "linear", "--backbone", old, "--shots", 3,
                "--validation-shots", 2, "--epochs", 1, "--name", "b", "--no-test")  # fmt: skip
    assert done.code == 0, done.err
    old.unlink()
    shown = lion("eval", "runs/b", "--data", "photos", "--backbone", new)
    assert shown.code == 0, shown.err
    assert "warning: 9 of these images are training images of the run" in shown.err


def test_parts_of_a_data_set_with_its_own_split_are_told_apart(
    lion: Lion, image_folder: Path, backbone_file: Path, tmp_path: Path
):
    for part, keep in (("train", "[0-7].*"), ("test", "[8-9].*")):
        for path in image_folder.glob(f"*/{keep}"):
            target = tmp_path / "parts" / part / path.parent.name / path.name
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, target)
    run = tmp_path / "runs" / "own"
    done = lion("train", "--data", tmp_path / "parts", "--method", "linear", "--backbone",
                backbone_file, "--shots", 4, "--validation-shots", 2, "--epochs", 1, "--runs",
                run.parent, "--name", run.name, "--no-test")  # fmt: skip
    assert done.code == 0, done.err
    assert "warning: 12 of" in lion("eval", run, "--data", tmp_path / "parts" / "train").err
    other = lion("eval", run, "--data", tmp_path / "parts" / "test")
    assert other.code == 0
    assert "warning" not in other.err


def test_eval_warns_on_the_data_set_of_the_run_s_own_name(lion: Lion, tmp_path: Path):
    lion("train", "--data", "digits", "--method", "linear", "--shots", 2, "--epochs", 1,
         "--runs", tmp_path, "--name", "d", "--no-test")  # fmt: skip
    shown = lion("eval", tmp_path / "d", "--data", "digits")
    assert "warning: 20 of these images are training images of the run" in shown.err


def test_measured_run_is_shown_without_writing_to_its_folder(lion: Lion, trained: Path):
    def times() -> dict[str, int]:
        return {path.name: path.stat().st_mtime_ns for path in (trained, *trained.iterdir())}

    before = times()
    assert lion("eval", trained, "--report").code == 0
    assert times() == before


def test_what_is_missing_of_a_measured_run_is_written_again(
    lion: Lion, trained: Path, monkeypatch: pytest.MonkeyPatch
):
    result = json.loads((trained / "result.json").read_text())
    (trained / "result.json").write_text(
        json.dumps({k: v for k, v in result.items() if k != "test"})
    )
    (trained / "curves.png").unlink()
    kept = (trained / "test.json").stat().st_mtime_ns
    assert lion("eval", trained).code == 0
    assert json.loads((trained / "result.json").read_text()) == result
    assert (trained / "curves.png").exists()
    assert (trained / "test.json").stat().st_mtime_ns == kept
    # A picture is worth no error.
    (trained / "confusion.png").unlink()
    monkeypatch.setattr("os.access", lambda path, mode, **_: mode != os.W_OK)
    assert lion("eval", trained).code == 0
    assert not (trained / "confusion.png").exists()
