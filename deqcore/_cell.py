"""What a cell is made of, so that no recording of it is replayed when any of that has changed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as module_hooks

_OF_MODULE = frozenset(vars(nn.Module()))
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_VALUES = (bool, int, float, complex, str, bytes, type(None))
_GONE = object()


class Cell:
    """The modules of a cell, as they were found.

    Attributes:
        modules: the cell and all modules in it.
        parameters: all tensors that they train, each once.
    """

    def __init__(self, cell: nn.Module) -> None:
        self.cell = cell
        self.modules = list(cell.modules())
        self.parameters = list(cell.parameters())
        found = [names for m in self.modules for names in (m._modules, m._parameters)]
        self._parts = [(names, name, part) for names in found for name, part in names.items()]
        self._sizes = [(names, len(names)) for names in found]
        self._hooks = [getattr(m, name) for m in self.modules for name in _HOOKS]

    def is_still(self, cell: object) -> bool:
        """Whether ``cell`` is this one, of the same modules and parameters."""
        if cell is not self.cell:
            return False
        for names, name, part in self._parts:
            if names.get(name) is not part:
                return False
        return all(len(names) == size for names, size in self._sizes)

    @property
    def is_hooked(self) -> bool:
        """Whether someone listens to its calls."""
        return any(self._hooks) or module_hooks._has_any_global_hook()

    def mode(self, grad: bool) -> tuple[bool, ...]:
        """Its modules' training modes, and what wants a gradient."""
        modes = [m.training for m in self.modules]
        if grad:
            modes += [p.requires_grad for p in self.parameters]
        return tuple(modes)

    def why_not(self) -> str | None:
        """Why it is never recorded, or None."""
        for module in self.modules:
            if isinstance(module, torch.jit.ScriptModule):
                return "it is a program of TorchScript"
            if type(module).__name__ == "OptimizedModule" or module._compiled_call_impl:
                return "it is compiled"
        if any(type(p) is not nn.Parameter for p in self.parameters):
            return "its parameters are of a class of their own"
        return None

    def on_stand_ins(self) -> tuple[Callable[..., Any], dict[Tensor, Tensor]]:
        """The cell as a function of other tensors in its parameters' memory, and which those are.

        Hooks of the parameters, and nodes of autograd that hold on to them and to the stream on
        which they were made, have no part in what is recorded then.
        """
        made: dict[int, nn.Parameter] = {}
        names: dict[str, Tensor] = {}
        for name, p in self.cell.named_parameters(remove_duplicate=False):
            if id(p) not in made:
                made[id(p)] = nn.Parameter(p.detach(), requires_grad=p.requires_grad)
            names[name] = made[id(p)]

        def call(*args: Any) -> Any:
            return torch.func.functional_call(self.cell, names, args)

        return call, {made[id(p)]: p for p in self.parameters}


class Snapshot:
    """The memory of a cell's parameters, its buffers and attributes, as a recording read them.

    What attributes refer to is compared by identity, numbers and strings by value, lists, tuples,
    sets and dictionaries by their items.
    """

    def __init__(self, cell: Cell) -> None:
        self._items: list[tuple[dict[str, Any], str, Any]] = []
        self._sizes: list[tuple[dict[str, Any], int]] = []
        for module in cell.modules:
            buffers, own = module._buffers, vars(module)
            self._items += [(buffers, name, value) for name, value in buffers.items()]
            self._items += [(own, k, value) for k, value in own.items() if k not in _OF_MODULE]
            self._sizes += [(buffers, len(buffers)), (own, len(own))]
        values = [*cell.parameters, *(value for _, _, value in self._items)]
        self._tensors = [(t, t.data_ptr()) for t in values if isinstance(t, Tensor)]
        self._containers = [
            (value, inside) for value in values if (inside := _inside(value)) is not None
        ]

    def holds(self) -> bool:
        """Whether all is as it was; tensors may have other values in the same memory."""
        for found, name, value in self._items:
            now = found.get(name, _GONE)
            if now is not value and not _same_value(now, value):
                return False
        return (
            all(len(found) == size for found, size in self._sizes)
            and all(tensor.data_ptr() == address for tensor, address in self._tensors)
            and all(_all_are(_inside(c), inside) for c, inside in self._containers)
        )

    def put_back(self) -> None:
        """Undo what calls have done to attributes, as one that fails to be recorded."""
        for container, inside in self._containers:
            if not _all_are(_inside(container), inside):
                _refill(container, inside)
        kept: dict[int, set[str]] = {id(found): set() for found, _ in self._sizes}
        for found, name, value in self._items:
            kept[id(found)].add(name)
            if found.get(name, _GONE) is not value:
                found[name] = value
        for found, size in self._sizes:
            if len(found) != size:
                for name in set(found) - kept[id(found)] - _OF_MODULE:
                    del found[name]


def _refill(container: Any, inside: list[Any]) -> None:
    if isinstance(container, list):
        container[:] = inside
    elif isinstance(container, dict):
        half = len(inside) // 2
        container.clear()
        container.update(zip(inside[:half], inside[half:], strict=True))
    elif isinstance(container, set):
        container.clear()
        container.update(inside)


def _same_value(a: object, b: object) -> bool:
    return type(a) is type(b) and type(a) in _VALUES and a == b


def _inside(value: object) -> list[Any] | None:
    if isinstance(value, dict):
        return [*value.keys(), *value.values()]
    if isinstance(value, list | tuple | set | frozenset):
        return list(value)
    return None


def _all_are(now: list[Any] | None, then: list[Any]) -> bool:
    assert now is not None
    return len(now) == len(then) and all(
        a is b or _same_value(a, b) for a, b in zip(now, then, strict=True)
    )
