"""Unrolled where z0 is already the value: its gradient is that of one step, not silently none."""

from __future__ import annotations

import pytest
import torch

import deqcore
from deqcore import Anderson, Broyden, NewtonKrylov, Picard, Status, Unrolled

ADJOINTS = [Unrolled(), Unrolled(checkpoint_every=2)]


@pytest.fixture(params=ADJOINTS, ids=str)
def adjoint(request):
    return request.param


def solve(w, z0, adjoint, **options):
    return deqcore.fixed_point(lambda z: 0.5 * z + w, z0, adjoint=adjoint, **options)


@pytest.mark.parametrize("kind", [Picard, Anderson, Broyden, NewtonKrylov])
@pytest.mark.parametrize("damping", [1.0, 0.5])
def test_a_start_within_tolerance_has_the_gradient_of_a_step(adjoint, kind, damping):
    w = torch.ones(2, 3, dtype=torch.float64, requires_grad=True)
    z0 = torch.full((2, 3), 2.0, dtype=torch.float64)
    z0[1] = 0.0  # a row that has steps to take
    solution = solve(w, z0, adjoint, solver=kind(damping=damping))
    assert solution.steps[0] == 1
    assert torch.equal(solution.value[0], z0[0])
    (grad,) = torch.autograd.grad(solution.value.sum(), w)
    torch.testing.assert_close(grad[0], torch.full((3,), damping).double())
    torch.testing.assert_close(grad[1], torch.full((3,), 2.0).double(), rtol=1e-3, atol=0)


def test_the_value_is_the_same_without_grad_mode(adjoint):
    w, z0 = torch.ones(2, 3, requires_grad=True), torch.full((2, 3), 2.0)
    with torch.no_grad():
        plain = solve(w, z0, adjoint)
    solution = solve(w, z0, adjoint)
    assert torch.equal(plain.value, solution.value)
    assert plain.evaluations == solution.evaluations == 1
    assert solution.converged.all()


def test_a_root_at_the_start_has_a_gradient(adjoint):
    w = torch.ones(2, 3, requires_grad=True)
    found = deqcore.root(lambda z: w - z, torch.ones(2, 3), adjoint=adjoint)
    assert found.steps.tolist() == [1, 1]
    torch.testing.assert_close(torch.autograd.grad(found.value.sum(), w)[0], torch.ones(2, 3))


def test_steps_of_a_root_can_be_checkpointed():
    w = torch.rand(2, 3, dtype=torch.float64, requires_grad=True)

    def gradient(adjoint):
        found = deqcore.root(lambda z: w - 0.7 * z - 0.1 * z**3, torch.zeros_like(w),
                             adjoint=adjoint)  # fmt: skip
        return torch.autograd.grad(found.value.sum(), w)[0]

    assert torch.equal(*map(gradient, ADJOINTS))


def test_a_single_step_has_a_gradient(adjoint):
    w = torch.ones(2, 3, requires_grad=True)
    solution = solve(w, torch.zeros(2, 3), adjoint, solver=Picard(max_steps=1))
    assert solution.status.tolist() == [Status.MAX_STEPS] * 2
    torch.testing.assert_close(torch.autograd.grad(solution.value.sum(), w)[0], torch.ones(2, 3))


def test_a_start_within_tolerance_has_a_tangent():
    w = torch.ones(2, 3)
    _, tangent = torch.func.jvp(
        lambda w: solve(w, torch.full((2, 3), 2.0), Unrolled()).value, (w,), (w,)
    )
    torch.testing.assert_close(tangent, torch.ones(2, 3))
