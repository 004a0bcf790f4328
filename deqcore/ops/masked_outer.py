"""The gradient of the kept values (SDDMM): left^T right at the kept entries alone.

Reference: Gale, Zaharia, Young and Elsen, "Sparse GPU kernels for deep learning" (2020).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from deqcore.ops._library import define_pure
from deqcore.ops.masked_dense import from_dense_reference, kept_entries


def reference(
    left: Tensor, right: Tensor, pattern: Tensor, rows: int, columns: int, block: int
) -> Tensor:
    """left [tokens, rows], right [tokens, columns] -> sum over tokens at kept entries, [kept]."""
    return from_dense_reference(left.t() @ right, pattern)


def _fake(
    left: Tensor, right: Tensor, pattern: Tensor, rows: int, columns: int, block: int
) -> Tensor:
    return left.new_empty(kept_entries(pattern, rows, columns))


def _setup(ctx: Any, inputs: Any, output: Tensor) -> None:
    left, right, pattern, ctx.rows, ctx.columns, ctx.block = inputs
    ctx.save_for_backward(left, right, pattern)


def _backward(ctx: Any, grad: Tensor) -> Any:
    left, right, pattern = ctx.saved_tensors
    multiply = torch.ops.deqcore.masked_linear
    shape = (ctx.rows, ctx.columns, ctx.block)
    grad_left = grad_right = None
    if ctx.needs_input_grad[0]:
        grad_left = multiply(right, grad, pattern, None, *shape, False, False)
    if ctx.needs_input_grad[1]:
        grad_right = multiply(left, grad, pattern, None, *shape, True, False)
    return grad_left, grad_right, None, None, None, None


define_pure(
    "masked_outer",
    "(Tensor left, Tensor right, Tensor pattern, SymInt rows, SymInt columns, int block) -> Tensor",
    reference,
    _fake,
    _setup,
    _backward,
)
