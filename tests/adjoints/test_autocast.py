"""Default tolerances under autocast: coarse enough to be reached, in both directions."""

from __future__ import annotations

import pytest
import torch

import deqcore
from deqcore import Anderson, Implicit

DIM = 64


def tanh_cell(linear):
    return lambda z, x: torch.tanh(linear(z) + x)  # the sum with a float32 x is float32


def returns_half(linear):
    return lambda z, x: torch.tanh(linear(z) + x.bfloat16())


def residual_cell(linear):
    return lambda z, x: z + 0.7 * (torch.tanh(linear(z) + x) - z)


@pytest.fixture
def problem():
    torch.manual_seed(1)
    return torch.nn.Linear(DIM, DIM), torch.randn(16, DIM)


def solved(cell, problem, autocast, **options):
    linear, x = problem
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        solution = deqcore.fixed_point(cell(linear), torch.zeros(16, DIM), x, **options)
    solution.value.square().mean().backward()
    return solution


@pytest.mark.parametrize("cell", [tanh_cell, returns_half, residual_cell])
def test_both_solves_converge_under_autocast_in_no_more_steps_than_without(cell, problem):
    plain = solved(tanh_cell if cell is returns_half else cell, problem, False)
    under = solved(cell, problem, True)
    for mine, reference in ((under, plain), (under.backward, plain.backward)):
        mine.raise_for_status()
        assert mine.steps.double().mean() <= reference.steps.double().mean()


def test_root_converges_under_autocast(problem):
    linear, x = problem
    with torch.autocast("cpu", dtype=torch.bfloat16):
        solution = deqcore.root(
            lambda z: torch.tanh(linear(z) + x.bfloat16()) - z.bfloat16(), torch.zeros(16, DIM)
        )
    solution.raise_for_status()


def test_explicit_tolerances_are_kept_under_autocast(problem):
    tight = Anderson(rtol=1e-4, max_steps=30)
    solution = solved(tanh_cell, problem, True, solver=tight, adjoint=Implicit(solver=tight))
    scale = solution.value.detach().square().mean(1).sqrt()
    assert (solution.residual[solution.converged] <= 1.1e-4 * scale[solution.converged]).all()
    assert not solution.backward.converged.all()  # bfloat16 does not reach it, and it says so


def test_float64_states_keep_their_tolerance_under_autocast():
    """Autocast leaves float64 as it is."""
    layer = torch.nn.Linear(8, 8).double()
    torch.nn.init.orthogonal_(layer.weight, gain=0.5)
    z0 = torch.zeros(3, 8, dtype=torch.float64)
    plain = deqcore.fixed_point(layer, z0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        under = deqcore.fixed_point(layer, z0)
    assert torch.equal(under.value, plain.value)
    assert torch.equal(under.steps, plain.steps)
