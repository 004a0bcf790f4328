"""Dense weights of kept values, filled once for as long as the values are what they were.

A weight is kept beside its values while these are evaluated without their gradient: in the
evaluations of a solve, and in inference. It goes with the values, and when they change in place
(their version counter says so), move, or are evaluated with their gradient, after which a training
step changes them. Not seen are writes that no counter counts, through ``values.data`` or by the
replay of a CUDA graph, between two evaluations without a gradient.
"""

from __future__ import annotations

import contextlib
import threading
import weakref
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from deqcore.ops import masked_dense
from deqcore.ops._library import is_transformed
from deqcore.sparse.pattern import SparsityPattern


class _Kept:
    """A dense weight, and what it is of."""

    __slots__ = (
        "address", "alias", "backend", "dtype", "gpu", "pattern", "served", "stream", "values",
        "version", "weight",
    )  # fmt: skip

    def __init__(self, values: Tensor, pattern: SparsityPattern, dtype: torch.dtype) -> None:
        key = id(values)
        self.values = weakref.ref(values, lambda _: _kept.pop(key, None))
        self.version, self.address = values._version, values.data_ptr()
        self.alias = values.detach()  # no other tensor gets their memory meanwhile
        self.pattern, self.dtype = pattern, dtype
        self.gpu = values.device.index if values.is_cuda else None
        # On which it was filled, and is used.
        self.stream = 0 if self.gpu is None else torch._C._cuda_getCurrentRawStream(self.gpu)
        self.weight = pattern.to_dense(values.to(dtype))
        # Shapes of x that it has served, in calls with this backend.
        self.served: set[torch.Size] = set()
        self.backend: str | None = None

    def is_of(self, values: Tensor, pattern: SparsityPattern) -> bool:
        return (
            self.values() is values
            and self.version == values._version
            and self.pattern is pattern
            and self.address == values.data_ptr()
            and (self.gpu is None or self.stream == torch._C._cuda_getCurrentRawStream(self.gpu))
        )


_kept: dict[int, _Kept] = {}  # by id of the values
_SHAPES = 256  # that are noted of one weight


class _Local(threading.local):
    solve: SolveWeights | None = None


_local = _Local()


def dense_weight(values: Tensor, pattern: SparsityPattern, dtype: torch.dtype) -> Tensor:
    """``pattern.to_dense(values.to(dtype))``, [rows, columns], which is not to be changed."""
    solve = _local.solve
    if solve is not None and isinstance(values, nn.Parameter):  # others f may compute each time
        return _with_gradient(solve.weight(values, pattern, dtype), values, pattern)
    trained = values.requires_grad and torch.is_grad_enabled()
    found = _kept.get(id(values))
    if (trained and found is None) or not _may_keep(values, pattern):
        return pattern.to_dense(values.to(dtype))
    if found is None or found.dtype is not dtype or not found.is_of(values, pattern):
        _kept.pop(id(values), None)  # its memory may serve for the new one
        if trained:
            return pattern.to_dense(values.to(dtype))
        with torch.inference_mode(False), torch.no_grad():  # a later graph may save the weight
            found = _kept[id(values)] = _Kept(values, pattern, dtype)
    if not trained:
        return found.weight
    _kept.pop(id(values), None)
    return _with_gradient(found.weight, values, pattern)


def note_served(values: Tensor, shape: torch.Size, backend: str) -> None:
    """That a call has used the weight of ``values``, so that ``served`` knows the next one."""
    found = _kept.get(id(values))
    if found is None or found.dtype is not values.dtype:
        return
    if found.backend != backend or len(found.served) >= _SHAPES:
        found.backend, found.served = backend, set()
    found.served.add(shape)


def served(
    values: Tensor, pattern: SparsityPattern, shape: torch.Size, backend: str
) -> Tensor | None:
    """The kept weight for a call like one before, if all that decided then is as it was.

    What products look at themselves is left to them: devices, dtypes, and wrappers of torch.func.
    """
    found = _kept.get(id(values))
    if (
        found is None
        or shape not in found.served
        or found.backend != backend
        or not found.is_of(values, pattern)
        or (values.requires_grad and torch.is_grad_enabled())
        or torch._C._is_any_autocast_enabled()
        or torch._C._len_torch_dispatch_stack()
        or (found.stream and torch.cuda.is_current_stream_capturing())  # stream 0 never is
    ):
        return None
    return found.weight


def _may_keep(values: Tensor, pattern: SparsityPattern) -> bool:
    """Whether values are those of an ordinary eager call."""
    return (
        type(values) in (Tensor, nn.Parameter)
        and pattern.kept != pattern.shape[0] * pattern.shape[1]  # or the weight is a view
        and not torch.compiler.is_compiling()
        and not is_transformed()
        and not torch._C._len_torch_dispatch_stack()
        and torch._C._get_tracing_state() is None
        and not values.is_inference()
        and not (values.is_cuda and torch.cuda.is_current_stream_capturing())
    )


class SolveWeights:
    """The dense weights that a captured solve fills when it begins, and reads in all evaluations.

    Which those are shows while it warms up.
    """

    def __init__(self) -> None:
        self._weights: dict[tuple[int, torch.dtype], tuple[Tensor, SparsityPattern, Tensor]] = {}

    @contextlib.contextmanager
    def used(self) -> Iterator[None]:
        """Within it, this thread's masked products take their dense weights here."""
        before, _local.solve = _local.solve, self
        try:
            yield
        finally:
            _local.solve = before

    def weight(self, values: Tensor, pattern: SparsityPattern, dtype: torch.dtype) -> Tensor:
        """Without a gradient."""
        key = id(values), dtype
        if key not in self._weights or self._weights[key][1] is not pattern:
            with torch.no_grad():
                weight = pattern.to_dense(values.to(dtype))
            self._weights[key] = values, pattern, weight
        return self._weights[key][2]

    @torch.no_grad()
    def fill(self) -> None:
        """Anew, from the values of now."""
        for values, pattern, weight in self._weights.values():
            weight.copy_(pattern.to_dense(values.to(weight.dtype)))


def _with_gradient(weight: Tensor, values: Tensor, pattern: SparsityPattern) -> Tensor:
    if not (values.requires_grad and torch.is_grad_enabled()):
        return weight
    attached: Tensor = _OfValues.apply(values, weight, pattern)
    return attached


class _OfValues(torch.autograd.Function):
    """A weight that is there, with the derivative of having filled it."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, weight: Tensor, pattern: SparsityPattern) -> Tensor:
        ctx.pattern, ctx.dtype = pattern, values.dtype
        return weight.detach()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return masked_dense.from_dense(grad, ctx.pattern.indices).to(ctx.dtype), None, None
