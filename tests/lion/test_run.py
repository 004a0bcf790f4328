"""A run opens its data, divides it and builds its model once, whatever is asked of it."""

from __future__ import annotations

import functools
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

from lion_models.base.errors import UserError
from lion_models.data import open_source, splits
from lion_models.methods.base import TunedClassifier
from lion_models.run import Run, RunConfig
from lion_models.run.trainer import FitState
from tests.support.command import Lion


@pytest.fixture
def config(image_folder: Path, backbone_file: Path) -> RunConfig:
    return RunConfig.of(str(image_folder), method="linear", backbone=str(backbone_file), shots=3,
                     validation_shots=2, epochs=2)  # fmt: skip


@pytest.fixture
def counts(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often a split is computed and a classifier made, wherever in this process."""
    seen: Counter[str] = Counter()

    def counted(owner: Any, name: str, what: str) -> None:
        real = getattr(owner, name)

        @functools.wraps(real)
        def count(*arguments: Any, **options: Any) -> Any:
            seen[what] += 1
            return real(*arguments, **options)

        monkeypatch.setattr(owner, name, count)

    counted(splits, "split_rows", "splits")
    counted(TunedClassifier, "__init__", "models")
    return seen


def test_training_command_computes_one_split_and_builds_one_model(
    lion: Lion, config: RunConfig, counts: Counter[str], tmp_path: Path
):
    arguments = ("train", "--data", config.data.data, "--backbone", config.backbone.backbone,
                 "--shots", 3, "--validation-shots", 2, "--epochs", 2, "--hidden", 4, "--name", "r",
                 "--runs", tmp_path)  # fmt: skip
    done = lion(*arguments)
    assert done.code == 0, done.err
    assert "test accuracy" in done.out
    assert counts == {"splits": 1, "models": 1}
    counts.clear()
    assert lion(*arguments, "--overwrite", "--no-test").code == 0
    assert counts == {"splits": 1, "models": 1}
    counts.clear()
    (tmp_path / "r" / "result.json").unlink()
    assert lion(*arguments, "--resume").code == 0
    assert counts == {"splits": 1, "models": 1}


def test_run_trained_and_measured_in_one_process_gives_what_two_give(
    config: RunConfig, tmp_path: Path
):
    one = Run(tmp_path / "one", config).train(plot=False)
    Run(tmp_path / "two", config).train(plot=False, test=False)
    two = Run.open(tmp_path / "two").measure(plot=False)
    assert one["test"] == two["test"]
    names = ("test.json", "report.json", "data.json", "checkpoint.safetensors")
    for name in names:
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()


def test_run_that_was_interrupted_begins_with_a_fresh_model(config: RunConfig, tmp_path: Path):
    def stop(state: FitState) -> None:
        raise KeyboardInterrupt

    run = Run(tmp_path / "again", config)
    with pytest.raises(KeyboardInterrupt):
        run.train(plot=False, test=False, on_epoch=stop, state_seconds=60)
    assert not (run.folder / "training_state.pt").exists()
    run.train(plot=False, test=False)
    Run(tmp_path / "whole", config).train(plot=False, test=False)
    files = [tmp_path / name / "checkpoint.safetensors" for name in ("again", "whole")]
    assert files[0].read_bytes() == files[1].read_bytes()


def test_run_that_its_data_cannot_serve_leaves_no_folder(config: RunConfig, tmp_path: Path):
    few = RunConfig.from_dict(config.to_dict() | {"shots": 400})
    with pytest.raises(UserError, match="lower `shots`"):
        Run(tmp_path / "runs" / "few", few).train()
    assert not any(tmp_path.iterdir())


def test_run_of_other_options_is_neither_trained_on_nor_measured(config: RunConfig, tmp_path: Path):
    Run(tmp_path / "r", config).train(plot=False, test=False)
    other = Run(tmp_path / "r", RunConfig.from_dict(config.to_dict() | {"epochs": 3}))
    for go_on in (other.train, other.measure):
        with pytest.raises(UserError, match="was started with epochs=2"):
            go_on()
    assert not (tmp_path / "r" / "test.json").exists()


def test_folder_that_is_replaced_says_nothing_of_the_new_runs_data(
    config: RunConfig, image_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """The run before had data of the same name, in the directory where it was started."""
    for place in ("then", "now"):
        (tmp_path / place).mkdir()
        (tmp_path / place / "photos").symlink_to(image_folder)
    (tmp_path / "now" / "photos").unlink()
    photos = tmp_path / "now" / "photos"
    photos.mkdir()
    for name in ("dark", "light"):
        (photos / name).symlink_to(image_folder / name)
    config = RunConfig.from_dict(config.to_dict() | {"data": "photos"})
    monkeypatch.chdir(tmp_path / "then")
    Run(tmp_path / "r", config).train(plot=False, test=False)
    monkeypatch.chdir(tmp_path / "now")
    run = Run(tmp_path / "r", config)
    run.prepare(overwrite=True)
    run.train(plot=False, test=False)
    assert run.trained.classes == ("dark", "light")
    assert Run.open(tmp_path / "r").source.classes == ("dark", "light")
    assert torch.equal(run.source.labels, open_source("photos", 1, 12).labels)
