"""The one exception that the command line shows without a traceback."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence

__all__ = ["UserError", "choose", "did_you_mean", "few"]

LONGEST_NAME = 60


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


def few(names: Sequence[str], most: int = 5) -> str:
    """The first of many names for a message, long ones cut, and how many more there are."""
    shown = [f"{name[:LONGEST_NAME]}…" if len(name) > LONGEST_NAME else name for name in names]
    left = len(names) - most
    return ", ".join(shown[:most]) + (f" and {left} more" if left > 0 else "")
