"""Validated options: frozen, keyword-only dataclasses, and checks that name the option."""

from __future__ import annotations

import dataclasses
import difflib
import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor
from typing_extensions import dataclass_transform

Damping = float | Callable[[int], float]
T = TypeVar("T")


@dataclass_transform(frozen_default=True, kw_only_default=True)
def options(cls: type[T]) -> type[T]:
    """A frozen, keyword-only dataclass whose constructor names the option a typo was meant for."""
    decorated = dataclass(frozen=True, kw_only=True)(cls)
    fields = [field.name for field in dataclasses.fields(decorated)]  # type: ignore[arg-type]  # it is a dataclass now
    generated = decorated.__init__

    def checked(self: Any, *args: Any, **kwargs: Any) -> None:
        if args:
            raise TypeError(
                f"{cls.__name__}: options are keywords, as in {cls.__name__}({fields[0]}=...)"
            )
        for name in kwargs:
            if name not in fields:
                close = difflib.get_close_matches(name, fields, n=1)
                hint = f"did you mean {close[0]!r}? " if close else ""
                raise TypeError(
                    f"{cls.__name__}: unknown option {name!r}; {hint}Options: {', '.join(fields)}"
                )
        generated(self, **kwargs)

    decorated.__init__ = functools.wraps(generated)(checked)  # type: ignore[method-assign]  # meant
    return decorated


def require_int(owner: object, name: str, low: int, high: int | None = None) -> None:
    value = getattr(owner, name)
    if isinstance(value, bool) or not isinstance(value, int):
        raise ValueError(_message(owner, name, "an integer", value))
    if value < low or (high is not None and value > high):
        bound = f"at least {low}" if high is None else f"between {low} and {high}"
        raise ValueError(_message(owner, name, f"an integer {bound}", value))


def require_number(
    owner: object, name: str, low: float, high: float = math.inf, *, above: bool = False
) -> None:
    """``low`` is allowed unless ``above``; ``high`` is allowed; NaN never."""
    value = getattr(owner, name)
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise ValueError(_message(owner, name, "a number", value))
    if not (low < value if above else low <= value) or not value <= high:
        bound = f"above {low:g}" if above else f"of at least {low:g}"
        bound += f" and at most {high:g}" if high < math.inf else ""
        raise ValueError(_message(owner, name, f"a number {bound}", value))


def require_bool(owner: object, name: str) -> None:
    value = getattr(owner, name)
    if not isinstance(value, bool):
        raise ValueError(_message(owner, name, "True or False", value))


def require_damping(owner: Any) -> None:
    if not callable(owner.damping):
        require_number(owner, "damping", 0.0, 2.0, above=True)


def require_history_dtype(owner: Any) -> None:
    value = owner.history_dtype
    if value not in (None, torch.bfloat16):
        expected = "None (the iterate's own) or torch.bfloat16, which has float32's range"
        raise ValueError(_message(owner, "history_dtype", expected, value))


def storage_dtype(owner: Any, x: Tensor) -> torch.dtype:
    """In which the solver ``owner`` keeps its history of iterates like ``x``."""
    dtype: torch.dtype | None = owner.history_dtype
    if dtype is not None and x.dtype != torch.float32:
        raise ValueError(
            f"{type(owner).__name__}: history_dtype={dtype} needs a float32, bfloat16 or float16 "
            f"state, got one that is solved in {x.dtype}; leave history_dtype at None"
        )
    return x.dtype if dtype is None else dtype


def _message(owner: object, name: str, expected: str, value: object) -> str:
    return f"{type(owner).__name__}: {name} must be {expected}, got {value!r}"
