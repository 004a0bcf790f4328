"""A call of an implicit layer as an op can take it: tensors, numbers, and the rest as text.

What is here is traced by torch.compile, so it is plain Python of loops, lists and dictionaries.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

_INTEGER, _NUMBER = "b'i'", "b'f'"  # no argument is written so: bytes are none of the kinds below
_CONSTANTS = (bool, str, type(None))


def is_plain(tree: Any) -> bool:
    """Whether it is made of tensors, numbers, strings, None, lists, tuples and dictionaries."""
    if isinstance(tree, Tensor) or type(tree) in (int, float, *_CONSTANTS):
        return True
    if type(tree) in (list, tuple):
        return all(is_plain(item) for item in tree)
    if type(tree) is dict:
        return all(type(key) in (int, str) and is_plain(item) for key, item in tree.items())
    return False


@dataclass
class Parts:
    """What of a call's arguments is no text, in the order in which it comes."""

    tensors: list[Tensor] = field(default_factory=list)
    integers: list[int] = field(default_factory=list)
    numbers: list[float] = field(default_factory=list)

    def text_of(self, tree: Any) -> str:
        """The tree as a literal with places for its parts, which are put aside here."""
        if isinstance(tree, Tensor):
            self.tensors.append(tree)
            return "..."
        if type(tree) is int:  # may be a size, or a number that differs from call to call
            self.integers.append(tree)
            return _INTEGER
        if type(tree) is float:
            self.numbers.append(tree)
            return _NUMBER
        if type(tree) is list:
            return "[" + "".join([self.text_of(item) + "," for item in tree]) + "]"
        if type(tree) is tuple:
            return "(" + "".join([self.text_of(item) + "," for item in tree]) + ")"
        if type(tree) is dict:
            items = [repr(key) + ":" + self.text_of(item) + "," for key, item in tree.items()]
            return "{" + "".join(items) + "}"
        return repr(tree)


class Filling:
    """The tree of a literal again, with parts at their places."""

    def __init__(
        self,
        tensors: Sequence[Tensor],
        integers: Sequence[int] = (),
        numbers: Sequence[float] = (),
    ) -> None:
        places = {...: tensors, b"i": integers, b"f": numbers}
        self._parts: dict[Any, Iterator[Any]] = {at: iter(parts) for at, parts in places.items()}

    def fill(self, literal: Any) -> Any:
        if literal is ... or isinstance(literal, bytes):
            return next(self._parts[literal])
        if isinstance(literal, (list, tuple)):
            return type(literal)([self.fill(item) for item in literal])
        if isinstance(literal, dict):
            return {key: self.fill(item) for key, item in literal.items()}
        return literal


def refilled(tree: Any, tensors: list[Tensor]) -> Any:
    """``tree`` with these tensors in place of its own; traced, unlike ``Filling``."""
    if isinstance(tree, Tensor):
        return tensors.pop(0)
    if type(tree) in (list, tuple):
        return type(tree)([refilled(item, tensors) for item in tree])
    if type(tree) is dict:
        return {key: refilled(item, tensors) for key, item in tree.items()}
    return tree


class Call(NamedTuple):
    """What the op is told of a call besides tensors and numbers; its text is the same in any
    process, so that what was compiled may be kept and loaded."""

    arguments: Any  # literal of (z0, args)
    state: int  # tensors of the state: the first ones
    grad: bool  # grad mode
    autocast: tuple[str, str] | None  # device type, and dtype
    updated: tuple[int, ...]  # of what the cell holds, what it may change
    draws: bool  # masks, which the state of a generator decides about

    @classmethod
    def read(cls, text: str) -> Call:
        arguments, about = ast.literal_eval(text)
        return cls(arguments, *about)


class Held(NamedTuple):
    """A tensor of a cell, and where it is found."""

    place: dict[str, Any]
    name: str
    tensor: Tensor
    may_change: bool  # a buffer of a module in training mode


def attribute_names(cell: nn.Module) -> tuple[tuple[int, str], ...]:
    """The tensors that its modules have as plain attributes: a module's number, and the name."""
    return tuple(
        (number, name)
        for number, module in enumerate(cell.modules())
        for name, value in vars(module).items()
        if isinstance(value, Tensor)
    )


def held_tensors(cell: nn.Module, attributes: tuple[tuple[int, str], ...]) -> list[Held]:
    """All parameters, buffers and ``attributes`` of its modules, each tensor once.

    The names of attributes are given, since whoever traces a look at one that is no tensor makes a
    program that holds for its value alone.
    """
    found: list[Held] = []
    seen: set[Tensor] = set()
    modules = list(cell.modules())
    places: list[tuple[dict[str, Any], list[str], bool]] = []
    for module in modules:
        places.append((module._parameters, list(module._parameters), False))
        places.append((module._buffers, list(module._buffers), module.training))
    for number, name in attributes:
        places.append((modules[number].__dict__, [name], False))
    for place, names, may_change in places:
        for name in names:
            tensor = place[name]
            if tensor is not None and tensor not in seen:
                seen.add(tensor)
                found.append(Held(place, name, tensor, may_change))
    return found


def autocast_of(device: torch.device) -> tuple[str, str] | None:
    kind = device.type
    if not torch.is_autocast_enabled(kind):
        return None
    return kind, str(torch.get_autocast_dtype(kind)).removeprefix("torch.")
