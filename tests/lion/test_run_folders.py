"""What --runs, --name and --overwrite may write to and remove: a run's folder and nothing else."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path

import pytest

from lion_models.base.errors import UserError
from lion_models.cli.text import short_name
from lion_models.run import Run, RunConfig
from tests.support.command import Lion


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (("config.json",), r"not a run \(it has neither a run's config"),
        (("config.json", "metrics.jsonl"), "not a run"),
        (("config.json", "model.safetensors", "notes.md", "onnx/m.onnx"), "model.safetensors"),
    ],
)
def test_overwrite_spares_a_folder_whose_configuration_is_of_something_else(
    files: tuple[str, ...], message: str, tmp_path: Path
):
    folder = tmp_path / "model"
    for name in files:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(json.dumps({"model_type": "vit", "hidden_size": 8}))
    with pytest.raises(UserError, match=message):
        Run(folder, RunConfig.of("digits")).prepare(overwrite=True)
    assert all((folder / name).is_file() for name in files)


def test_overwrite_spares_a_run_that_holds_a_file_of_the_users(trained: Path):
    for name in ("model.pt2", "model.onnx", "tensorboard/events.out.1"):
        (trained / name).parent.mkdir(exist_ok=True)
        (trained / name).write_text("of the run")
    (trained / "thesis.txt").write_text("years of work")
    config = RunConfig.of("digits", epochs=1)
    with pytest.raises(UserError, match=r"holds thesis\.txt, which is no file of a run"):
        Run(trained, config).prepare(overwrite=True)
    assert (trained / "thesis.txt").exists()
    assert (trained / "checkpoint.safetensors").exists()
    (trained / "thesis.txt").unlink()
    Run(trained, config).prepare(overwrite=True)
    assert [path.name for path in trained.iterdir()] == ["config.json"]


@pytest.mark.parametrize("command", ["train", "compare", "sweep"])
@pytest.mark.parametrize("name", ["..", "../esc", "a/../../esc", ".", "", "{folder}/esc"])
def test_name_that_leads_out_of_the_folder_of_runs_is_refused(
    lion: Lion, command: str, name: str, tmp_path: Path
):
    name = name.format(folder=tmp_path)
    only = () if command == "train" else ("--methods", "linear")
    refused = lion(command, "--data", "digits", "--runs", tmp_path / "runs", "--name", name,
                   "--epochs", 1, *only)  # fmt: skip
    assert refused.code == 2
    assert f"--name: expected a name such as first or study/first, got '{name}'" in refused.err
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("command", ["compare", "sweep"])
def test_runs_of_a_study_are_not_put_into_another_run(lion: Lion, command: str, trained: Path):
    before = sorted(trained.rglob("*"))
    for more in ((), ("--overwrite",)):
        refused = lion(command, "--data", "digits", "--methods", "linear", "--epochs", 1,
                       "--runs", trained.parent, "--name", trained.name, *more)  # fmt: skip
        assert refused.code == 2
        assert "finished holds a run; expected a folder for many" in refused.err
    assert sorted(trained.rglob("*")) == before


def test_run_on_the_working_directory_is_called_by_its_name(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    (tmp_path / "photos" / "cats").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "photos" / "cats")
    names = [short_name(data) for data in (".", "..", "../", "digits", "hf:a/b:c", "emoji:/x/y/")]
    assert names == ["cats", "photos", "photos", "digits", "b-c", "y"]
    assert short_name("/") == "data"


@pytest.mark.parametrize("command", ["train", "compare", "sweep", "demo"])
@pytest.mark.parametrize("runs", ["a", "a/config.json", "a/config.json/b"])
def test_folder_of_runs_that_is_a_file_is_named(
    lion: Lion, command: str, runs: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "config.json").write_text("{}")
    monkeypatch.setattr(Run, "train", None)
    real = os.mkdir

    def refuse(path: Path, *arguments: object) -> None:
        # What the system says to a user without the right to write; a superuser has it always.
        if str(path).startswith(str(tmp_path / "a" / "")):
            raise PermissionError(errno.EACCES, "Permission denied")
        real(path, *arguments)

    if runs == "a":
        monkeypatch.setattr("os.mkdir", refuse)
    refused = lion(command, "--data", "digits", "--runs", tmp_path / runs)
    assert refused.code == 2
    assert "cannot be written (" in refused.err
    assert str(tmp_path / runs) in refused.err


@pytest.mark.parametrize("command", ["compare", "sweep"])
def test_nothing_is_trained_where_the_result_could_not_be_written(
    lion: Lion, command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    (tmp_path / "study").mkdir()
    real = os.access
    monkeypatch.setattr(
        "os.access",
        lambda path, mode, **more: path != tmp_path / "study" and real(path, mode, **more),
    )
    refused = lion(command, "--data", "digits", "--methods", "linear", "--epochs", 1, "--runs",
                   tmp_path, "--name", "study")  # fmt: skip
    assert refused.code == 2
    assert "study: cannot be written (Permission denied)" in refused.err
    assert not any((tmp_path / "study").iterdir())


def test_report_is_refused_where_it_cannot_be_written(
    lion: Lion, trained: Path, image_folder: Path
):
    refused = lion("eval", trained, "--data", image_folder, "--report-to",
                   trained / "config.json" / "x")  # fmt: skip
    assert refused.code == 2
    assert "config.json/x: cannot be written (Not a directory)" in refused.err
