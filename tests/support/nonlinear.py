"""A problem that is non-linear in all that it has, solved as exactly as float64 allows."""

from __future__ import annotations

import torch

import deqcore
from deqcore import Anderson, Implicit
from tests.support.problems import generator

EXACT = {"rtol": 1e-13, "atol": 1e-13, "max_steps": 300, "patience": 300}
TIGHT = Anderson(**EXACT)
EXACTLY = Implicit(solver=TIGHT)


def inputs(batch=2, dim=2, seed=0):
    """x [B, D], weight [D, D], bias [D], each wanting a gradient."""
    g = generator(seed)
    shapes = (batch, dim), (dim, dim), (dim,)
    numbers = [0.4 * torch.randn(shape, generator=g, dtype=torch.float64) for shape in shapes]
    return tuple(number.requires_grad_() for number in numbers)


def coupled_elements(z, x, weight, bias):
    """Non-linear in all that it has, and no element of z goes without the others."""
    return torch.tanh(z @ weight.t() * torch.cos(x) + bias) + 0.2 * torch.sin(z) * x


def solution_of(x, weight, bias, adjoint=EXACTLY, solver=TIGHT, **options):
    z0 = torch.zeros_like(x)
    arguments = (x, weight, bias)
    solve = deqcore.fixed_point
    return solve(coupled_elements, z0, *arguments, solver=solver, adjoint=adjoint, **options).value
