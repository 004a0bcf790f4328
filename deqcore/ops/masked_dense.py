"""Kept values into a dense matrix and back: ops that are each other's derivatives.

``masked_expand`` is ``masked_to_dense`` with a bit for each entry besides, by which a CPU can place
a register of values at a time.

A pattern is passed to the ops as one int32 tensor (see ``SparsityPattern.indices``): offsets of the
rows [rows + 1], columns of the entries [kept], offsets of the columns [columns + 1], rows of the
entries taken column by column [kept], and where in row order each of these is [kept].
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from deqcore.ops._library import define_pure


def entry_columns(pattern: Tensor, rows: int, columns: int, kept: int) -> Tensor:
    """Column of each kept entry, int32 [kept]."""
    return pattern[rows + 1 : rows + 1 + kept]


def entry_rows(pattern: Tensor, rows: int, kept: int) -> Tensor:
    """Row of each kept entry, int64 [kept]."""
    counts = pattern[: rows + 1].diff()
    numbers = torch.arange(rows, device=pattern.device)
    return numbers.repeat_interleave(counts, output_size=kept)


def to_dense_reference(values: Tensor, pattern: Tensor, rows: int, columns: int) -> Tensor:
    """Values [kept] at their places, zero elsewhere: [rows, columns]."""
    kept = values.shape[0]
    flat = entry_rows(pattern, rows, kept) * columns + entry_columns(pattern, rows, columns, kept)
    return values.new_zeros(rows * columns).index_copy(0, flat, values).view(rows, columns)


def from_dense_reference(dense: Tensor, pattern: Tensor) -> Tensor:
    """The entries of dense [rows, columns] at the kept places: [kept]."""
    rows, columns = dense.shape
    kept = kept_entries(pattern, rows, columns)
    flat = entry_rows(pattern, rows, kept) * columns + entry_columns(pattern, rows, columns, kept)
    return dense.reshape(-1).index_select(0, flat)


def kept_entries(pattern: Tensor, rows: int, columns: int) -> int:
    """How many entries a pattern tensor for a [rows, columns] matrix keeps."""
    return (pattern.shape[0] - rows - columns - 2) // 3


def _to_dense_setup(ctx: Any, inputs: Any, output: Tensor) -> None:
    ctx.save_for_backward(inputs[1])


def _to_dense_backward(ctx: Any, grad: Tensor) -> Any:
    (pattern,) = ctx.saved_tensors
    return torch.ops.deqcore.masked_from_dense(grad, pattern), None, None, None


def _expand_setup(ctx: Any, inputs: Any, output: Tensor) -> None:
    ctx.save_for_backward(inputs[2])


def _expand_backward(ctx: Any, grad: Tensor) -> Any:
    (pattern,) = ctx.saved_tensors
    return torch.ops.deqcore.masked_from_dense(grad, pattern), None, None, None, None


def _from_dense_setup(ctx: Any, inputs: Any, output: Tensor) -> None:
    ctx.shape = inputs[0].shape
    ctx.save_for_backward(inputs[1])


def _from_dense_backward(ctx: Any, grad: Tensor) -> Any:
    (pattern,) = ctx.saved_tensors
    return torch.ops.deqcore.masked_to_dense(grad, pattern, *ctx.shape), None


to_dense = define_pure(
    "masked_to_dense",
    "(Tensor values, Tensor pattern, SymInt rows, SymInt columns) -> Tensor",
    to_dense_reference,
    lambda values, pattern, rows, columns: values.new_empty(rows, columns),
    _to_dense_setup,
    _to_dense_backward,
)
expand = define_pure(
    "masked_expand",
    "(Tensor values, Tensor words, Tensor pattern, SymInt rows, SymInt columns) -> Tensor",
    lambda values, words, pattern, rows, columns: to_dense_reference(
        values, pattern, rows, columns
    ),
    lambda values, words, pattern, rows, columns: values.new_empty(rows, columns),
    _expand_setup,
    _expand_backward,
)
from_dense = define_pure(
    "masked_from_dense",
    "(Tensor dense, Tensor pattern) -> Tensor",
    from_dense_reference,
    lambda dense, pattern: dense.new_empty(kept_entries(pattern, *dense.shape)),
    _from_dense_setup,
    _from_dense_backward,
)
