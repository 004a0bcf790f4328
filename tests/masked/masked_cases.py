"""Masked matmuls with their oracle, shared by the tests of this folder."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

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


# Name -> (the op, its reference in pure PyTorch), both functions of a case.
Run = Callable[[Case], Tensor]


def _linear(op: Callable[..., Tensor], transposed: bool) -> Run:
    def run(case: Case) -> Tensor:
        p = case.pattern
        x, bias = (case.grad, None) if transposed else (case.x, case.bias)
        return op(x, case.values, p.indices, bias, *p.shape, p.block, transposed, False)

    return run


def _outer(op: Callable[..., Tensor]) -> Run:
    return lambda c: op(c.grad, c.x, c.pattern.indices, *c.pattern.shape, c.pattern.block)


def operations() -> dict[str, tuple[Run, Run]]:
    ops = torch.ops.deqcore
    return {
        "forward": (_linear(ops.masked_linear, False), _linear(linear_op.reference, False)),
        "input gradient": (_linear(ops.masked_linear, True), _linear(linear_op.reference, True)),
        "values' gradient": (_outer(ops.masked_outer), _outer(outer_op.reference)),
    }


def oracle(name: str, case: Case) -> Tensor:
    """In float64, by dense linear algebra."""
    case = case.to(torch.float64)
    if name == "forward":
        return F.linear(case.x, case.weight, case.bias)
    if name == "input gradient":
        return case.grad @ case.weight
    return case.pattern.from_dense(case.grad.t() @ case.x)


def check(name: str, case: Case, dtype: torch.dtype) -> None:
    """The kernel's error is at most twice that of the reference in the same dtype, plus a floor."""
    op, reference = operations()[name]
    case = case.to(dtype)
    exact = oracle(name, case)
    ours, theirs = op(case), reference(case)
    assert ours.dtype == dtype
    assert ours.shape == exact.shape
    if not ours.numel():
        return
    scale = exact.abs().max()
    floor = 4 * torch.finfo(dtype).eps * scale
    error = (ours.double() - exact).abs().max()
    assert error <= 2 * (theirs.double() - exact).abs().max() + floor, (name, error, scale)
