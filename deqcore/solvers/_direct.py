"""The steps of a solve on the CPU without the dispatcher.

Fourteen tensors take 3.5 us to pass it, a step of 1 x 4096 numbers as long to compute. So what the
steps of a solve share is told to the kernel once, and each passes four addresses. Where something
has to see the op itself (a profiler, a dispatch mode) or to make a tensor ready for it (what torch
stores negated, a subclass), it is called.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._ops import _len_torch_dispatch_stack_pre_dispatch

from deqcore import _kernels
from deqcore.ops._library import DTYPES

_NOTHING: Any = object()


class _Told(NamedTuple):
    """What the kernel has addresses of, which are good as long as this is."""

    state: Any
    damping: Tensor
    options: Tensor


class DirectSteps:
    """Steps of one solve by an op's kernel.

    Args:
        kernel: the class of ``deqcore._C`` that takes them.
        dtype: of f.
    """

    def __init__(self, kernel: Any, dtype: torch.dtype) -> None:
        self._kernel, self._dtype = kernel, dtype
        self._told = _Told(_NOTHING, _NOTHING, _NOTHING)
        self._step: Any = None

    def take(
        self,
        state: Any,
        x: Tensor,
        f: Tensor,
        damping: Tensor,
        options: Tensor,
        x_next: Tensor,
        z_next: Tensor,
    ) -> bool:
        """Take a step as the op would, of whose arguments these are; False: call the op instead."""
        told = self._told
        if not self._may_pass(x, f):
            if state is not told.state:  # whose memory is no longer needed
                self._told = _Told(_NOTHING, _NOTHING, _NOTHING)
            return False
        if state is not told.state or options is not told.options or damping is not told.damping:
            self._tell(state, damping, options)
        z_address = z_next.data_ptr() if z_next.dtype != x.dtype else 0
        self._step(x.data_ptr(), f.data_ptr(), x_next.data_ptr(), z_address)
        return True

    def _may_pass(self, x: Tensor, f: Tensor) -> bool:
        return (
            type(f) is Tensor
            and f.dtype is self._dtype
            and f.is_cpu
            and f.is_contiguous()
            and f.shape == x.shape
            and not f.is_neg()
            and not f._is_zerotensor()
            and not f.requires_grad
            and not torch._C._len_torch_dispatch_stack()
            and not torch._C._len_torch_function_stack()
            and not torch._C._autograd._profiler_enabled()
        )

    def _tell(self, state: Any, damping: Tensor, options: Tensor) -> None:
        history = state[0]
        tensors = (damping, *state[:-1], *state.rows, options)
        narrow = history.dtype == torch.bfloat16
        self._step = self._kernel(
            [tensor.data_ptr() for tensor in tensors],
            [DTYPES.index(self._dtype), len(damping), *history.shape, narrow],
        ).step
        self._told = _Told(state, damping, options)


def direct_steps(kernel: str, x: Tensor, dtype: torch.dtype) -> DirectSteps | None:
    """For iterates like ``x``, which f sees as ``dtype``; None where only the op can take steps."""
    if not _kernels.CPU_KERNELS or type(x) is not Tensor or not x.is_cpu:
        return None
    if x.is_neg() or torch._C._are_functorch_transforms_active():
        return None
    if torch._C._get_tracing_state() is not None or _len_torch_dispatch_stack_pre_dispatch():
        return None  # torch.jit.trace, or make_fx before dispatch
    return DirectSteps(getattr(_kernels.modules["cpu"], kernel), dtype)
