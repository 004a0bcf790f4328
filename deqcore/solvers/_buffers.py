"""Memory for the next iterate."""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from torch import Tensor

from deqcore.solvers.base import StepContext


def step_outputs(x: Tensor, context: StepContext) -> tuple[Tensor, Tensor]:
    """Buffers for the next iterate, and for it as f sees it (empty where that is the same).

    The next iterate takes the place of ``x`` unless f, or whoever called the solver, still holds on
    to its memory: an iterate that someone kept never changes.
    """
    ours = _is_ours_alone(x)
    if ours and context.dtype == x.dtype:
        return x, context.nothing
    with counting_changes():
        x_next = x if ours else torch.empty_like(x)
        if context.dtype == x.dtype:
            return x_next, context.nothing
        return x_next, torch.empty_like(x, dtype=context.dtype)


def counting_changes() -> contextlib.AbstractContextManager[Any]:
    """Where new tensors count their changes: a solve knows by that whether f works in place.

    Tensors made in ``torch.inference_mode()`` do not.
    """
    if not torch.is_inference_mode_enabled():
        return contextlib.nullcontext()
    stack = contextlib.ExitStack()
    stack.enter_context(torch.inference_mode(False))
    stack.enter_context(torch.no_grad())  # the former turns gradients on
    return stack


def _is_ours_alone(x: Tensor) -> bool:
    try:
        storage = x.untyped_storage()
        # One reference is x's, one that of `storage`. A view, a detached alias, a graph and a NumPy
        # array each hold another.
        return bool(torch._C._storage_Use_Count(storage._cdata) == 2)
    except (AttributeError, RuntimeError, NotImplementedError):  # a tensor without storage (vmap)
        return False
