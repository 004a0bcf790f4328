"""How rows end, and what is said about it."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch

import deqcore
from deqcore import Anderson, Broyden, ConvergenceError, Implicit, Phantom, Picard, Status, Unrolled
from examples.own_solver import Aitken
from tests.support.problems import equal, rms

KINDS = [Picard, Anderson, Broyden, Aitken]
ADJOINTS = [Implicit(), Phantom(), Unrolled()]


@pytest.fixture(params=KINDS, ids=lambda kind: kind.__name__)
def kind(request):
    return request.param


@pytest.fixture(params=ADJOINTS, ids=lambda adjoint: type(adjoint).__name__)
def adjoint(request):
    return request.param


def test_expanding_map_diverges_and_returns_its_start():
    z0 = torch.ones(2, 3)
    factors = torch.tensor([[0.5], [30.0]])
    solver = Picard(max_steps=40)
    solution = deqcore.fixed_point(lambda z: factors * z, z0, solver=solver)
    assert solution.status.tolist() == [Status.CONVERGED, Status.DIVERGED]
    # 29, 29*30, 29*30^2, ...: the residual passes 1e8 times the first at step 7.
    assert solution.steps[1] == 7
    torch.testing.assert_close(solution.value[1], z0[1])
    torch.testing.assert_close(solution.residual[1], torch.tensor(29.0))


@pytest.mark.parametrize("steep", [1e3, 1e6, 1e9])
def test_a_row_gets_an_earlier_iterate_back_to_the_accuracy_that_is_documented(kind, steep):
    """Of two iterates the first is the better one, for every solver."""
    z0 = torch.full((2, 3), 1.25)
    solver = kind(max_steps=2)
    solution = deqcore.fixed_point(lambda z: steep * z * z, z0, solver=solver)
    assert not solution.converged.any()
    torch.testing.assert_close(solution.residual, rms(steep * z0 * z0 - z0).float())
    eps = torch.finfo(torch.float32).eps
    bound = 0.0 if kind is Broyden else 3 * eps * (1.25 + solution.residual[:, None])
    assert ((solution.value - z0).abs() <= bound).all()


@pytest.mark.parametrize(("size", "status"), [(1e150, Status.CONVERGED), (1e200, Status.NONFINITE)])
def test_values_too_large_to_be_squared_in_float64_are_named(kind, size, status):
    z0 = torch.zeros(2, 3, dtype=torch.float64)
    solution = deqcore.fixed_point(lambda z: 0.5 * z + size, z0, solver=kind())
    assert (solution.status == status).all()
    if status is Status.NONFINITE:
        with pytest.raises(ConvergenceError, match="whose squares are inf"):
            solution.raise_for_status()


def test_growth_back_to_the_first_residual_is_not_divergence():
    """Divergence is measured against the first residual, not against a tiny best one."""
    calls = 0

    def f(z):
        nonlocal calls
        calls += 1
        return 1e-10 * z + (1.0 if calls < 3 else 2.0 * calls)

    solver = Picard(max_steps=6, rtol=0.0, atol=0.0, record_trace=True)
    with torch.no_grad():
        solution = deqcore.fixed_point(f, torch.zeros(1, 3, dtype=torch.float64), solver=solver)
    assert solution.trace[0].max() > 1e8 * solution.residual[0]
    assert solution.status.tolist() == [Status.MAX_STEPS]


def test_rotation_stalls_after_patience_steps_without_improvement(adjoint):
    turn = torch.tensor([[0.0, -1.0], [1.0, 0.0]], dtype=torch.float64)
    solver = Picard(patience=7, max_steps=50)
    z0 = torch.tensor([[1.0, 2.0]], dtype=torch.float64)
    solution = deqcore.fixed_point(lambda z: z @ turn, z0, solver=solver, adjoint=adjoint)
    assert solution.status.tolist() == [Status.STALLED]
    assert solution.steps.tolist() == [8]  # the first is the best, 7 more do not improve it
    torch.testing.assert_close(solution.value, z0)


def test_unreachable_tolerance_stalls_at_the_floor_of_rounding(kind):
    solver = kind(rtol=0.0, atol=0.0, max_steps=500, patience=10)
    z0 = torch.zeros(2, 33)
    shift = torch.rand(33) + 0.1
    solution = deqcore.fixed_point(
        lambda z: 0.5 * z.roll(1, 1) + torch.sin(z) / 4 + shift, z0, solver=solver
    )
    ended = {Status.STALLED, Status.CONVERGED}  # zero residual is possible in rounded arithmetic
    assert set(solution.status.tolist()) <= ended
    assert (solution.residual < 1e-6 * rms(solution.value)).all()
    assert (solution.steps < 500).all()


def test_slow_map_runs_out_of_steps_with_its_best(adjoint):
    solver = Picard(max_steps=5)
    z0 = torch.zeros(2, 3)
    solution = deqcore.fixed_point(lambda z: 0.99 * z + 1, z0, solver=solver, adjoint=adjoint)
    assert (solution.status == Status.MAX_STEPS).all()
    torch.testing.assert_close(solution.value, torch.full((2, 3), 1 + 0.99 + 0.99**2 + 0.99**3))


def test_best_iterate_is_returned_when_later_ones_are_worse(kind, adjoint):
    """The residual falls, then grows again when the fifth call of f moves the target away."""
    calls = 0

    def f(z):
        nonlocal calls
        calls += 1
        return factors * z + (1.0 if calls < 5 else 100.0 * calls)

    factors = torch.linspace(0.1, 0.8, 9, dtype=torch.float64)
    z0 = torch.zeros(2, 9, dtype=torch.float64)
    solver = kind(max_steps=9, rtol=0.0, atol=0.0, damping=0.3, record_trace=True)
    with torch.no_grad():
        solution = deqcore.fixed_point(f, z0, solver=solver, adjoint=adjoint)
    assert (solution.status != Status.CONVERGED).all()
    best = solution.trace[0].argmin()
    assert best < 4
    measured = rms(factors * solution.value + 1 - solution.value)
    torch.testing.assert_close(measured, solution.trace[:, best], rtol=1e-10, atol=1e-12)
    assert torch.equal(solution.residual, solution.trace[:, best])


@pytest.mark.parametrize("memory", [1, 2, 3])
def test_best_iterate_survives_leaving_the_ring(memory, adjoint):
    turn = torch.tensor([[0.0, -1.1], [1.1, 0.0]], dtype=torch.float64)
    z0 = torch.tensor([[1.0, 2.0], [0.0, 0.0]], dtype=torch.float64)
    shift = torch.tensor([[0.0, 0.0], [1.0, 0.0]], dtype=torch.float64)
    solver = Anderson(memory=memory, restart=1, max_steps=12, safeguard=9e9)
    solution = deqcore.fixed_point(lambda z: z @ turn + shift, z0, solver=solver, adjoint=adjoint)
    assert (solution.status == Status.MAX_STEPS).all()
    torch.testing.assert_close(solution.value, z0)  # 11 steps ago


def test_row_that_is_never_finite_returns_its_start(kind, adjoint):
    z0 = torch.randn(3, 4)
    solution = deqcore.fixed_point(
        lambda z: z * float("nan"), z0, solver=kind(record_trace=True), adjoint=adjoint
    )
    assert (solution.status == Status.NONFINITE).all()
    assert (solution.steps == 1).all()
    assert equal(solution.value.detach(), z0)
    assert not solution.residual.isfinite().any()


def test_nonfinite_start_is_named():
    z0 = torch.tensor([[1.0, float("nan")], [1.0, float("inf")], [1.0, 1.0]])
    solution = deqcore.fixed_point(lambda z: 0.5 * z, z0)
    assert solution.status.tolist() == [Status.NONFINITE, Status.NONFINITE, Status.CONVERGED]


def test_half_precision_iterate_that_overflows_is_named(kind):
    z0 = torch.full((2, 3), 3e4, dtype=torch.float16)
    factor = torch.tensor([[0.5], [3.0]], dtype=torch.float16)
    solution = deqcore.fixed_point(lambda z: factor * z, z0, solver=kind())
    assert solution.status.tolist() == [Status.CONVERGED, Status.NONFINITE]
    assert solution.value.isfinite().all()


def test_safeguard_returns_to_the_best_iterate():
    """Mixing across the jump of this map overshoots; with a safeguard the row goes back once."""
    seen = []

    def f(z):
        seen.append(z.item())
        return torch.where(z.abs() < 3, 0.9 * z + 0.5, -2.0 * z)

    solver = Anderson(safeguard=1.5, max_steps=60, record_trace=True, rtol=1e-6)
    z0 = torch.zeros(1, 1, dtype=torch.float64)
    with torch.no_grad():
        solution = deqcore.fixed_point(f, z0, solver=solver)
    trace = solution.trace[0]
    bad = [i for i in range(1, len(trace)) if trace[i] > 1.5 * trace[:i].min()]
    assert bad, "this map is meant to reject a step"
    best = int(trace[: bad[0]].argmin())
    plain_step_from_best = 0.9 * seen[best] + 0.5
    assert seen[bad[0] + 1] == pytest.approx(plain_step_from_best, rel=1e-12)


def test_raise_for_status_counts_rows_and_says_what_to_try():
    factors = torch.tensor([[0.5], [30.0], [0.999], [float("nan")], [30.0]])
    solver = Picard(max_steps=20)
    solution = deqcore.fixed_point(lambda z: factors * z, torch.ones(5, 3), solver=solver)
    assert solution.converged.tolist() == [True, False, False, False, False]
    with pytest.raises(ConvergenceError) as info:
        solution.raise_for_status()
    text = str(info.value)
    assert "4 of 5 rows did not converge" in text
    assert "rows 1, 2, 3, 4" in text
    for line in ("2 DIVERGED: f expands", "1 MAX_STEPS: ", "1 NONFINITE: f returned NaN"):
        assert line in text
    assert "raise max_steps" in text
    assert "CONVERGED:" not in text.replace("NONCONVERGED", "")


def test_raise_for_status_shows_only_the_first_rows():
    solution = deqcore.fixed_point(
        lambda z: 2 * z + 1, torch.ones(100, 1), solver=Picard(max_steps=2)
    )
    with pytest.raises(
        ConvergenceError, match=r"100 of 100 rows .*rows 0, 1, 2, 3, 4, 5, 6, 7, \.\.\."
    ):
        solution.raise_for_status()


def test_every_status_has_advice():
    assert [status.value for status in Status] == [0, 1, 2, 3, 4, 5]
    assert len({status.advice for status in Status}) == len(Status)


def test_advice_for_a_row_that_grows_too_slowly_to_diverge_is_about_growth():
    for max_steps, status in ((20, Status.MAX_STEPS), (50, Status.STALLED)):
        solution = deqcore.fixed_point(
            lambda z: 1.5 * z + 1, torch.zeros(1, 1), solver=Picard(max_steps=max_steps)
        )
        assert solution.status.tolist() == [status]
        with pytest.raises(ConvergenceError, match=r"f expands.*damping"):
            solution.raise_for_status()


def test_a_report_outlives_its_solution_and_can_be_pickled(kind):
    weight = torch.tensor(0.5, requires_grad=True)
    solution = deqcore.fixed_point(lambda z: weight * z + 1, torch.ones(2, 3), solver=kind())
    solution.value.sum().backward()
    report = pickle.loads(pickle.dumps(solution.report()))
    assert torch.equal(report.status, solution.status)
    assert report.evaluations == solution.evaluations
    assert torch.equal(report.backward.steps, solution.backward.steps)
    assert not hasattr(report, "value")


def test_what_is_read_late_is_what_was_true_at_the_end(kind):
    solver = kind(record_trace=True)
    early = deqcore.fixed_point(lambda z: 0.5 * z + 1, torch.ones(2, 3), solver=solver)
    report = early.report()
    steps, residual = early.steps, early.residual
    early.value.zero_()
    for other in (copy.deepcopy(report), pickle.loads(pickle.dumps(report)), report):
        assert torch.equal(other.steps, steps)
        assert torch.equal(other.residual, residual)
        assert torch.equal(other.residual, early.trace[:, -1])
    assert "residual=" in repr(report)
    with pytest.raises(AttributeError, match="'Solution' object has no attribute 'stepz'"):
        early.stepz


def test_scale_of_tolerance_is_that_of_f(kind):
    """rms(f(z) - z) <= atol + rtol * rms(f(z)), each term by itself."""
    z0 = torch.zeros(3, 4, dtype=torch.float64)
    shift = torch.tensor([[1e-3], [1.0], [1e3]], dtype=torch.float64)

    def f(z):
        return 0.9 * z.roll(1, 1) - 0.1 * z + shift

    for rtol, atol in [(1e-3, 0.0), (0.0, 1e-3), (1e-5, 1e-5)]:
        solver = kind(rtol=rtol, atol=atol, max_steps=300, record_trace=True)
        solution = deqcore.fixed_point(f, z0, solver=solver)
        solution.raise_for_status()
        bound = atol + rtol * rms(f(solution.value))
        assert (solution.residual <= bound * (1 + 1e-9)).all()
        before = solution.trace.gather(1, (solution.steps.long() - 2).clamp_min(0)[:, None])[:, 0]
        started_below = solution.steps == 1
        assert (started_below | (before > 0.5 * bound)).all()  # it did not go on needlessly
