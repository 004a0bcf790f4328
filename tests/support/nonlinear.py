"""A problem that is non-linear in all that it has, solved as exactly as float64 allows."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import deqcore
from deqcore import Adjoint, Anderson, Implicit, Solver
from tests.support.problems import generator

EXACT: dict[str, Any] = {"rtol": 1e-13, "atol": 1e-13, "max_steps": 300, "patience": 300}
TIGHT = Anderson(**EXACT)
EXACTLY = Implicit(solver=TIGHT)


def inputs(batch: int = 2, dim: int = 2, seed: int = 0) -> tuple[Tensor, ...]:
    """x [B, D], weight [D, D], bias [D], each wanting a gradient."""
    g = generator(seed)
    shapes = (batch, dim), (dim, dim), (dim,)
    numbers = [0.4 * torch.randn(shape, generator=g, dtype=torch.float64) for shape in shapes]
    return tuple(number.requires_grad_() for number in numbers)


def coupled_elements(z: Tensor, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Non-linear in all that it has, and no element of z goes without the others."""
    return torch.tanh(z @ weight.t() * torch.cos(x) + bias) + 0.2 * torch.sin(z) * x


def solution_of(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    adjoint: Adjoint = EXACTLY,
    solver: Solver = TIGHT,
    **options: Any,
) -> Tensor:
    """z [B, D] with z = coupled_elements(z, x, weight, bias)."""
    z0, arguments = torch.zeros_like(x), (x, weight, bias)
    value: Tensor = deqcore.fixed_point(
        coupled_elements, z0, *arguments, solver=solver, adjoint=adjoint, **options
    ).value
    return value
