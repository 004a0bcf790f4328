"""Coupled batches in captured solves, under torchdeq's names, in regularizers; late warnings."""

from __future__ import annotations

import warnings

import pytest
import torch

import deqcore
from deqcore import Anderson, ConvergenceWarning, Implicit, Picard, Status, _notices
from deqcore.capture import _capture
from deqcore.compat.torchdeq import get_deq
from tests.cuda.test_capture import OnTheHost
from tests.solvers.test_coupled_rows import TIGHT, Normed, late, statistics, swapped
from tests.support.problems import equal


def captured(f, z0, *args, solver=Anderson(), adjoint=Implicit(), batch="rows"):
    return _capture(f, z0, args, solver, adjoint, OnTheHost(), batch)


def test_captured_coupled_gradients_have_the_bits_of_eager_ones():
    w = torch.rand(3, 2, dtype=torch.float64).requires_grad_()
    z0 = torch.zeros_like(w.detach())
    solve = captured(swapped, z0, w, solver=Anderson(**TIGHT), batch="coupled")
    for run in range(2):
        x = (w.detach() + run).requires_grad_()
        replayed = solve(z0, x)
        eager = deqcore.fixed_point(swapped, z0, x, solver=Anderson(**TIGHT), batch="coupled")
        assert equal(replayed.value, eager.value)
        assert replayed.status.tolist() == [Status.CONVERGED]
        got = torch.autograd.grad(replayed.value[0].sum(), x)
        assert equal(got[0], torch.autograd.grad(eager.value[0].sum(), x)[0])


@pytest.mark.parametrize("grad", [True, False])
def test_captured_solve_updates_running_statistics_once_a_replay(grad):
    x = torch.randn(8, 6, dtype=torch.float64)
    cell, once = Normed(), Normed()
    once.load_state_dict(cell.state_dict())
    before = statistics(cell)
    with torch.set_grad_enabled(grad):
        solve = captured(
            cell, torch.zeros_like(x), x, solver=Anderson(rtol=1e-9, max_steps=60), batch="coupled"
        )
        assert all(torch.equal(a, b) for a, b in zip(cell.buffers(), before, strict=True))
        for _ in range(2):
            value = solve(torch.zeros_like(x), x).value
            once(value.detach(), x)
    for got, expected in zip(cell.buffers(), once.buffers(), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("grad", [True, False])
def test_captured_rows_that_others_moved_are_inconsistent(grad):
    shift = torch.zeros(2, 1, requires_grad=True)
    with torch.set_grad_enabled(grad):
        solve = captured(
            lambda z, s: late(z) + s, torch.zeros(2, 1), shift, solver=Picard(max_steps=200)
        )
        with pytest.warns(ConvergenceWarning, match="batch='coupled'"):
            solution = solve(torch.zeros(2, 1), shift)
    assert solution.status[0] == Status.INCONSISTENT
    assert solution.residual[0] > 6


def test_captured_gradient_of_swapped_rows_says_that_it_is_wrong_by_rows():
    w = torch.ones(2, 1, requires_grad=True)
    solve = captured(swapped, torch.zeros(2, 1), w)
    solution = solve(torch.zeros(2, 1), w)
    with pytest.warns(ConvergenceWarning, match="backward"):
        solution.value[0].sum().backward()
    assert solution.backward.status.tolist()[1] == Status.INCONSISTENT


def test_captured_backward_can_raise_and_refuses_to_fall_back():
    w = torch.ones(1, 2, requires_grad=True)
    f = lambda z, w: torch.tensor([3.0, 0.5]) * z + w
    adjoint = Implicit(solver=Picard(max_steps=5), on_failure="raise")
    solution = captured(f, torch.zeros(1, 2), w, adjoint=adjoint)(torch.zeros(1, 2), w)
    with pytest.raises(deqcore.ConvergenceError, match="backward"):
        solution.value.sum().backward()
    with pytest.raises(ValueError, match="on_failure='fallback'"):
        captured(f, torch.zeros(1, 2), w, adjoint=Implicit(on_failure="fallback"))


def test_torchdeq_names_take_coupled_batches():
    w = torch.ones(2, 1, dtype=torch.float64, requires_grad=True)
    deq = get_deq(
        f_solver="anderson", b_solver="anderson", f_tol=1e-9, b_tol=1e-9, ift=True, batch="coupled"
    )
    z_out, info = deq(lambda z: swapped(z, w), torch.zeros(2, 1).double(), sradius_mode=True)
    (grad,) = torch.autograd.grad(z_out[-1][0].sum(), w)
    torch.testing.assert_close(grad, torch.tensor([[4 / 3], [2 / 3]]).double(), rtol=1e-6, atol=0)
    assert info["nstep"].shape == info["abs_lowest"].shape == (1,)
    torch.testing.assert_close(info["sradius"], torch.tensor([0.5]).double())
    with pytest.raises(ValueError, match="batch"):
        get_deq(batch="couple")


def test_regularizers_take_coupled_batches_and_leave_statistics_alone():
    cell = Normed()
    before = statistics(cell)
    x = torch.randn(5, 6, dtype=torch.float64)
    J = torch.autograd.functional.jacobian(lambda z: Normed.forward(cell, z, x), x).view(30, 30)
    after = statistics(cell)  # by the line above
    radius = deqcore.spectral_radius(cell, x, x, krylov=30, batch="coupled")
    torch.testing.assert_close(radius, torch.linalg.eigvals(J).abs().max()[None])
    penalty = deqcore.jacobian_penalty(cell, x, x, samples=400, batch="coupled")
    torch.testing.assert_close(penalty, J.square().sum() / 30, rtol=0.2, atol=0)
    assert all(torch.equal(a, b) for a, b in zip(cell.buffers(), after, strict=True))
    assert not torch.equal(before[0], after[0])


class Event:
    """Stands in for one of CUDA's."""

    arrived = False

    def query(self):
        return self.arrived


def test_a_flag_from_a_gpu_is_told_when_it_has_arrived_and_not_before():
    event, late_one, pending = Event(), Event(), _notices.Pending()
    pending._put(event, torch.tensor([True, False]), ("first cause", "second cause"))
    pending._put(late_one, torch.tensor([True]), ("third cause",))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pending.tell()
    event.arrived = True
    with pytest.warns(ConvergenceWarning, match="first cause") as told:
        pending.tell()
    assert len(told) == 1
    late_one.arrived = True
    with pytest.warns(ConvergenceWarning, match="third cause"):
        pending.tell()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pending.tell()
