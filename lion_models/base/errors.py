"""The one exception that the command line shows without a traceback."""

from __future__ import annotations

import difflib
import functools
import types
import typing
from collections.abc import Iterable
from dataclasses import fields
from typing import Any

__all__ = ["UserError", "check_types", "choose", "did_you_mean"]

_WORDS = {str: "a text", int: "a whole number", float: "a number", bool: "True or False",
          type(None): "None"}  # fmt: skip


class UserError(ValueError):
    """Something the user can put right: says what was expected, what came, and what to do next.

    Options stand in the message by their names in Python between backticks: `robust_on`. The
    command line shows them as it spells them.
    """


def choose(option: str, value: str, known: Iterable[str]) -> str:
    """Return `value` if it is one of `known`, else raise with the nearest spelling.

    Args:
        option: the option's name, for the message; a field's or an argument's, in which the command
            line sees its own, or any other text.
        value: what the user wrote.
        known: every value that is allowed.
    """
    names = sorted(known)
    if value in names:
        return value
    hint = did_you_mean(value, names)
    shown = f"`{option}`" if option.isidentifier() else option
    raise UserError(f"{shown}: expected one of {', '.join(names)}, got '{value}'{hint}")


def did_you_mean(value: str, known: Iterable[str], before: str = "") -> str:
    """The end of a message that names the nearest spelling; empty where none is near.

    Args:
        value: what the user wrote.
        known: every value that is allowed.
        before: stands before the value, `timm:` for instance.
    """
    near = difflib.get_close_matches(value, list(known), n=1)
    return f"; did you mean '{before}{near[0]}'?" if near else ""


def check_types(options: Any) -> None:
    """Raise UserError where a field of a dataclass of options is not of its annotated type.

    Args:
        options: its fields are str, int, float or bool, or a union of those and None. A whole
            number stands for a float, a bool for nothing else.
    """
    kind: Any = type(options)  # mypy does not take a type[Any] for hashable
    for name, kinds in _kinds(kind):
        value = getattr(options, name)
        if type(value) in kinds or (type(value) is int and float in kinds):
            continue
        if not isinstance(value, bool) and isinstance(value, kinds):  # numpy's float64, say
            continue
        expected = " or ".join(_WORDS[kind] for kind in kinds)
        raise UserError(f"`{name}`: expected {expected}, got {value!r}")


@functools.cache
def _kinds(options: type) -> list[tuple[str, tuple[type, ...]]]:
    """The types that each field may have; resolving annotations takes longer than all checks."""
    hints = typing.get_type_hints(options)
    return [
        (each.name, typing.get_args(kind) if isinstance(kind, types.UnionType) else (kind,))
        for each in fields(options)
        for kind in [hints[each.name]]
    ]
