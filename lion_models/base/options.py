"""An option is declared once: its name, type, default, help and bounds are a field's.

A group of options is a frozen dataclass. Python makes it and checks it by these declarations, and
the command line makes its options of them.
"""

from __future__ import annotations

import functools
import inspect
import math
import types
import typing
from collections.abc import Callable, Iterable, Sequence
from dataclasses import MISSING, Field, dataclass, field, fields
from typing import Any, NamedTuple

from lion_models.base.errors import UserError, choose

__all__ = ["Declared", "Need", "Options", "declared", "option"]

_WORDS = {str: "a text", int: "a whole number", float: "a number", bool: "True or False",
          type(None): "None"}  # fmt: skip

_NO_BOUNDS = "a finite number"


class Need(NamedTuple):
    """What an option belongs to, without which nobody would feel it.

    Attributes:
        met: whether the configuration of a run has it.
        why: ends the message where no run has; names of options in braces stand for their values,
            {name} for the option's own name and {method} for the methods.
    """

    met: Callable[[Any], bool]
    why: str


@dataclass(frozen=True)
class Declared:
    """What is declared beside an option's name, type and default.

    Attributes:
        help: one sentence, with its full stop.
        low, high: the least and the largest number.
        above, below: bounds that a number may not reach.
        expected: stands in the message for these bounds.
        choices: the texts that it may be.
        names: texts that it may be beside files and others, which a shell completes.
        unset: what None or nothing stands for.
        word: what the command line calls None, where that is not the default.
        needs: what it belongs to.
        silent: it is written down only where it is none of these values: what versions did that had
            no such option, and what they wrote stays what is written. True is its default alone;
            of several the last is what was not written then.
    """

    help: str
    low: float | None = None
    high: float | None = None
    above: float | None = None
    below: float | None = None
    expected: str = ""
    choices: Iterable[str] = ()
    names: Iterable[str] = ()
    unset: str = ""
    word: str = ""
    needs: Sequence[Need] = ()
    silent: bool | tuple[Any, ...] = False

    def check(self, name: str, value: Any) -> None:
        """Raise UserError for a value that is none of the choices or out of bounds."""
        if self.choices:
            choose(name, value, self.choices)
        elif isinstance(value, (int, float)) and not self._holds(value):
            expected = self.expected or self._bounds()
            instead = f"; leave it out for {self.unset}" if self.unset else ""
            raise UserError(f"`{name}`: expected {expected}, got {value}{instead}")

    def _holds(self, value: float) -> bool:
        return math.isfinite(value) and not (
            (self.low is not None and value < self.low)
            or (self.high is not None and value > self.high)
            or (self.above is not None and value <= self.above)
            or (self.below is not None and value >= self.below)
        )

    def text(self, default: Any) -> str:
        """Help, default and limits, for people."""
        said = [self.help]
        if default is MISSING:
            said.append("Required.")
        elif default is None or default == "":
            said.append(f"Default: {self.unset or default}.")
        else:
            said.append(f"Default: {default}.")
        if self.choices:
            said.append(f"One of {', '.join(self.choices)}.")
        elif (limits := self._bounds()) != _NO_BOUNDS:
            said.append(f"{self.expected or limits}.".capitalize())
        return " ".join(said)

    def _bounds(self) -> str:
        parts = [f"{self.low:,} or more"] if self.low is not None else []
        parts += [f"a number above {self.above:,}"] if self.above is not None else []
        parts += [f"{self.high:,} or less"] if self.high is not None else []
        parts += [f"below {self.below:,}"] if self.below is not None else []
        return " and ".join(parts) or _NO_BOUNDS


def option(default: Any = MISSING, help: str = "", **said: Any) -> Any:
    """A field of `Options`; without a default it has to be given. See `Declared` for the rest."""
    return field(default=default, metadata={"option": Declared(help, **said)})


def declared(each: Field[Any]) -> Declared:
    """What `option` was given for a field."""
    said: Declared = each.metadata["option"]
    return said


@dataclass(frozen=True)
class Options:
    """A group of options, checked when it is made.

    What is declared of each is a part of the group's docstring.

    Raises:
        UserError: a value of another type, none of the choices, or out of bounds.
    """

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        own = {name: each for name, each in vars(cls).items() if isinstance(each, Field)}
        if own:
            lines = [
                f"    {name}: {declared(each).text(each.default)}" for name, each in own.items()
            ]
            cls.__doc__ = "\n".join([inspect.cleandoc(cls.__doc__ or ""), "", "Args:", *lines])

    def __post_init__(self) -> None:
        for each, kinds in kinds_of(type(self)):
            value = getattr(self, each.name)
            _check_type(each.name, value, kinds)
            if value is not None:
                declared(each).check(each.name, value)
        self.check()

    def check(self) -> None:
        """Conditions between options of the group, for it to override."""


def kinds_of(group: type[Options]) -> list[tuple[Field[Any], tuple[type, ...]]]:
    """The fields of a group and the types that each may have.

    They are str, int, float or bool, or a union of those and None.
    """
    kind: Any = group
    return _kinds_of(kind)


@functools.cache
def _kinds_of(group: Any) -> list[tuple[Field[Any], tuple[type, ...]]]:
    # Cached, as to resolve annotations takes longer than all checks. (mypy takes a class whose
    # instances are hashable for one that is not.)
    hints = typing.get_type_hints(group)
    return [
        (each, typing.get_args(kind) if isinstance(kind, types.UnionType) else (kind,))
        for each in fields(group)
        for kind in [hints[each.name]]
    ]


def _check_type(name: str, value: Any, kinds: tuple[type, ...]) -> None:
    """A whole number stands for a float, a bool for nothing else."""
    if type(value) in kinds or (type(value) is int and float in kinds):
        return
    if not isinstance(value, bool) and isinstance(value, kinds):  # numpy's float64, say
        return
    expected = " or ".join(_WORDS[kind] for kind in kinds)
    raise UserError(f"`{name}`: expected {expected}, got {value!r}")
