"""A grid of settings over seeds: validation chooses, and the test set waits until it has."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lion_models.base.errors import UserError, choose
from lion_models.base.files import make_folder, write_json
from lion_models.methods import METHODS
from lion_models.prompts.config import CDR_OPTIONS
from lion_models.run.config import RunConfig, option_kinds, owners_of, run_of
from lion_models.run.run import Run
from lion_models.study.runner import CellRunner
from lion_models.study.trial import Cell, OnEvent, check_cells

__all__ = ["Axis", "Plan", "parse_axis", "run_sweep", "short_value"]

Setting = dict[str, Any]


@dataclass(frozen=True)
class Axis:
    """One option and the values to try.

    Attributes:
        key: a field of `RunConfig`.
        values: in the order of the user.
        method: the only method that it applies to; None means every method that has the option.
    """

    key: str
    values: tuple[Any, ...]
    method: str | None = None

    def applies_to(self, method: str) -> bool:
        return self.method in (None, method) and method in owners_of()[self.key]


@dataclass(frozen=True)
class Plan:
    """What a sweep runs: methods x grid x seeds, separately for every combination of `over`.

    Attributes:
        base: options that all runs share; its method and seed are replaced.
        methods: names of methods.
        seeds: every setting is run with each; the mean of their validation accuracies counts.
        grid: axes that validation chooses from.
        over: axes that are conditions: each combination gets a choice of its own.
    """

    base: Mapping[str, Any]
    methods: tuple[str, ...]
    seeds: tuple[int, ...]
    grid: tuple[Axis, ...] = ()
    over: tuple[Axis, ...] = ()

    def __post_init__(self) -> None:
        for axis in self.grid:
            settings = [
                setting
                for condition in self.conditions()
                for method in self.methods
                if axis.applies_to(method)
                for setting in self.settings(method, condition)
            ]
            felt = any(axis.key in setting for setting in settings)
            if not felt or (axis.key in CDR_OPTIONS and "cdr" not in self.values_of("robust")):
                raise UserError(
                    f"`grid` {axis.key}: changes no run of {' and '.join(self.methods)}; leave it "
                    "out, or add what it belongs to (its method to `methods`, `robust` cdr, "
                    "`robust_on` all)"
                )

    def values_of(self, key: str) -> set[Any]:
        """Every value that an option takes in some run."""
        axes = [axis.values for axis in (*self.grid, *self.over) if axis.key == key]
        return {self.base[key]}.union(*axes)

    def configs(self) -> list[RunConfig]:
        """Of every run with the first seed."""
        return [
            run_of(self.base, method=method, seed=self.seeds[0], **condition | setting)
            for condition in self.conditions()
            for method in self.methods
            for setting in self.settings(method, condition)
        ]

    def conditions(self) -> list[Setting]:
        return _combinations(self.over)

    def settings(self, method: str, condition: Setting | None = None) -> list[Setting]:
        """The grid of one method.

        An axis of the method's own stands in for one that holds for all. Left out is what the
        method does not have or, under a condition, does not feel: robust training of implicit
        layers leaves methods without any alone.
        """
        axes = [axis for axis in self.grid if axis.applies_to(method)]
        own = {axis.key for axis in axes if axis.method is not None}
        found: list[Setting] = []
        for setting in _combinations([a for a in axes if a.method or a.key not in own]):
            values = {"robust_on": self.base["robust_on"]} | (condition or {}) | setting
            if not METHODS[method].implicit and values["robust_on"] == "implicit":
                inert = ("robust", *CDR_OPTIONS)
                setting = {key: value for key, value in setting.items() if key not in inert}
            if setting not in found:
                found.append(setting)
        return found


@dataclass
class _Row:
    """One setting of one method under one condition, with its cells."""

    condition: Setting
    method: str
    setting: Setting
    cells: list[Cell] = field(default_factory=list)


def _combinations(axes: Sequence[Axis]) -> list[Setting]:
    keys = [axis.key for axis in axes]
    values = itertools.product(*(axis.values for axis in axes))
    return [dict(zip(keys, chosen, strict=True)) for chosen in values]


def parse_axis(option: str, text: str) -> Axis:
    """`lr=0.01,0.03` or, for one method alone, `lion.hidden=4,8`.

    Args:
        option: the option's name, for the message.
        text: what the user wrote. `all` (for shots), `none` or `default` stand for None where an
            option may be left open and has no value of that name.

    Raises:
        UserError: not an axis, no such option, or values that are not of its type.
    """
    name, equals, listed = text.partition("=")
    method, dot, key = name.strip().rpartition(".")
    key = key.replace("-", "_")
    if not equals or not key or not listed.strip():
        raise UserError(f"{option}: expected OPTION=VALUE,VALUE such as lr=0.01,0.03, got '{text}'")
    if dot:
        choose(option, method, METHODS)
    kinds = option_kinds()
    choose(option, key, [*kinds, "method"])
    if key in ("method", "seed"):
        raise UserError(f"{option}: {key} has an option of its own, `{key}s`")
    owners = owners_of()[key]
    if dot and method not in owners:
        have = "has" if len(owners) == 1 else "have"
        raise UserError(f"{option}: {method} has no option {key}, {' and '.join(owners)} {have}")
    parts = [part.strip() for part in listed.split(",")]
    values = tuple(_parse(option, key, kinds[key], part) for part in parts)
    if len(set(values)) < len(values):
        raise UserError(f"{option}: {key} has a value twice in '{listed}'")
    return Axis(key, values, method or None)


def _parse(option: str, key: str, kinds: tuple[type, ...], text: str) -> Any:
    inner = [one for one in kinds if one is not type(None)]
    if (
        inner != list(kinds)
        and text in ("all", "none", "default")
        and not (str in inner and text == "none")
    ):
        return None
    if bool in inner:
        if text.lower() in ("true", "false"):
            return text.lower() == "true"
        raise UserError(f"{option}: {key} expects true or false, got '{text}'")
    for one in inner:
        try:
            return one(text)
        except (TypeError, ValueError):
            continue
    names = " or ".join(one.__name__ for one in inner)
    raise UserError(f"{option}: {key} expects {names}, got '{text}'")


def run_sweep(
    folder: Path,
    plan: Plan,
    runner: CellRunner,
    *,
    test_best: bool = False,
    test_seeds: Sequence[int] = (),
    overwrite: bool = False,
    on_cells: Callable[[Sequence[Cell]], OnEvent] = lambda cells: lambda event: None,
) -> dict[str, Any]:
    """Run what is missing of a grid, choose by validation, and write what came out.

    That is sweep.json and sweep.png, and once the test set has been read tested.md and tested.png.

    Args:
        folder: holds one run for each cell; several commands, on several machines, may share it.
        plan: the grid.
        runner: what runs the cells.
        test_best: read the test set with the chosen setting of every method and condition; the
            test set of no other setting is read.
        test_seeds: seeds of the tested runs, which are trained where they are not there yet;
            empty means the sweep's own.
        overwrite: replace runs with other options.
        on_cells: given the cells of each of the two phases, gives what to call with their events.

    Returns:
        The content of sweep.json: `options`, `seeds`, `cells`, `settings` (best first), `chosen`,
        `tested` and `failed`.
    """
    rows = _rows(folder, plan, plan.seeds)
    cells = [cell for row in rows for cell in row.cells]
    check_cells(cells, overwrite)
    for options in plan.conditions():
        new = [r for r in rows if r.condition == options and not r.cells[0].folder.exists()]
        for method in dict.fromkeys(row.method for row in new):  # before anything has run
            base = run_of(plan.base, method=method, seed=plan.seeds[0], **options)
            Run(folder / method, base, bench=runner.bench).check(anew=True)
    make_folder(folder)  # where nothing can be written, nothing is trained
    outcome = runner.run(cells, on_cells(cells))
    results = dict(zip((cell.folder for cell in cells), outcome.results, strict=True))
    settings = sorted((_summary(row, results) for row in rows), key=_rank, reverse=True)
    chosen: list[dict[str, Any]] = []
    for one in settings:
        first = all(_group(one) != _group(other) for other in chosen)
        one["chosen"] = first and one["validation_accuracy"] is not None
        if one["chosen"]:
            chosen.append(one)
    content = {
        "options": {k: v for k, v in plan.base.items() if k not in ("method", "seed")},
        "seeds": list(plan.seeds),
        "grid": [vars(axis) for axis in plan.grid],
        "over": [vars(axis) for axis in plan.over],
        "settings": settings,
        "chosen": chosen,
        "tested": [],
        "cells": [_cell_figures(cell, results[cell.folder]) for cell in cells],
        "failed": {cells[index].folder.name: why for index, why in outcome.failures.items()},
    }
    _write(folder, content)
    if test_best and not outcome.failures:
        best = [row for row in rows if (row.condition, row.method, row.setting) in
                [(one["condition"], one["method"], one["setting"]) for one in chosen]]  # fmt: skip
        final = _rows(folder, plan, test_seeds or plan.seeds, best, test=True)
        cells = [cell for row in final for cell in row.cells]
        check_cells(cells, overwrite)
        outcome = runner.run(cells, on_cells(cells))
        results = dict(zip((cell.folder for cell in cells), outcome.results, strict=True))
        content["tested"] = [_summary(row, results) for row in final]
        content["failed"] = {cells[i].folder.name: why for i, why in outcome.failures.items()}
        _write(folder, content)
    return content


def _write(folder: Path, content: dict[str, Any]) -> None:
    # Imported here: worker processes, which load this module too, draw nothing.
    from lion_models.study.plot import plot_sweep
    from lion_models.study.report import write_measured

    write_json(folder / "sweep.json", content)
    plot_sweep(folder / "sweep.png", content)
    write_measured(folder, content)


def _rows(
    folder: Path,
    plan: Plan,
    seeds: Sequence[int],
    only: Sequence[_Row] | None = None,
    test: bool = False,
) -> list[_Row]:
    rows = only
    if rows is None:
        rows = [
            _Row(condition, method, setting)
            for condition in plan.conditions()
            for method in plan.methods
            for setting in plan.settings(method, condition)
        ]
    made = []
    names: set[str] = set()
    for row in rows:
        cells = []
        for seed in seeds:
            # A setting last: an axis of one method may narrow what holds for all.
            options = row.condition | row.setting
            config = run_of(plan.base, method=row.method, seed=seed, **options).resolved()
            parts = [row.method, *(f"{key}={short_value(value)}" for key, value in options.items())]
            name = "-".join([*parts, f"s{seed}"])
            if name in names:
                raise UserError(
                    f"two runs of the sweep would be called '{name}'; leave out what is there "
                    "twice, or rename one's data"
                )
            names.add(name)
            cells.append(Cell(folder / name, config, test))
        made.append(_Row(row.condition, row.method, row.setting, cells))
    return made


def short_value(value: Any) -> str:
    """A value of an option as names of runs and tables show it."""
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, str):
        return Path(value).name.removesuffix(".safetensors").replace(":", "-") or "_"
    return "open" if value is None else str(value)


def _summary(row: _Row, results: Mapping[Path, dict[str, Any] | None]) -> dict[str, Any]:
    """Mean over the seeds; None for accuracies of a setting that a seed is missing of."""
    found = [result for cell in row.cells if (result := results[cell.folder]) is not None]
    whole = len(found) == len(row.cells)

    def mean(key: str) -> float | None:
        return statistics.fmean(result[key] for result in found) if whole else None

    def spread(values: list[float]) -> float | None:
        return statistics.stdev(values) if whole and len(values) > 1 else None

    summary: dict[str, Any] = {
        "condition": row.condition,
        "method": row.method,
        "setting": row.setting,
        "runs": [cell.folder.name for cell in row.cells],
        "validation_accuracy": mean("validation_accuracy"),
        "validation_spread": spread([result["validation_accuracy"] for result in found]),
        "validation_loss": mean("validation_loss"),
        "seconds": mean("seconds"),
        "parameters": found[0]["parameters"] if found else None,
    }
    if row.cells[0].test:
        tests = [result["test"] for result in found]
        accuracies = [test["accuracy"] for test in tests]
        summary["test_accuracy"] = statistics.fmean(accuracies) if whole else None
        summary["test_spread"] = spread(accuracies)
        summary["tests"] = tests
    return summary


def _rank(setting: dict[str, Any]) -> tuple[float, float]:
    accuracy = setting["validation_accuracy"]
    return (-1.0, 0.0) if accuracy is None else (accuracy, -setting["validation_loss"])


def _group(setting: dict[str, Any]) -> tuple[Setting, str]:
    return setting["condition"], setting["method"]


def _cell_figures(cell: Cell, result: dict[str, Any] | None) -> dict[str, Any]:
    keys = ("method", "seed", "best_epoch", "epochs", "validation_accuracy", "validation_loss",
            "seconds", "parameters", "solver")  # fmt: skip
    found = {} if result is None else {key: result[key] for key in keys if key in result}
    return {"run": cell.folder.name, "recipe": cell.config.recipe._asdict()} | found
