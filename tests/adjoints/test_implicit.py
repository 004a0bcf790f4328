"""The implicit gradient: scale-free, row by row, reported, and honest about what it cannot do."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import deqcore
from deqcore import Anderson, Broyden, Implicit, Phantom, Picard, Status, Unrolled
from tests.support.problems import Counted, equal, generator, wave_batch

SEEDS = st.integers(0, 10_000)
BACKWARD = st.sampled_from(
    [
        Anderson(),
        Anderson(memory=9, ridge=0.0),
        Picard(damping=0.8),
        Broyden(memory=4),
        Anderson(rtol=0.0, atol=1e-5),
        Picard(rtol=0.0, atol=1e-5),
        Broyden(rtol=0.0, atol=1e-5),
    ]
)


def smooth(z, shift):
    """Row-independent bit for bit in value and gradient, with a Jacobian that is not symmetric."""
    return 0.5 * z.roll(1, 1) - 0.3 * z + 0.4 * z / (1 + z * z) + shift


def solve(shift, z0=None, backward=Anderson(), forward=Anderson(rtol=1e-8), **options):
    z0 = torch.zeros_like(shift) if z0 is None else z0
    adjoint = Implicit(solver=backward, **options)
    return deqcore.fixed_point(smooth, z0, shift, solver=forward, adjoint=adjoint)


def backward_of(shift, grad, **options):
    shift = shift.detach().requires_grad_()
    solution = solve(shift, **options)
    solution.value.backward(grad)
    return shift.grad, solution.backward


@given(
    st.integers(1, 4),
    st.integers(1, 20),
    SEEDS,
    st.integers(-20, 20),
    st.sampled_from([torch.float64, torch.float32]),
    BACKWARD,
    st.booleans(),
)
def test_scaling_the_loss_scales_the_gradient_bit_for_bit(
    batch, dim, seed, power, dtype, backward, one_hot
):
    shift = wave_batch(batch, dim, seed, dtype)[1]
    grad = torch.randn(batch, dim, generator=generator(seed)).to(dtype)
    if one_hot:  # its rms is a root of two off a power of two for D = 2, 8, 32
        grad = torch.nn.functional.one_hot(torch.arange(batch) % dim, dim).to(dtype)
    plain, report = backward_of(shift, grad, backward=backward)
    scaled, scaled_report = backward_of(shift, grad * 2.0**power, backward=backward)
    assert equal(scaled, plain * 2.0**power)
    for name in ("status", "steps", "residual"):
        assert equal(getattr(report, name), getattr(scaled_report, name))


@pytest.mark.parametrize("scale", [1e-300, 1e-200, 1e-30, 1e30, 1e200, 1e300])
def test_gradient_at_the_ends_of_float64_has_its_usual_precision(scale):
    shift = wave_batch(3, 7, seed=1)[1]
    grad = torch.randn(3, 7, dtype=torch.float64)
    plain, _ = backward_of(shift, grad)
    scaled, report = backward_of(shift, grad * scale)
    assert report.converged.all()
    torch.testing.assert_close(scaled / scale, plain, rtol=1e-4, atol=1e-4)


def test_rows_of_very_different_scale_each_have_full_precision():
    shift = wave_batch(5, 7, seed=1, dtype=torch.float32)[1]
    grad = torch.randn(5, 7)
    plain, _ = backward_of(shift, grad)
    scale = torch.tensor([[1e-30], [1e-12], [1.0], [1e12], [1e30]])
    scaled, report = backward_of(shift, grad * scale)
    assert report.converged.all()
    torch.testing.assert_close(scaled / scale, plain, rtol=2e-4, atol=2e-4)


@pytest.mark.parametrize(
    "backward", [Anderson(), Picard(), Broyden()], ids=lambda s: type(s).__name__
)
def test_zero_row_gets_zero_in_no_steps_and_leaves_others_equal(backward):
    shift = wave_batch(4, 6, seed=2)[1]
    grad = torch.randn(4, 6, dtype=torch.float64)
    full, _ = backward_of(shift, grad, backward=backward)
    grad[1] = 0
    grad[2] = 0
    grad[2, 3] = -0.0
    got, report = backward_of(shift, grad, backward=backward)
    assert (got[1:3] == 0).all()
    assert equal(got[[0, 3]], full[[0, 3]])
    assert report.steps[1:3].tolist() == [0, 0]
    assert (report.steps[[0, 3]] > 0).all()
    assert (report.residual[1:3] == 0).all()
    assert report.converged.all()


def test_a_gradient_of_zero_needs_no_vjp():
    shift = wave_batch(4, 6, seed=2)[1]
    got, report = backward_of(shift, torch.zeros(4, 6, dtype=torch.float64))
    assert (got == 0).all()
    assert report.evaluations == 0


@given(st.integers(2, 5), st.integers(1, 20), SEEDS, BACKWARD, st.sampled_from(["nan", "inf"]))
def test_nonfinite_row_of_the_gradient_leaves_others_bitwise_equal(batch, dim, seed, backward, bad):
    shift = wave_batch(batch, dim, seed)[1]
    grad = torch.randn(batch, dim, generator=generator(seed), dtype=torch.float64)
    full, _ = backward_of(shift, grad, backward=backward)
    grad[1, dim // 2] = float(bad)
    got, report = backward_of(shift, grad, backward=backward)
    others = [i for i in range(batch) if i != 1]
    assert equal(got[others], full[others])
    assert report.status[1] == Status.NONFINITE
    assert not got[1].isfinite().all()  # it is not hidden


def test_nonfinite_row_of_the_forward_leaves_other_gradients_bitwise_equal():
    shift = wave_batch(4, 6, seed=3)[1]
    grad = torch.randn(4, 6, dtype=torch.float64)
    full, _ = backward_of(shift, grad)
    shift[2, 1] = float("nan")
    with torch.no_grad():
        assert solve(shift).status[2] == Status.NONFINITE
    got, _ = backward_of(shift, grad)
    assert equal(got[[0, 1, 3]], full[[0, 1, 3]])


def test_backward_solve_is_reported():
    shift = wave_batch(4, 6, seed=4)[1].requires_grad_()
    solution = solve(shift, backward=Anderson(rtol=1e-6, record_trace=True))
    assert solution.backward is None
    report = solution.report()  # taken before backward, as a layer does
    solution.value.square().sum().backward()
    for seen in (solution.backward, report.backward):
        assert seen.converged.all()
        assert seen.status.shape == seen.steps.shape == seen.residual.shape == (4,)
        assert (seen.residual <= 1e-6 + 1e-6 * 100).all()
        assert seen.evaluations == seen.steps.max()
        assert seen.trace.shape == (4, seen.evaluations)
        seen.raise_for_status()


def test_backward_solve_that_fails_says_so():
    shift = wave_batch(4, 6, seed=4)[1].requires_grad_()
    solution = solve(shift, backward=Picard(max_steps=2))
    solution.value.sum().backward()
    assert (solution.backward.status == Status.MAX_STEPS).all()
    with pytest.raises(deqcore.ConvergenceError, match="4 of 4 rows"):
        solution.backward.raise_for_status()


def test_backward_steps_are_bounded_by_the_solver_of_the_adjoint():
    calls = []

    class Spy(torch.autograd.Function):
        @staticmethod
        def forward(ctx, z):
            return z.clone()

        @staticmethod
        def backward(ctx, grad):
            calls.append(1)
            return grad

    weight = torch.tensor(0.99, requires_grad=True)
    solution = deqcore.fixed_point(
        lambda z: weight * Spy.apply(z) + 1,
        torch.zeros(2, 3),
        adjoint=Implicit(solver=Picard(max_steps=5)),
    )
    solution.value.sum().backward()
    assert solution.backward.evaluations == 5
    # Once more for the parameters, unless the last u is pulled back through f in the same pass.
    assert len(calls) in (5, 6)


def test_two_losses_of_one_solution_have_gradients_that_add_up():
    shift = wave_batch(4, 6, seed=5)[1]
    a, b = torch.randn(2, 4, 6, dtype=torch.float64)
    tight = Anderson(rtol=1e-12, atol=1e-13)
    both, _ = backward_of(shift, a + b, backward=tight)
    shift.requires_grad_()
    solution = solve(shift, backward=tight)
    solution.value.backward(a, retain_graph=True)
    first = shift.grad.clone()
    solution.value.backward(b)
    torch.testing.assert_close(shift.grad, both, rtol=1e-9, atol=1e-10)
    assert equal(first, backward_of(shift, a, backward=tight)[0])


def test_backward_a_second_time_without_the_graph_raises():
    shift = wave_batch(4, 6, seed=5)[1].requires_grad_()
    value = solve(shift).value
    value.sum().backward()
    with pytest.raises(RuntimeError, match="second time"):
        value.sum().backward()


@pytest.mark.parametrize(
    "adjoint", [Implicit(), Phantom(steps=2), Unrolled()], ids=lambda a: type(a).__name__
)
def test_parameter_changed_in_place_before_backward_raises(adjoint):
    weight = torch.full((3, 3), 0.1, requires_grad=True)
    value = deqcore.fixed_point(
        lambda z: torch.tanh(z @ weight) + 1, torch.zeros(2, 3), adjoint=adjoint
    ).value
    with torch.no_grad():
        weight.mul_(1.1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        value.sum().backward()


@pytest.mark.parametrize("memory", [3, 30])
@pytest.mark.parametrize("damping", [1.0, 0.7, lambda step: 0.6 + 0.4**step])
def test_forward_inverse_starts_the_backward_solve_nearer(memory, damping):
    shift = wave_batch(6, 12, seed=7)[1]
    grad = torch.randn(6, 12, dtype=torch.float64)
    options = {
        "forward": Broyden(memory=memory, damping=damping, rtol=1e-10, max_steps=100),
        "backward": Broyden(rtol=1e-9, atol=1e-10),
    }
    plain, cold = backward_of(shift, grad, **options)
    reused, warm = backward_of(shift, grad, reuse_forward=True, **options)
    torch.testing.assert_close(reused, plain, rtol=1e-6, atol=1e-7)
    assert warm.converged.all()
    if memory == 30:  # a history of 3 steps is a start as good as another
        assert warm.steps.sum() < cold.steps.sum()


@given(st.integers(1, 8), SEEDS)
def test_forward_inverse_of_an_affine_map_is_exact_after_enough_steps(dim, seed):
    """Broyden's inverse after 2 D steps on a D-dimensional affine map (Gay, 1979)."""
    A = torch.randn(dim, dim, generator=generator(seed), dtype=torch.float64)
    A = (0.6 * A / torch.linalg.matrix_norm(A, 2)).requires_grad_()
    b = torch.randn(dim, generator=generator(seed + 1), dtype=torch.float64)
    forward = Broyden(memory=40, rtol=1e-13, atol=0.0, max_steps=4 * dim + 10)
    loose = Picard(rtol=0.0, atol=1e9, max_steps=1)  # accepts the first u, whatever it is
    solution = deqcore.fixed_point(
        lambda z: z @ A.T + b,
        torch.zeros(1, dim, dtype=torch.float64),
        solver=forward,
        adjoint=Implicit(solver=loose, reuse_forward=True),
    )
    solution.raise_for_status()
    # Along the error directions that the solve has met, the inverse is right: u is nearer than g.
    grad = solution.value.detach()
    solution.value.backward(grad)
    exact = torch.linalg.solve((torch.eye(dim, dtype=A.dtype) - A.detach()).T, grad[0])
    mine = A.grad @ solution.value.detach()[0] / solution.value.detach()[0].square().sum()
    assert (mine - exact).norm() <= 1.001 * (grad[0] - exact).norm() + 1e-9


def test_gradient_needs_no_more_forward_evaluations_than_one():
    f = Counted(smooth)
    shift = wave_batch(3, 5, seed=8)[1].requires_grad_()
    with torch.no_grad():
        without = deqcore.fixed_point(smooth, torch.zeros_like(shift), shift).evaluations
    solution = deqcore.fixed_point(f, torch.zeros_like(shift), shift)
    assert f.calls == solution.evaluations == without + 1
    solution.value.sum().backward()
    assert f.calls == without + 1


def test_half_precision_gradients_follow_float32():
    shift = wave_batch(3, 33, seed=8, dtype=torch.float32)[1]
    grad = torch.randn(3, 33)
    full, _ = backward_of(shift, grad)
    for dtype in (torch.bfloat16, torch.float16):
        got, report = backward_of(shift.to(dtype), grad.to(dtype))
        assert report.converged.all()
        assert got.dtype == dtype
        assert (got.float() - full).norm() <= 0.05 * full.norm()


def test_tolerances_of_the_backward_solve_are_relative_to_each_gradient():
    shift = wave_batch(1, 9, seed=9)[1]
    grad = torch.randn(1, 9, dtype=torch.float64)
    steps = []
    for rtol in (1e-2, 1e-5, 1e-9):
        backward = dataclasses.replace(Anderson(), rtol=rtol, atol=0.0)
        steps.append(int(backward_of(shift, grad * 1e-50, backward=backward)[1].steps))
    assert steps[0] < steps[1] < steps[2]
