"""Everything that defines a run, by concern; flat on the command line and in config.json."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

from lion_models.backbones import FrozenBackbone
from lion_models.backbones.config import BackboneConfig
from lion_models.base.errors import UserError, did_you_mean
from lion_models.base.options import Options, declared, kinds_of
from lion_models.data.config import DataConfig
from lion_models.methods.base import TunedClassifier
from lion_models.methods.lion import LionConfig
from lion_models.methods.registry import METHODS, MethodConfig, Recipe, method_named
from lion_models.prompts.config import RobustConfig
from lion_models.prompts.pruning import Pruning
from lion_models.run.training import TrainingConfig

__all__ = ["CONFIG", "GROUPS", "RunConfig", "build_model", "check_felt", "owners_of", "run_of",
           "to_write"]  # fmt: skip

CONFIG = "config.json"

# Of every method; those of one method alone are in its own group.
GROUPS: dict[str, type[Options]] = {
    "data": DataConfig,
    "backbone": BackboneConfig,
    "training": TrainingConfig,
    "robust": RobustConfig,
}


@dataclass(frozen=True)
class RunConfig:
    """One training run; `RunConfig.of` makes it of options by their own names."""

    data: DataConfig
    backbone: BackboneConfig = field(default_factory=BackboneConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    robust: RobustConfig = field(default_factory=RobustConfig)
    method: MethodConfig = field(default_factory=LionConfig)

    def __post_init__(self) -> None:
        object.__setattr__(self, "method", self.method.on(self.backbone.backbone))
        if self.backbone.checkpoint_backbone and self.method.tunes_copies:
            raise UserError(
                "`checkpoint_backbone`: saves the activations of frozen blocks; "
                f"'{self.method.name}' trains them; leave the option out"
            )
        self.method.pruning(self.training.epochs)

    @classmethod
    def of(cls, data: str, method: str = "lion", **given: Any) -> RunConfig:
        """The run that options define by their own names, all others at their defaults.

        Args:
            data: what `open_source` takes.
            method: one of `METHODS`.
            given: any option of `GROUPS` or of the method.

        Raises:
            UserError: a value that is not allowed, or an option that would change nothing.
        """
        config = cls._made({"data": data, "method": method} | given)
        _check_owned(given, [config])
        check_felt(given, [config])
        return config

    def but(self, **given: Any) -> RunConfig:
        """The same run with other values of options; of another method, the options it shares."""
        config = self._made(self.options() | given)
        _check_owned(given, [config])
        return config

    def options(self) -> dict[str, Any]:
        """Every option by its own name."""
        groups = (getattr(self, each.name) for each in fields(self))
        flat = {each.name: getattr(g, each.name) for g in groups for each in fields(g)}
        return {"data": flat.pop("data"), "method": self.method.name} | flat

    def to_dict(self) -> dict[str, Any]:
        """The options as config.json has them."""
        return to_write(self.options())

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> RunConfig:
        """The inverse of `to_dict`; those of other methods are left out.

        Raises:
            UserError: an unknown name, or a value that is not allowed.
        """
        unknown = sorted(set(values) - set(owners_of()) - {"method"})
        if unknown:
            raise UserError(
                f"run configuration: unknown keys {', '.join(unknown)}; the run was "
                "written by another version"
            )
        return cls._made(values)

    @classmethod
    def stored(cls, values: Mapping[str, Any]) -> RunConfig:
        """The run of `to_dict`, read from a file of this version or an earlier one."""
        absent = {name: silent[-1] for name, silent in _silent_values().items()}
        return cls.from_dict({**absent, **values})

    @classmethod
    def _made(cls, values: Mapping[str, Any]) -> RunConfig:
        method = values.get("method", "lion")
        kinds = GROUPS | {"method": method_named(method)}
        groups: dict[str, Any] = {
            name: kind(**{each.name: values[each.name] for each in fields(kind)
                          if each.name in values})
            for name, kind in kinds.items()
        }  # fmt: skip
        return cls(**groups)

    @property
    def recipe(self) -> Recipe:
        """Learning rate, weight decay and augmentation, those left open from the method's own."""
        return self.training.recipe(self.method.own_recipe, self.data.transform)

    def resolved(self) -> RunConfig:
        """The same run with what it leaves to its method written out, so that later defaults do
        not change it."""
        return self.but(**self.recipe._asdict(), **self.method.settled())

    @property
    def pruning(self) -> Pruning | None:
        """What is pruned in training, and when; None for nothing."""
        return self.method.pruning(self.training.epochs)


def run_of(shared: Mapping[str, Any], **own: Any) -> RunConfig:
    """One run of several that share options, of which it takes those that its method has."""
    return RunConfig.from_dict({**shared, **own})


def all_options(**given: Any) -> dict[str, Any]:
    """Every option of every method by its own name, at its default where it is not given."""
    kinds = [*GROUPS.values(), *METHODS.values()]
    defaults = {each.name: each.default for kind in kinds for each in fields(kind)}
    return {**defaults, **given}


def to_write(options: Mapping[str, Any]) -> dict[str, Any]:
    """Options without those that are silent at their values; see `Declared`."""
    silent = _silent_values()
    return {name: value for name, value in options.items() if value not in silent.get(name, ())}


def _silent_values() -> dict[str, tuple[Any, ...]]:
    """The values of silent options that are not written down, by the options' names."""
    found: dict[str, tuple[Any, ...]] = {}
    for group in (*GROUPS.values(), *METHODS.values()):
        for each in fields(group):
            said = declared(each).silent
            if said:
                found[each.name] = said if isinstance(said, tuple) else (each.default,)
    return found


def option_kinds() -> dict[str, tuple[type, ...]]:
    """The types that each option may have, by its own name."""
    groups = [*GROUPS.values(), *METHODS.values()]
    return {each.name: kinds for group in groups for each, kinds in kinds_of(group)}


def owners_of() -> dict[str, list[str]]:
    """By the name of each option, the methods that have it: all, or those of whose own it is."""
    owners = {each.name: list(METHODS) for kind in GROUPS.values() for each in fields(kind)}
    for name, kind in METHODS.items():
        for each in fields(kind):
            owners.setdefault(each.name, []).append(name)
    return owners


def check_felt(given: Iterable[str], runs: Sequence[RunConfig]) -> None:
    """Refuse options that no run feels.

    Args:
        given: names of options that the user gave.
        runs: one or more.

    Raises:
        UserError: an option that is not there, of other methods, or whose `needs` no run meets.
    """
    given = [name for name in given if name != "method"]
    _check_owned(given, runs)
    for name in given:
        unmet = [_unmet(run, name) for run in runs if name in run.options()]
        if all(unmet):
            methods = dict.fromkeys(str(run.method) for run in runs)
            values = runs[0].options() | {"name": name, "method": " and ".join(methods)}
            raise UserError(f"`{name}`: {unmet[0].format_map(values)}")


def _check_owned(given: Iterable[str], runs: Sequence[RunConfig]) -> None:
    owners = owners_of() | {"method": list(METHODS)}
    names = list(dict.fromkeys(run.method.name for run in runs))
    for name in given:
        if name not in owners:
            raise UserError(f"`{name}`: there is no such option{did_you_mean(name, owners)}")
        if not set(owners[name]) & set(names):
            raise UserError(
                f"`{name}`: is an option of {' and '.join(owners[name])}, not of "
                f"{' and '.join(names)}; leave it out"
            )


def _unmet(run: RunConfig, name: str) -> str:
    """Why a run does not feel one of its options; empty where it does."""
    groups = (getattr(run, each.name) for each in fields(run))
    said = next(declared(each) for g in groups for each in fields(g) if each.name == name)
    return next((need.why for need in said.needs if not need.met(run)), "")


def build_model(config: RunConfig, backbone: FrozenBackbone, classes: int) -> TunedClassifier:
    """The classifier that a configuration names, freshly initialised from torch's generator.

    Raises:
        UserError: the backbone is not one that the method or an option can work with.
    """
    return config.method.build(config.backbone.view(backbone), classes)
