"""Masked matmuls with their oracle, shared by the tests of this folder."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from deqcore import SparsityPattern
from deqcore.ops import masked_linear as linear_op
from deqcore.ops import masked_outer as outer_op

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


@dataclass
class Case:
    """One weight with its inputs; all numbers are multiples of 1/256, exact in each dtype."""

    pattern: SparsityPattern
    x: Tensor  # [tokens, columns]
    values: Tensor
    bias: Tensor  # [rows]
    grad: Tensor  # [tokens, rows]

    @property
    def weight(self) -> Tensor:
        return self.pattern.to_dense(self.values)

    def to(self, dtype: torch.dtype) -> Case:
        tensors = (self.x, self.values, self.bias, self.grad)
        return Case(self.pattern, *(tensor.to(dtype) for tensor in tensors))


def make(
    rows: int,
    columns: int,
    tokens: int,
    sparsity: float,
    structure: int | None = None,
    seed: int = 0,
) -> Case:
    g = torch.Generator().manual_seed(seed)
    scores = torch.rand(rows, columns, generator=g)
    pattern = SparsityPattern.from_scores(scores, sparsity, structure=structure)

    def numbers(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g, dtype=torch.float64).mul(64).round().div(64)

    return Case(
        pattern,
        numbers(tokens, columns),
        numbers(pattern.kept),
        numbers(rows),
        numbers(tokens, rows),
    )


Run = Callable[[Case], Tensor]


NAMES = ("forward", "input gradient", "values' gradient")


def arguments(name: str, case: Case) -> tuple[str, tuple[Any, ...]]:
    """The op that computes it, and its arguments."""
    p = case.pattern
    if name == "values' gradient":
        return "masked_outer", (case.grad, case.x, p.indices, *p.shape, p.block)
    transposed = name == "input gradient"
    x, bias = (case.grad, None) if transposed else (case.x, case.bias)
    layout = (*p.shape, p.block, transposed, False)
    return "masked_linear", (x, case.values, p.indices, bias, *layout)


def reference(name: str, case: Case) -> Tensor:
    """In the case's dtype, in pure PyTorch."""
    op, args = arguments(name, case)
    return (outer_op if op == "masked_outer" else linear_op).reference(*args)


def run_op(name: str, case: Case, ops: Any = torch.ops.deqcore) -> Tensor:
    op, args = arguments(name, case)
    return getattr(ops, op)(*args)


def run_op_on(device: torch.device, name: str, case: Case) -> Tensor:
    """The op on a copy of the case on a device; the result is back on the CPU."""
    tensors = (case.x, case.values, case.bias, case.grad)
    moved = Case(case.pattern.to(device), *(tensor.to(device) for tensor in tensors))
    return run_op(name, moved).cpu()


def oracle(name: str, case: Case) -> Tensor:
    """In float64, by dense linear algebra."""
    case = case.to(torch.float64)
    if name == "forward":
        return F.linear(case.x, case.weight, case.bias)
    if name == "input gradient":
        return case.grad @ case.weight
    return case.pattern.from_dense(case.grad.t() @ case.x)


def check_result(name: str, case: Case, dtype: torch.dtype, op: Run) -> None:
    """An op's error is at most twice that of the reference in the same dtype, plus a floor."""
    case = case.to(dtype)
    exact = oracle(name, case)
    ours, theirs = op(case), reference(name, case)
    assert ours.dtype == dtype
    assert ours.shape == exact.shape
    if not ours.numel():
        return
    scale = exact.abs().max()
    floor = 4 * torch.finfo(dtype).eps * scale
    error = (ours.double() - exact).abs().max()
    assert error <= 2 * (theirs.double() - exact).abs().max() + floor, (name, error, scale)
