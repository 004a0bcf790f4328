"""The progress bars of training."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

from tqdm import tqdm

from lion_models.cli.text import dashed
from lion_models.run import FitState, RunConfig
from lion_models.study.trial import Event, Trial

LOG_SECONDS = 30.0  # between two lines in a file or a pipe, where a bar cannot be drawn over


def _bar(total: int, initial: int, name: str) -> tqdm[Any]:
    """A bar of epochs."""
    options = (
        {} if sys.stderr.isatty() else {"mininterval": LOG_SECONDS, "maxinterval": LOG_SECONDS}
    )
    return tqdm(total=total, initial=initial, unit="epoch", desc=name, **options)


class ProgressBars:
    """One progress bar per run, with loss, validation accuracy and solver steps."""

    def __init__(self) -> None:
        self._bar: tqdm[Any] | None = None
        self._config: RunConfig | None = None

    def __enter__(self) -> ProgressBars:
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.close()

    def update(self, config: RunConfig, state: FitState) -> None:
        row = state.history[-1]
        if config != self._config or self._bar is None:
            self.__exit__()
            self._config = config
            name = f"{config.method.name} seed {config.training.seed}"
            self._bar = _bar(config.training.epochs, row["epoch"] - 1, name)
        steps = "/".join(f"{figures['steps']:.0f}" for figures in row["solver"].values())
        shown = {"loss": f"{row['loss']:.3f}", "val": f"{100 * row['validation_accuracy']:.1f}%"}
        self._bar.set_postfix(shown | ({"steps": steps} if steps else {}), refresh=False)
        self._bar.update()


class TrialBars:
    """Progress over many runs: a bar for each where they run one by one, else one for all."""

    def __init__(self, jobs: int) -> None:
        self._jobs = jobs
        self._single = ProgressBars()
        self._all: tqdm[Any] | None = None

    def __enter__(self) -> TrialBars:
        return self

    def __exit__(self, *_: object) -> None:
        self._single.__exit__()
        if self._all is not None:
            self._all.close()

    def one_by_one(self, trials: Sequence[Trial]) -> Any:
        """What to call with the events of `trials`."""
        if self._jobs > 1:
            return self.together(trials)

        def hear(event: Event) -> None:
            if event.state is not None:
                self._single.update(trials[event.index].config, event.state)

        return hear

    def together(self, trials: Sequence[Trial]) -> Any:
        """The same with one bar, which counts epochs."""
        self.__exit__()
        epochs = [trial.config.training.epochs for trial in trials]
        seen = [0 if trial.result() is None else epochs[i] for i, trial in enumerate(trials)]
        done = {index for index, count in enumerate(seen) if count}
        bar = self._all = _bar(sum(epochs), sum(seen), "runs")
        best = 0.0
        failed = 0

        def hear(event: Event) -> None:
            nonlocal best, failed
            if event.kind == "held":
                return
            now = event.epoch if event.kind == "epoch" else epochs[event.index]
            if event.kind != "epoch":
                done.add(event.index)
                best = max(best, event.accuracy)
                failed += event.kind == "failed"
            shown = {"done": f"{len(done)}/{len(trials)}", "best val": f"{100 * best:.1f}%"}
            bar.set_postfix(shown | ({"failed": failed} if failed else {}), refresh=False)
            bar.update(max(0, now - seen[event.index]))
            seen[event.index] = max(now, seen[event.index])
            if event.kind == "failed":
                bar.write(dashed(f"{trials[event.index].folder.name}: {event.message}"))

        return hear
