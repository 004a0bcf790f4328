"""What a study runs: methods, seeds, a grid to choose from, and conditions to choose under."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lion_models.base.errors import UserError, choose
from lion_models.methods import METHODS
from lion_models.prompts.config import CDR_OPTIONS
from lion_models.run.config import RunConfig, option_kinds, owners_of, run_of
from lion_models.study.trial import Trial

__all__ = ["Axis", "Plan", "Row", "parse_axis", "short_value"]

Setting = dict[str, Any]


@dataclass(frozen=True)
class Axis:
    """One option and the values to try.

    Attributes:
        key: name of an option of runs.
        values: in the order of the user.
        method: the only method that it applies to; None means every method that has the option.
    """

    key: str
    values: tuple[Any, ...]
    method: str | None = None

    def applies_to(self, method: str) -> bool:
        return self.method in (None, method) and method in owners_of()[self.key]


@dataclass(frozen=True)
class Row:
    """One setting of one method under one condition, with a trial for each seed."""

    condition: Setting
    method: str
    setting: Setting
    seeds: tuple[int, ...]
    trials: tuple[Trial, ...]


@dataclass(frozen=True)
class Plan:
    """Methods x grid x seeds, separately for every combination of `over`.

    Attributes:
        base: options that all runs share; their method and seed are replaced.
        methods: names of methods.
        seeds: every setting is run with each.
        grid: axes that validation chooses from.
        over: axes that are conditions: each combination gets a choice of its own.
        each_seed: a setting is chosen for each seed alone; otherwise the mean over the seeds
            chooses one for all.
    """

    base: Mapping[str, Any]
    methods: tuple[str, ...]
    seeds: tuple[int, ...]
    grid: tuple[Axis, ...] = ()
    over: tuple[Axis, ...] = ()
    each_seed: bool = False

    def __post_init__(self) -> None:
        for axis in self.grid:
            felt = any(
                axis.key in setting
                for condition in self.conditions()
                for method in self.methods
                if axis.applies_to(method)
                for setting in self.settings(method, condition)
            )
            if not felt or (axis.key in CDR_OPTIONS and "cdr" not in self._values_of("robust")):
                raise UserError(
                    f"`grid` {axis.key}: changes no run of {' and '.join(self.methods)}; leave it "
                    "out, or add what it belongs to (its method to `methods`, `robust` cdr, "
                    "`robust_on` all)"
                )

    def _values_of(self, key: str) -> set[Any]:
        """Every value that an option takes in some run."""
        axes = [axis.values for axis in (*self.grid, *self.over) if axis.key == key]
        return {self.base[key]}.union(*axes)

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

    def configs(self) -> list[RunConfig]:
        """Of every run with the first seed."""
        return [
            run_of(self.base, method=method, seed=self.seeds[0], **condition | setting)
            for condition in self.conditions()
            for method in self.methods
            for setting in self.settings(method, condition)
        ]

    def rows(self, folder: Path, seeds: Sequence[int] = (), test: bool = False) -> list[Row]:
        """Every setting with its trials.

        Args:
            folder: holds the runs.
            seeds: others than the plan's own.
            test: whether the trials read their test sets.

        Raises:
            UserError: two runs would have one name, or an option has a value that is not allowed.
        """
        seeds = tuple(seeds) or self.seeds
        rows = [
            Row(condition, method, setting, part, tuple(
                self._trial(folder, condition | setting, method, seed, test) for seed in part
            ))
            for part in ([(seed,) for seed in seeds] if self.each_seed else [seeds])
            for condition in self.conditions()
            for method in self.methods
            for setting in self.settings(method, condition)
        ]  # fmt: skip
        names = Counter(trial.folder.name for row in rows for trial in row.trials)
        name, count = names.most_common(1)[0]
        if count > 1:
            raise UserError(
                f"two runs of the sweep would be called '{name}'; leave out what is there "
                "twice, or rename one's data"
            )
        return rows

    def _trial(self, folder: Path, options: Setting, method: str, seed: int, test: bool) -> Trial:
        config = run_of(self.base, method=method, seed=seed, **options).resolved()
        shown = [(key, short_value(value)) for key, value in options.items()]
        if self.each_seed:
            parts = [method, f"s{seed}", *(f"{key}{value}" for key, value in shown)]
        else:
            parts = [method, *(f"{key}={value}" for key, value in shown), f"s{seed}"]
        return Trial(folder / "-".join(parts), config, test)


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
        raise UserError(
            f"`{option}`: expected OPTION=VALUE,VALUE such as lr=0.01,0.03, got '{text}'"
        )
    if dot:
        choose(option, method, METHODS)
    kinds = option_kinds()
    choose(option, key, [*kinds, "method"])
    if key in ("method", "seed"):
        raise UserError(f"`{option}`: {key} has an option of its own, `{key}s`")
    owners = owners_of()[key]
    if dot and method not in owners:
        have = "has" if len(owners) == 1 else "have"
        raise UserError(f"`{option}`: {method} has no option {key}, {' and '.join(owners)} {have}")
    values = tuple(_parse(option, key, kinds[key], part.strip()) for part in listed.split(","))
    if len(set(values)) < len(values):
        raise UserError(f"`{option}`: {key} has a value twice in '{listed}'")
    return Axis(key, values, method or None)


def _parse(option: str, key: str, kinds: tuple[type, ...], text: str) -> Any:
    inner = [one for one in kinds if one is not type(None)]
    left_open = ("all", "default") if str in inner else ("all", "default", "none")
    if type(None) in kinds and text in left_open:
        return None
    if bool in inner:
        if text.lower() in ("true", "false"):
            return text.lower() == "true"
        raise UserError(f"`{option}`: {key} expects true or false, got '{text}'")
    for one in inner:
        try:
            return one(text)
        except (TypeError, ValueError):
            continue
    names = " or ".join(one.__name__ for one in inner)
    raise UserError(f"`{option}`: {key} expects {names}, got '{text}'")


def short_value(value: Any) -> str:
    """A value of an option as names of runs and tables show it."""
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, str):
        return Path(value).name.removesuffix(".safetensors").replace(":", "-") or "_"
    return "open" if value is None else str(value)
