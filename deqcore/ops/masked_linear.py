"""y = x W^T + bias for a weight with few kept entries (SpMM): schema, oracle, derivative.

The input gradient is the same op over the transposed pattern, the values' gradient is
``masked_outer``; both are differentiable, so derivatives of any order exist.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from deqcore.ops import masked_outer as _masked_outer  # noqa: F401  (registers the derivative)
from deqcore.ops._library import define_pure
from deqcore.ops.masked_dense import to_dense_reference


def reference(
    x: Tensor,
    values: Tensor,
    pattern: Tensor,
    bias: Tensor | None,
    rows: int,
    columns: int,
    block: int,
    transposed: bool,
    dense_outer: bool,
) -> Tensor:
    """The op in pure PyTorch: x [tokens, columns] -> [tokens, rows]; transposed: the other way."""
    weight = to_dense_reference(values, pattern, rows, columns)
    return F.linear(x, weight.t() if transposed else weight, bias)


def _fake(
    x: Tensor,
    values: Tensor,
    pattern: Tensor,
    bias: Tensor | None,
    rows: int,
    columns: int,
    block: int,
    transposed: bool,
    dense_outer: bool,
) -> Tensor:
    return x.new_empty(x.shape[0], columns if transposed else rows)


def _setup(ctx: Any, inputs: Any, output: Tensor) -> None:
    x, values, pattern, _, rows, columns, ctx.block, ctx.transposed, ctx.dense_outer = inputs
    ctx.shape = (rows, columns)
    needs = ctx.needs_input_grad
    # What the other operand's gradient needs, and no more.
    ctx.save_for_backward(x if needs[1] else None, values if needs[0] else None, pattern)


def _backward(ctx: Any, grad: Tensor) -> Any:
    x, values, pattern = ctx.saved_tensors
    ops = torch.ops.deqcore
    grad_x = grad_values = grad_bias = None
    if ctx.needs_input_grad[0]:
        grad_x = ops.masked_linear(
            grad, values, pattern, None, *ctx.shape, ctx.block, not ctx.transposed, ctx.dense_outer
        )
    if ctx.needs_input_grad[1]:
        left, right = (x, grad) if ctx.transposed else (grad, x)
        if ctx.dense_outer:
            grad_values = ops.masked_from_dense(left.t() @ right, pattern)
        else:
            grad_values = ops.masked_outer(left, right, pattern, *ctx.shape, ctx.block)
    if ctx.needs_input_grad[3]:
        grad_bias = grad.sum(0)
    return grad_x, grad_values, None, grad_bias, None, None, None, None, None


call = define_pure(
    "masked_linear",
    "(Tensor x, Tensor values, Tensor pattern, Tensor? bias, SymInt rows, SymInt columns, "
    "int block, bool transposed, bool dense_outer) -> Tensor",
    reference,
    _fake,
    _setup,
    _backward,
)
