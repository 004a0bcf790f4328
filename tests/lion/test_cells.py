"""Cells in folders that others write to: another command's options, what a kill left, any error."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from lion_models.cells import Cell, CellOptions, Event
from lion_models.runner import CellRunner
from lion_models.training import RunConfig, prepare_folder, train_run
from lion_models.training.trainer import FitState


@pytest.fixture
def config(image_folder: Path, backbone_file: Path) -> RunConfig:
    return RunConfig(str(image_folder), method="linear", backbone=str(backbone_file), shots=3,
                     validation_shots=2, epochs=2).resolved()  # fmt: skip


def quick() -> CellRunner:
    return CellRunner(1, 1, CellOptions(plot=False, state_seconds=0))


def train(folder: Path, config: RunConfig) -> Path:
    prepare_folder(folder, config, resume=False, overwrite=False)
    train_run(folder, config, test=False, plot=False)
    return folder


def test_run_of_other_options_is_not_taken_for_ones_own(config: RunConfig, tmp_path: Path):
    """Another command may write into the folder at any time after the cells were checked."""
    cells = [Cell(tmp_path / name, config) for name in ("first", "before", "behind")]

    def meddle(event: Event) -> None:
        if event.kind == "epoch" and event.epoch == 1 and event.index == 0:
            train(tmp_path / "before", replace(config, epochs=1))
        if event.kind == "done":
            prepare_folder(tmp_path / "first", replace(config, epochs=1), False, overwrite=True)
            train_run(tmp_path / "first", replace(config, epochs=1), test=False, plot=False)

    with quick() as runner:
        outcome = runner.run(cells[:2], meddle)
        assert outcome.results == [None, None]
        assert sorted(outcome.failures) == [0, 1]
        assert all("was run with other options" in why for why in outcome.failures.values())
        assert runner.run(cells[2:]).results[0]["epochs"] == 2


def test_interrupted_run_of_other_options_is_not_continued(config: RunConfig, tmp_path: Path):
    def stop(state: FitState) -> None:
        raise KeyboardInterrupt

    other = replace(config, lr=0.5)
    prepare_folder(tmp_path / "a", other, resume=False, overwrite=False)
    with pytest.raises(KeyboardInterrupt):
        train_run(tmp_path / "a", other, on_epoch=stop, plot=False, state_seconds=0)
    state = (tmp_path / "a" / "training_state.pt").read_bytes()
    with quick() as runner:
        outcome = runner.run([Cell(tmp_path / "a", config)])
    assert "was run with other options" in outcome.failures[0]
    assert (tmp_path / "a" / "training_state.pt").read_bytes() == state
