"""Trials: runs of which many lie in one folder, each claimed by one process at a time."""

from __future__ import annotations

import json
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lion_models.base.errors import UserError
from lion_models.base.files import claim, holding, run_lock
from lion_models.data.loader import IMAGE_CACHE
from lion_models.run import Run, RunConfig
from lion_models.run.folder import is_new, prepare_folder, read_config
from lion_models.run.log import STATE_SECONDS
from lion_models.run.trainer import FitState
from lion_models.run.workbench import Workbench

__all__ = ["Event", "OnEvent", "Outcome", "Trial", "TrialOptions", "attempt", "check_trials"]


@dataclass(frozen=True)
class Trial:
    """One run of many.

    Attributes:
        folder: of the run.
        config: what to train, with its recipe resolved.
        test: read the test set, after training or for a run that is trained already.
    """

    folder: Path
    config: RunConfig
    test: bool = False

    def conflict(self) -> str | None:
        """Why the folder cannot be this trial's; None where it is, or is new."""
        if is_new(self.folder):
            return None
        try:
            if read_config(self.folder) == self.config:
                return None
        except UserError as error:
            return f"{error}; use `overwrite` to replace it, or another `name` or `runs`"
        return (
            f"{self.folder} was run with other options; use `overwrite` to replace it, "
            "or another `name` or `runs`"
        )

    def result(self) -> dict[str, Any] | None:
        """Content of result.json, if the run is this trial's and has all that is asked for."""
        path = self.folder / "result.json"
        if not path.is_file() or self.conflict() is not None:
            return None
        result: dict[str, Any] = json.loads(path.read_text())
        return result if not self.test or "test" in result else None


@dataclass(frozen=True)
class Event:
    """News of a trial.

    Attributes:
        index: of the trial among those given.
        kind: `epoch` (one has ended), `done`, `failed`, `held` (another command runs it; it is
            looked at again) or `elsewhere` (another command has finished it).
        epoch: epochs done.
        accuracy: on validation data.
        message: why it failed.
        state: of the fit; only where the trial runs in this process.
    """

    index: int
    kind: str
    epoch: int = 0
    accuracy: float = 0.0
    message: str = ""
    state: FitState | None = field(default=None, compare=False)


OnEvent = Callable[[Event], None]


@dataclass(frozen=True)
class Outcome:
    """What became of the trials: results in their order (None: failed), and messages by index."""

    results: list[dict[str, Any] | None]
    failures: dict[int, str]


@dataclass(frozen=True)
class TrialOptions:
    """How trials run: see `TrialRunner` and, for what each process has, `Workbench`."""

    device: str = "cpu"
    plot: bool = True
    state_seconds: float = STATE_SECONDS
    workers: int | None = None
    image_cache: float = IMAGE_CACHE

    def bench(self) -> Workbench:
        """What the runs of one process share."""
        return Workbench(self.device, self.workers, self.image_cache)


def check_trials(trials: Sequence[Trial], overwrite: bool = False) -> None:
    """Refuse, before anything runs, folders that hold something else.

    With `overwrite`, trials that were run with other options are cleared away here, once.

    Raises:
        UserError: a folder was run with other options, or holds no run, or the folder of them all
            is a run's itself.
    """
    for folder in {trial.folder.parent for trial in trials}:
        if (folder / "config.json").exists():
            raise UserError(
                f"{folder} holds a run; expected a folder for many, or a new one; use another "
                "`name` or `runs`"
            )
    for trial in trials:
        why = trial.conflict()
        if why is not None and not overwrite:
            raise UserError(why)
        if why is not None:
            with holding(trial.folder):
                prepare_folder(trial.folder, trial.config, resume=False, overwrite=True)


def attempt(
    index: int, trial: Trial, options: TrialOptions, bench: Workbench, tell: OnEvent
) -> Event:
    """Run a trial unless another process holds or has finished it; the event says what became."""
    try:
        if trial.result() is not None:
            return Event(index, "elsewhere")
        with claim(run_lock(trial.folder)) as mine:
            if not mine:
                return Event(index, "held")
            # Another command may have begun or replaced it since `check_trials`.
            why = trial.conflict()
            if why is not None:
                return Event(index, "failed", message=why)
            if trial.result() is not None:
                return Event(index, "elsewhere")
            return _run_trial(index, trial, options, bench, tell)
    except UserError as error:
        return Event(index, "failed", message=str(error))
    except Exception as error:  # of whatever kind: the other trials go on
        where = traceback.extract_tb(error.__traceback__)[-1]
        message = f"{type(error).__name__}: {error} ({where.filename}:{where.lineno})"
        return Event(index, "failed", message=message)


def _run_trial(
    index: int, trial: Trial, options: TrialOptions, bench: Workbench, tell: OnEvent
) -> Event:
    def on_epoch(state: FitState) -> None:
        row = state.history[-1]
        tell(Event(index, "epoch", row["epoch"], row["validation_accuracy"], state=state))

    result = Run(trial.folder, trial.config, bench=bench).train(
        test=trial.test,
        on_epoch=on_epoch,
        plot=options.plot,
        state_seconds=options.state_seconds,
    )
    return Event(index, "done", result.get("epochs", 0), result["validation_accuracy"])
