"""The one exception that the command line shows without a traceback."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

__all__ = ["UserError", "choose"]


class UserError(ValueError):
    """Something the user can put right: says what was expected, what came, and what to do next."""


def choose(option: str, value: str, known: Iterable[str]) -> str:
    """Return `value` if it is one of `known`, else raise with the nearest spelling.

    Args:
        option: the option's name, for the message.
        value: what the user wrote.
        known: every value that is allowed.
    """
    names = sorted(known)
    if value in names:
        return value
    near = difflib.get_close_matches(value, names, n=1)
    hint = f"; did you mean '{near[0]}'?" if near else ""
    raise UserError(f"{option}: expected one of {', '.join(names)}, got '{value}'{hint}")
