"""A recorder for the CPU that keeps to the rules of a CUDA graph: its replays run no Python of f's.

What PyTorch's dispatcher is asked for while a part is recorded is asked for again in a replay, on
the same memory. No value can be read back to the host.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from deqcore._graphs import Parts

_READS_BACK = ("aten::_local_scalar_dense", "aten::nonzero", "aten::equal")


class _Tape(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, Any, Any, Any]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func._schema.name in _READS_BACK:
            raise RuntimeError("f cannot be captured: operation not permitted")
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        returned = [of.alias_info for of in func._schema.returns]
        if not any(alias is not None and not alias.is_write for alias in returned):  # a view
            self.calls.append((func, args, kwargs, out))
        return out

    def replay(self) -> None:
        with torch._C._AutoDispatchBelowAutograd():
            for func, args, kwargs, out in self.calls:
                new = func(*args, **kwargs)
                for old, value in zip(
                    pytree.tree_leaves(out), pytree.tree_leaves(new), strict=True
                ):
                    if isinstance(old, Tensor) and old is not value:
                        old.copy_(value)


class Taped:
    """Records parts of a solve as ``deqcore._graphs.CudaGraphs`` does."""

    exits_early = True
    replays_alone = True

    def __init__(self) -> None:
        self.launches = 0

    def check(self, device: torch.device) -> None:
        pass

    @contextlib.contextmanager
    def set_up(self) -> Iterator[None]:
        yield

    def warm_up(self, run: Callable[[], Any]) -> None:
        run()

    def record(self, parts: Parts) -> Callable[[], None]:
        first, body, last = (self._tape(part) for part in (parts.first, parts.body, parts.last))

        def launch() -> None:
            self.launches += 1
            first.replay()
            for _ in range(parts.max_steps):
                body.replay()
                if not parts.remaining.item():
                    break
            last.replay()

        return launch

    def _tape(self, part: Callable[[], None] | None) -> _Tape:
        tape = _Tape()
        if part is not None:
            with tape:
                part()
        return tape
