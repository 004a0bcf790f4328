"""Broyden with a bfloat16 history: as many steps, as small residuals, the same laws."""

from __future__ import annotations

import dataclasses
from functools import cache, partial

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import deqcore
from deqcore import Broyden, Implicit, Unrolled
from deqcore.ops._rows import Rows
from tests.support.problems import DAMPINGS, affine, equal, generator, wave, wave_batch

NARROW = torch.bfloat16
DTYPES = st.sampled_from([torch.float32, torch.bfloat16, torch.float16])
BROYDENS = st.builds(
    Broyden,
    memory=st.sampled_from([1, 2, 5, 10, 30]),
    damping=DAMPINGS,
    history_dtype=st.just(NARROW),
    max_steps=st.just(30),
)
SEEDS = st.integers(0, 10_000)


def affine_problem(dim: int, radius: float):
    A, _ = affine(dim, radius, seed=dim, dtype=torch.float32)
    b = torch.randn(8, dim, generator=generator(1))
    return lambda z: z @ A.T + b, torch.zeros(8, dim)


def tanh_problem(gain: float):
    W = torch.randn(128, 128, generator=generator(2)) * gain / 128**0.5
    b = torch.randn(8, 128, generator=generator(3))
    return lambda z: torch.tanh(z @ W.T + b), torch.zeros(8, 128)


def wave_problem(dim: int):
    z0, shift, strength = wave_batch(8, dim, 1, torch.float32)
    return lambda z: wave(z, shift, strength), z0


PROBLEMS = {
    "affine": partial(affine_problem, 50, 0.9),
    "affine, longer than the memory": partial(affine_problem, 400, 0.9),
    "tanh": partial(tanh_problem, 0.9),
    "tanh, expanding": partial(tanh_problem, 1.1),
    "wave": partial(wave_problem, 129),
}


@cache
def named(name: str):
    return PROBLEMS[name]()


def solve(problem, history_dtype: torch.dtype | None, **options: float) -> deqcore.Solution:
    f, z0 = problem
    with torch.no_grad():
        return deqcore.fixed_point(
            f, z0, solver=Broyden(history_dtype=history_dtype, atol=0.0, **options)
        )


@pytest.mark.parametrize("rtol", [1e-4, 1e-5])
@pytest.mark.parametrize("name", PROBLEMS)
def test_a_solve_takes_the_steps_of_a_float32_history(name, rtol):
    wide, narrow = (solve(named(name), d, rtol=rtol, max_steps=90) for d in (None, NARROW))
    narrow.raise_for_status()
    wide.raise_for_status()
    assert narrow.evaluations <= wide.evaluations + 2
    assert abs(narrow.steps.float().mean() - wide.steps.float().mean()) <= 0.03 * wide.evaluations


@pytest.mark.parametrize("name", PROBLEMS)
def test_the_residual_gets_as_small_as_with_a_float32_history(name):
    f, _ = named(name)
    floors = []
    for history_dtype in (None, NARROW):
        solution = solve(named(name), history_dtype, rtol=0.0, max_steps=150)
        floors.append((solution.residual / f(solution.value).square().mean(1).sqrt()).max())
    assert floors[1] <= 2 * floors[0] <= 1e-6


@given(
    st.integers(1, 4),
    st.integers(1, 40),
    SEEDS,
    st.integers(-60, 60),
    BROYDENS,
)
def test_scaling_an_affine_problem_scales_its_solution_bit_for_bit(batch, dim, seed, power, solver):
    solver = dataclasses.replace(solver, atol=0.0, rtol=1e-6, record_trace=True)
    A, b = affine(dim, 0.9, seed, torch.float32)
    columns = A.T.contiguous()
    z0, shift, _ = wave_batch(batch, dim, seed, torch.float32)

    def f(z: Tensor, b: Tensor) -> Tensor:  # by columns, so that its roundings scale too
        return (z[:, :, None] * columns).sum(1) + b

    scale = 2.0**power
    small = deqcore.fixed_point(f, z0, shift + b, solver=solver)
    large = deqcore.fixed_point(f, scale * z0, scale * (shift + b), solver=solver)
    assert torch.equal(small.steps, large.steps)
    assert torch.equal(small.status, large.status)
    assert equal(scale * small.value, large.value)
    assert equal(scale * small.trace, large.trace)


@pytest.mark.parametrize("scale", [1e-30, 1e-6, 1e6, 1e30])
def test_the_scale_of_a_problem_does_not_change_its_steps(scale):
    f, z0 = named("tanh")
    for rtol in (1e-4, 1e-5):
        one = solve((f, z0), NARROW, rtol=rtol)
        other = solve((lambda z: scale * f(z / scale), scale * z0), NARROW, rtol=rtol)
        other.raise_for_status()
        assert (one.steps - other.steps).abs().max() <= 1


@given(st.integers(1, 7), st.integers(1, 300), SEEDS, DTYPES, BROYDENS)
def test_rows_solved_alone_equal_rows_solved_in_a_batch(batch, dim, seed, dtype, solver):
    problem = wave_batch(batch, dim, seed, dtype)
    together = deqcore.fixed_point(wave, problem[0], *problem[1:], solver=solver)
    for i in range(batch):
        z0, *args = (t[i : i + 1] for t in problem)
        alone = deqcore.fixed_point(wave, z0, *args, solver=solver)
        for name in ("status", "steps", "residual", "value"):
            assert equal(getattr(together, name)[i : i + 1], getattr(alone, name)), name


def test_a_float64_state_is_refused():
    z0 = torch.zeros(2, 3, dtype=torch.float64)
    message = r"Broyden: history_dtype=torch.bfloat16 needs a float32.*solved in torch.float64"
    for adjoint in (Implicit(), Unrolled()):
        with pytest.raises(ValueError, match=message):
            deqcore.fixed_point(
                lambda z: 0.5 * z + 1, z0, solver=Broyden(history_dtype=NARROW), adjoint=adjoint
            )


@pytest.mark.parametrize("room", ["new_state", "with_all_room", "grown"])
def test_the_history_takes_half_the_memory(room):
    def state_bytes(history_dtype: torch.dtype | None) -> int:
        solver = Broyden(history_dtype=history_dtype)
        x = torch.zeros(2, 100)
        state = solver.new_state(x, Rows.start(2, x.device))
        if room == "with_all_room":
            state = solver.with_all_room(state)
        elif room == "grown":
            state = solver.with_room(state, 20)
        return state.s_ring.untyped_storage().nbytes()

    assert 2 * state_bytes(NARROW) == state_bytes(None)


@pytest.mark.parametrize("checkpoint_every", [None, 3])
def test_an_unrolled_solve_rounds_its_steps_but_not_its_gradients(checkpoint_every):
    z0, shift, strength = wave_batch(4, 33, 1, torch.float32)
    results = []
    for adjoint, history_dtype in (
        (Implicit(solver=Broyden(rtol=1e-6)), None),
        (Unrolled(checkpoint_every=checkpoint_every), NARROW),
        (Implicit(solver=Broyden(rtol=1e-6, history_dtype=NARROW)), NARROW),
    ):
        inputs = shift.clone().requires_grad_()
        solver = Broyden(history_dtype=history_dtype, rtol=1e-6, atol=0.0, max_steps=30)
        solution = deqcore.fixed_point(wave, z0, inputs, strength, solver=solver, adjoint=adjoint)
        solution.raise_for_status()
        solution.value.square().sum().backward()
        results.append((solution, inputs.grad))
    (_, exact), (unrolled, through_steps), (eager, implicit) = results
    torch.testing.assert_close(unrolled.value, eager.value, rtol=1e-5, atol=1e-5)
    # A gradient rounded to bfloat16 would be off by up to 4e-3.
    scale = exact.abs().max()
    assert (through_steps - exact).abs().max() <= 2e-4 * scale
    assert (implicit - exact).abs().max() <= 1e-4 * scale


def test_the_forward_inverse_of_a_narrow_history_starts_the_backward_solve_nearer():
    shift = wave_batch(6, 12, seed=7, dtype=torch.float32)[1]
    grad = torch.randn(6, 12)
    found = []
    for reuse_forward in (False, True):
        inputs = shift.clone().requires_grad_()
        solution = deqcore.fixed_point(
            lambda z: 0.5 * z.roll(1, 1) - 0.3 * z + 0.4 * z / (1 + z * z) + inputs,  # noqa: B023  (called at once)
            torch.zeros_like(shift),
            solver=Broyden(history_dtype=NARROW, rtol=1e-6, atol=0.0, max_steps=60),
            adjoint=Implicit(solver=Broyden(rtol=1e-5), reuse_forward=reuse_forward),
        )
        solution.value.backward(grad)
        assert solution.backward.converged.all()
        found.append((inputs.grad, solution.backward.steps.sum()))
    (plain, cold), (reused, warm) = found
    torch.testing.assert_close(reused, plain, rtol=1e-3, atol=1e-4)
    assert warm < cold
