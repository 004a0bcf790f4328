"""Trials in folders that others write to: other options, what a kill left, any error."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from lion_models.base.errors import UserError
from lion_models.run import Run, RunConfig
from lion_models.run.trainer import FitState
from lion_models.study.runner import TrialRunner
from lion_models.study.trial import Event, Trial, TrialOptions, check_trials
from tests.support.command import Lion


@pytest.fixture
def config(image_folder: Path, backbone_file: Path) -> RunConfig:
    return RunConfig.of(str(image_folder), method="linear", backbone=str(backbone_file), shots=3,
                     validation_shots=2, epochs=2).resolved()  # fmt: skip


def quick() -> TrialRunner:
    return TrialRunner(1, 1, TrialOptions(plot=False, state_seconds=0))


def train(folder: Path, config: RunConfig) -> Path:
    Run(folder, config).train(test=False, plot=False)
    return folder


def test_run_of_other_options_is_not_taken_for_ones_own(config: RunConfig, tmp_path: Path):
    """Another command may write into the folder at any time after the trials were checked."""
    trials = [Trial(tmp_path / name, config) for name in ("first", "before", "behind")]

    def meddle(event: Event) -> None:
        if event.kind == "epoch" and event.epoch == 1 and event.index == 0:
            train(tmp_path / "before", config.but(epochs=1))
        if event.kind == "done":
            first = Run(tmp_path / "first", config.but(epochs=1))
            first.prepare(overwrite=True)
            first.train(test=False, plot=False)

    with quick() as runner:
        outcome = runner.run(trials[:2], meddle)
        assert outcome.results == [None, None]
        assert sorted(outcome.failures) == [0, 1]
        assert all("was run with other options" in why for why in outcome.failures.values())
        assert runner.run(trials[2:]).results[0]["epochs"] == 2


def test_interrupted_run_of_other_options_is_not_continued(config: RunConfig, tmp_path: Path):
    def stop(state: FitState) -> None:
        raise KeyboardInterrupt

    other = config.but(lr=0.5)
    with pytest.raises(KeyboardInterrupt):
        Run(tmp_path / "a", other).train(on_epoch=stop, plot=False, state_seconds=0)
    state = (tmp_path / "a" / "training_state.pt").read_bytes()
    with quick() as runner:
        outcome = runner.run([Trial(tmp_path / "a", config)])
    assert "was run with other options" in outcome.failures[0]
    assert (tmp_path / "a" / "training_state.pt").read_bytes() == state


def test_remains_of_a_run_are_no_result_and_are_replaced_when_asked(
    config: RunConfig, tmp_path: Path
):
    """Older versions, killed in --overwrite, left a result without its configuration."""
    trial = Trial(tmp_path / "a", config)
    train(trial.folder, config.but(epochs=1))
    (trial.folder / "config.json").unlink()
    assert trial.result() is None
    with pytest.raises(UserError, match=r"not a run \(no config\.json\).*use `overwrite`"):
        check_trials([trial])
    with quick() as runner:
        assert "not a run" in runner.run([trial]).failures[0]
        check_trials([trial], overwrite=True)
        assert runner.run([trial]).results[0]["epochs"] == 2
    (trial.folder / "config.json").unlink()
    (trial.folder / "notes.txt").write_text("of the user")
    with pytest.raises(UserError, match=r"holds notes\.txt, which is no file of a run"):
        check_trials([trial], overwrite=True)
    assert (trial.folder / "result.json").exists()


def test_kill_while_a_run_is_replaced_leaves_no_half_of_it(
    config: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    folder = train(tmp_path / "a", config)
    real = shutil.rmtree

    def killed(path: Path) -> None:
        (path / "config.json").unlink()
        raise KeyboardInterrupt

    monkeypatch.setattr(shutil, "rmtree", killed)
    with pytest.raises(KeyboardInterrupt):
        Run(folder, config.but(epochs=1)).prepare(overwrite=True)
    assert not folder.exists()
    monkeypatch.setattr(shutil, "rmtree", real)
    train(folder, config)
    Run(folder, config.but(epochs=1)).prepare(overwrite=True)
    assert [path.name for path in folder.iterdir()] == ["config.json"]
    assert not list((tmp_path / ".locks").iterdir())


@pytest.mark.parametrize(
    ("content", "message"),
    [('{"data": "digits", "colour": 1}', "unknown keys colour"), ('{"da', "damaged"), ("3", "dam")],
)
def test_run_of_another_version_is_named_and_replaced_when_asked(
    lion: Lion, trained: Path, image_folder: Path, backbone_file: Path, content: str, message: str
):
    arguments = ("train", "--data", image_folder, "--backbone", backbone_file, "--shots", 3,
                 "--validation-shots", 2, "--epochs", 1, "--method", "linear", "--name",
                 trained.name, "--runs", trained.parent)  # fmt: skip
    (trained / "config.json").write_text(content)
    refused = lion("eval", trained)
    assert refused.code == 2
    assert message in refused.err
    assert lion(*arguments, "--overwrite").code == 0
    assert json.loads((trained / "result.json").read_text())["method"] == "linear"


def test_any_error_of_a_cell_is_its_own(
    config: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    trials = [Trial(tmp_path / str(seed), config.but(seed=seed)) for seed in range(7)]
    errors: list[Exception] = [ValueError("a"), TypeError("b"), AttributeError("c"), KeyError("d"),
                               ImportError("e"), json.JSONDecodeError("f", "", 0)]  # fmt: skip
    real = Run.train

    def failing(run: Run, **options: object) -> object:
        if run.config.training.seed < len(errors):
            raise errors[run.config.training.seed]
        return real(run, **options)

    monkeypatch.setattr(Run, "train", failing)
    with quick() as runner:
        outcome = runner.run(trials)
    assert outcome.results[-1] is not None
    assert [outcome.failures[index].split(":")[0] for index in range(6)] == [
        "ValueError", "TypeError", "AttributeError", "KeyError", "ImportError",
        "JSONDecodeError"]  # fmt: skip
    assert "test_trials.py:" in outcome.failures[0]
