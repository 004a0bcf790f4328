"""Run a plan's trials, choose by validation, and read the test set of what was chosen."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lion_models.base.files import make_folder
from lion_models.run.folder import is_new
from lion_models.run.run import Run
from lion_models.study.plan import Plan, Row
from lion_models.study.runner import TrialRunner
from lion_models.study.trial import OnEvent, Trial, check_trials

__all__ = ["OnTrials", "Study", "run_study"]

OnTrials = Callable[[Sequence[Trial]], OnEvent]


@dataclass
class Study:
    """What the trials of a plan came to.

    Attributes:
        plan: what was to be run.
        rows: its settings, in its order.
        tested: those that were chosen, in its order, with the trials that read their test sets;
            empty where that was not asked for, or something failed before.
        results: content of result.json by the run's folder; None where it failed.
        failed: why, by the run's name.
    """

    plan: Plan
    rows: list[Row]
    tested: list[Row] = field(default_factory=list)
    results: dict[Path, dict[str, Any] | None] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)

    def settings(self) -> list[dict[str, Any]]:
        """The summary of each setting and whether it is `chosen`, best first."""
        return [summary for _, summary in self._ranked()]

    def chosen(self) -> list[Row]:
        return [row for row, summary in self._ranked() if summary["chosen"]]

    def _ranked(self) -> list[tuple[Row, dict[str, Any]]]:
        ranked = [(row, self.summary(row)) for row in self.rows]
        ranked.sort(key=lambda pair: self._rank(pair[1]), reverse=True)
        decided = []
        for row, summary in ranked:
            group = row.condition, row.method, self.plan.each_seed and row.seeds
            summary["chosen"] = summary["validation_accuracy"] is not None and group not in decided
            decided.append(group)
        return ranked

    def _rank(self, summary: dict[str, Any]) -> tuple[float, ...]:
        if summary["validation_accuracy"] is None:
            return (-1.0,)
        # For each seed alone the first of equals has always been chosen, and may be tested already.
        loss = 0.0 if self.plan.each_seed else -summary["validation_loss"]
        return summary["validation_accuracy"], loss

    def summary(self, row: Row, test: bool = False) -> dict[str, Any]:
        """Means over the seeds, as sweep.json has them; None where a seed is missing.

        Args:
            row: one of `rows` or, with `test`, of `tested`.
            test: with the figures of the test set.
        """
        found = [result for trial in row.trials if (result := self.results[trial.folder])]
        whole = len(found) == len(row.trials)

        def mean(key: str) -> float | None:
            return statistics.fmean(result[key] for result in found) if whole else None

        def spread(values: list[float]) -> float | None:
            return statistics.stdev(values) if whole and len(values) > 1 else None

        summary: dict[str, Any] = {
            "condition": row.condition,
            "method": row.method,
            "setting": row.setting,
            "runs": [trial.folder.name for trial in row.trials],
            "validation_accuracy": mean("validation_accuracy"),
            "validation_spread": spread([result["validation_accuracy"] for result in found]),
            "validation_loss": mean("validation_loss"),
            "seconds": mean("seconds"),
            "parameters": found[0]["parameters"] if found else None,
        }
        if test:
            tests = [result["test"] for result in found]
            accuracies = [test["accuracy"] for test in tests]
            summary["test_accuracy"] = statistics.fmean(accuracies) if whole else None
            summary["test_spread"] = spread(accuracies)
            summary["tests"] = tests
        return summary

    def _run(self, rows: Sequence[Row], runner: TrialRunner, on_trials: OnTrials) -> None:
        trials = [trial for row in rows for trial in row.trials]
        outcome = runner.run(trials, on_trials(trials))
        self.results |= dict(zip((t.folder for t in trials), outcome.results, strict=True))
        self.failed = {trials[i].folder.name: why for i, why in outcome.failures.items()}


def run_study(
    folder: Path,
    plan: Plan,
    runner: TrialRunner,
    *,
    test: bool = False,
    test_seeds: Sequence[int] = (),
    overwrite: bool = False,
    on_trials: OnTrials = lambda trials: lambda event: None,
    keep: Callable[[Study], None] = lambda study: None,
) -> Study:
    """Run what is missing of a plan; a trial that was interrupted goes on.

    Args:
        folder: holds one run for each trial; several commands, on several machines, may share it.
        plan: what to run.
        runner: what runs the trials.
        test: read the test set with the chosen setting of every method and condition; the test
            set of no other setting is read.
        test_seeds: seeds of the tested runs, which are trained where they are not there yet;
            empty means the plan's own.
        overwrite: replace runs with other options.
        on_trials: given the trials of a phase, gives what to call with their events.
        keep: called with what the study has come to, after each phase.

    Raises:
        UserError: the folder, or one of a trial, holds something else; or data or backbone cannot
            serve a method.
    """
    # Where each seed has one setting nothing is to be chosen: what is trained is tested at once.
    # The mean of several seeds waits for all: where one has failed, no test set is read.
    at_once = test and plan.each_seed and not plan.grid
    rows = plan.rows(folder, test=at_once)
    _check(rows, runner, overwrite)
    make_folder(folder)  # where nothing can be written, nothing is trained
    study = Study(plan, rows)
    study._run(rows, runner, on_trials)
    if at_once and not study.failed:
        study.tested = rows
    keep(study)
    if not test or at_once or study.failed:
        return study
    chosen = [(row.condition, row.method, row.setting, row.seeds) for row in study.chosen()]
    last = [
        row
        for first, row in zip(rows, plan.rows(folder, test_seeds, test=True), strict=True)
        if (first.condition, first.method, first.setting, first.seeds) in chosen
    ]
    check_trials([trial for row in last for trial in row.trials], overwrite)
    study._run(last, runner, on_trials)
    study.tested = last
    keep(study)
    return study


def _check(rows: Sequence[Row], runner: TrialRunner, overwrite: bool) -> None:
    """Fail on what does not go together before anything has run."""
    seen = []
    for row in rows:
        new = [trial for trial in row.trials if is_new(trial.folder)]
        if new and (row.condition, row.method) not in seen:
            seen.append((row.condition, row.method))
            Run(new[0].folder, new[0].config, bench=runner.bench).check()
    check_trials([trial for row in rows for trial in row.trials], overwrite)
