"""Laws that hold for every solver and every option, over whole solves."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import assume, example, given
from hypothesis import strategies as st

import deqcore
from deqcore import Anderson, Status
from examples.own_solver import Aitken
from tests.support.problems import Counted, affine, equal, rms, solvers, wave, wave_batch

SEEDS = st.integers(0, 10_000)
BATCHES = st.integers(1, 7)
DIMS = st.one_of(st.integers(1, 40), st.sampled_from([127, 129, 300]))
DTYPES = st.sampled_from([torch.float64, torch.float32, torch.bfloat16, torch.float16])


def solve_wave(batch: tuple[torch.Tensor, ...], solver: Any) -> deqcore.Solution:
    z0, *args = batch
    return deqcore.fixed_point(wave, z0, *args, solver=solver)


@dataclasses.dataclass
class Spoiled:
    """``wave`` with a bad element in one row from some call on."""

    row: int
    first_call: int
    value: float
    calls: int = 0

    def __call__(self, z, *args):
        self.calls += 1
        out = wave(z, *args)
        if self.calls >= self.first_call:
            out[self.row, z.shape[1] // 2] = self.value
        return out


@contextlib.contextmanager
def thread_count(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    yield
    torch.set_num_threads(before)


def assert_same_rows(a: deqcore.Solution, b: deqcore.Solution, rows: Any = slice(None)) -> None:
    """Row i of ``b`` is row ``rows[i]`` of ``a``, bit for bit, in all that is reported of a row."""
    for name in ("status", "steps", "residual", "value"):
        left, right = getattr(a, name)[rows], getattr(b, name)
        assert equal(left, right), f"{name}: {left} and {right}"


@given(BATCHES, DIMS, SEEDS, DTYPES)
def test_rows_of_the_test_problem_are_independent(batch, dim, seed, dtype):
    z0, shift, strength = wave_batch(batch, dim, seed, dtype)
    together = wave(z0, shift, strength)
    for i in range(batch):
        row = slice(i, i + 1)
        assert equal(together[row], wave(z0[row], shift[row], strength[row]))


@given(BATCHES, DIMS, SEEDS, DTYPES, solvers(max_steps=30, patience=9))
def test_rows_solved_alone_equal_rows_solved_in_a_batch(batch, dim, seed, dtype, solver):
    problem = wave_batch(batch, dim, seed, dtype)
    together = solve_wave(problem, solver)
    for i in range(batch):
        alone = solve_wave(tuple(t[i : i + 1] for t in problem), solver)
        assert_same_rows(together, alone, slice(i, i + 1))


@given(BATCHES, DIMS, SEEDS, DTYPES, solvers(max_steps=25), st.randoms(use_true_random=False))
def test_permuting_the_batch_permutes_the_solution(batch, dim, seed, dtype, solver, random):
    problem = wave_batch(batch, dim, seed, dtype)
    order = torch.tensor(random.sample(range(batch), batch))
    permuted = solve_wave(tuple(t[order] for t in problem), solver)
    assert_same_rows(solve_wave(problem, solver), permuted, order)


@pytest.mark.parametrize("dim", [4097, 20_001])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", [Anderson, deqcore.Broyden, deqcore.Picard, Aitken])
def test_long_ragged_rows_do_not_depend_on_batch_or_threads(dim, dtype, kind):
    solver = kind(max_steps=9)
    problem = wave_batch(5, dim, 1, dtype)
    together = solve_wave(problem, solver)
    with thread_count(1):
        assert_same_rows(together, solve_wave(problem, solver))
    for i in range(5):
        alone = solve_wave(tuple(t[i : i + 1] for t in problem), solver)
        assert_same_rows(together, alone, slice(i, i + 1))


@given(
    st.integers(1, 4),
    st.integers(1, 40),
    SEEDS,
    st.integers(-60, 60),
    solvers(atol=0.0, rtol=1e-9, max_steps=40, record_trace=True),
)
def test_scaling_an_affine_problem_scales_its_solution_bit_for_bit(batch, dim, seed, power, solver):
    A, b = affine(dim, 0.9, seed)
    columns = A.T.contiguous()
    z0, shift, _ = wave_batch(batch, dim, seed)

    def f(z, b):  # by columns, so that its roundings scale too
        return (z[:, :, None] * columns).sum(1) + b

    scale = 2.0**power
    small = deqcore.fixed_point(f, z0, shift + b, solver=solver)
    large = deqcore.fixed_point(f, scale * z0, scale * (shift + b), solver=solver)
    assert torch.equal(small.steps, large.steps)
    assert torch.equal(small.status, large.status)
    assert equal(scale * small.value, large.value)
    assert equal(scale * small.trace, large.trace)


@given(
    st.integers(2, 6),
    st.integers(1, 40),
    SEEDS,
    DTYPES,
    st.integers(2, 6),
    st.sampled_from([float("nan"), float("inf")]),
    solvers(max_steps=30),
)
def test_nonfinite_row_leaves_others_bitwise_equal_and_returns_its_best(
    batch, dim, seed, dtype, bad_call, bad_value, solver
):
    z0, shift, strength = wave_batch(batch, dim, seed, dtype)
    healthy = deqcore.fixed_point(wave, z0, shift, strength, solver=solver)
    assume(healthy.steps[1] >= bad_call)
    f = Spoiled(row=1, first_call=bad_call, value=bad_value)
    with torch.no_grad():
        solution = deqcore.fixed_point(f, z0, shift, strength, solver=solver)
    others = [i for i in range(batch) if i != 1]
    for name in ("status", "steps", "residual", "value"):
        assert equal(getattr(solution, name)[others], getattr(healthy, name)[others])
    assert solution.status[1] == Status.NONFINITE
    assert solution.steps[1] in (bad_call, bad_call + 1)  # after a mixed step it asks once more
    assert solution.value[1].isfinite().all()
    before = dataclasses.replace(solver, max_steps=bad_call - 1)
    best = deqcore.fixed_point(wave, z0, shift, strength, solver=before)
    assert equal(solution.residual[1], best.residual[1])
    # The best iterate may have been rebuilt from h - damping * g.
    tolerance = 8 * torch.finfo(dtype).eps * (1 + best.value[1].abs().max())
    assert (solution.value[1] - best.value[1]).abs().max() <= tolerance


@given(BATCHES, DIMS, SEEDS, DTYPES, solvers(max_steps=20, patience=4))
def test_residual_is_that_of_the_value(batch, dim, seed, dtype, solver):
    problem = wave_batch(batch, dim, seed, dtype)
    solution = solve_wave(problem, solver)
    value = solution.value
    image = wave(value, *problem[1:])
    measured = rms(image.double() - value.double())
    exact = torch.finfo(solution.residual.dtype).eps * measured
    size = value.double().abs().amax(1) + image.double().abs().amax(1)
    rebuilt = torch.where(solution.converged, 0, 16 * torch.finfo(dtype).eps * size)
    assert ((measured - solution.residual.double()).abs() <= 2 * exact + rebuilt).all()


@given(BATCHES, DIMS, SEEDS, DTYPES, solvers(max_steps=20, patience=4, record_trace=True))
def test_residual_returned_is_the_smallest_measured(batch, dim, seed, dtype, solver):
    solution = solve_wave(wave_batch(batch, dim, seed, dtype), solver)
    smallest = solution.trace.amin(1)
    converged = solution.converged
    assert torch.equal(solution.residual[~converged], smallest[~converged])
    # The relative tolerance may be met at a residual above an earlier one; the row ends there.
    assert torch.equal(solution.residual[converged], solution.trace[converged, -1])


@given(BATCHES, DIMS, SEEDS, DTYPES, solvers(record_trace=True), st.integers(1, 7))
def test_max_steps_bounds_the_calls_and_evaluations_counts_them(
    batch, dim, seed, dtype, solver, max_steps
):
    solver = dataclasses.replace(solver, max_steps=max_steps)
    z0, *args = wave_batch(batch, dim, seed, dtype)
    f = Counted(wave)
    with torch.no_grad():
        solution = deqcore.fixed_point(f, z0, *args, solver=solver)
    assert f.calls == solution.evaluations == solution.steps.max() <= max_steps
    assert solution.trace.shape == (batch, solution.evaluations)
    assert (solution.steps[solution.status == Status.MAX_STEPS] == max_steps).all()


@given(DIMS, SEEDS, DTYPES, solvers(max_steps=20), st.data())
def test_a_pytree_is_solved_like_the_same_state_as_one_tensor(dim, seed, dtype, solver, data):
    z0, shift, strength = wave_batch(3, dim, seed, dtype)
    cuts = sorted(data.draw(st.lists(st.integers(0, dim), max_size=3)))
    widths = [b - a for a, b in zip([0, *cuts], [*cuts, dim], strict=True)]

    def split(z):
        first, *rest = z.split(widths, dim=1)
        return {"first": first, "rest": tuple(rest)}

    def join(tree):
        return torch.cat([tree["first"], *tree["rest"]], dim=1)

    one = deqcore.fixed_point(wave, z0, shift, strength, solver=solver)
    many = deqcore.fixed_point(
        lambda tree: split(wave(join(tree), shift, strength)), split(z0), solver=solver
    )
    assert equal(join(many.value), one.value)
    assert equal(many.residual, one.residual)
    assert torch.equal(many.steps, one.steps)
    assert torch.equal(many.status, one.status)


@given(st.integers(1, 12), st.integers(1, 3), SEEDS)
@example(dim=30, batch=2, seed=1)
def test_anderson_with_full_memory_solves_an_affine_map_exactly(dim, batch, seed):
    A, b = affine(dim, 0.9, seed)
    z0 = wave_batch(batch, dim, seed)[0]
    solver = Anderson(memory=dim + 1, ridge=0.0, rtol=1e-8, atol=0.0, safeguard=1e6, max_weight=1e8)
    with torch.no_grad():
        solution = deqcore.fixed_point(lambda z: z @ A.T + b, z0, solver=solver)
    exact = torch.linalg.solve(torch.eye(dim, dtype=A.dtype) - A, b)
    solution.raise_for_status()
    assert solution.evaluations <= dim + 3
    condition = torch.linalg.cond(torch.eye(dim, dtype=A.dtype) - A)
    error = (solution.value - exact).norm(dim=1) / exact.norm()
    assert (error <= 1e-7 * condition).all()


def test_anderson_with_full_memory_needs_a_gmres_that_does_not_stagnate():
    """The condition of that: on a cyclic shift GMRES gets nowhere before step D."""
    shift = torch.eye(6, dtype=torch.float64).roll(1, 0)  # I - A, nonsingular
    b = torch.eye(1, 6, dtype=torch.float64)
    with torch.no_grad():
        solution = deqcore.fixed_point(
            lambda z: z - (z @ shift.T - b), torch.zeros_like(b),
            solver=Anderson(memory=7, ridge=0.0, max_steps=9, rtol=1e-8, atol=0.0),
        )  # fmt: skip
    assert not solution.converged.any()
