"""What a solve promises about calls of f, memory and the returned value."""

from __future__ import annotations

import pytest
import torch

import deqcore
from deqcore import Anderson, Broyden, Implicit, Phantom, Picard, Status, Unrolled
from examples.own_solver import Aitken
from tests.support.problems import Counted, affine, equal, halving_damping, rms, wave, wave_batch

SOLVERS = [Picard, Anderson, Broyden, Aitken]
ADJOINTS = [Implicit(), Phantom(), Unrolled()]


@pytest.fixture(params=SOLVERS, ids=lambda kind: kind.__name__)
def kind(request):
    return request.param


@pytest.fixture(params=ADJOINTS, ids=lambda adjoint: type(adjoint).__name__)
def adjoint(request):
    return request.param


def test_first_check_happens_after_the_first_call(kind):
    f = Counted(lambda z: z + 0.0)
    with torch.no_grad():
        solution = deqcore.fixed_point(f, torch.randn(3, 4), solver=kind())
    assert solution.evaluations == f.calls == 1
    assert (solution.steps == 1).all()
    solution.raise_for_status()


def test_start_that_is_a_fixed_point_is_returned_unchanged(kind, adjoint):
    z0 = torch.randn(3, 4)
    solution = deqcore.fixed_point(lambda z: z + 0.0, z0, solver=kind(), adjoint=adjoint)
    assert torch.equal(solution.value, z0)
    assert torch.equal(solution.residual, torch.zeros(3))


@pytest.mark.parametrize("identity", [lambda z: z, lambda z: z.view_as(z)])
def test_f_that_returns_its_input_converges_at_once(kind, adjoint, identity):
    z0 = torch.randn(3, 4)
    solution = deqcore.fixed_point(identity, z0, solver=kind(), adjoint=adjoint)
    solution.raise_for_status()
    assert torch.equal(solution.value, z0)
    assert solution.value.data_ptr() != z0.data_ptr()


@pytest.mark.parametrize("max_steps", [1, 2])
def test_very_few_steps_still_count_and_report(kind, adjoint, max_steps):
    z0, *args = wave_batch(3, 5, seed=1)
    solver = kind(max_steps=max_steps, rtol=0.0, atol=0.0)
    solution = deqcore.fixed_point(wave, z0, *args, solver=solver, adjoint=adjoint)
    assert (solution.status == Status.MAX_STEPS).all()
    assert (solution.steps == max_steps).all()
    first = rms(wave(z0, *args) - z0)
    second = rms(wave(wave(z0, *args), *args) - wave(z0, *args))  # all begin with a plain step
    best = first if max_steps == 1 else torch.minimum(first, second)
    torch.testing.assert_close(solution.residual, best, rtol=1e-12, atol=0)
    torch.testing.assert_close(rms(wave(solution.value, *args) - solution.value), best)


def test_first_step_is_damped_and_plain(kind):
    z0, *args = wave_batch(3, 5, seed=1)
    f = Counted(wave)
    solver = kind(max_steps=2, damping=0.25, rtol=0.0, atol=0.0)
    deqcore.fixed_point(f, z0, *args, solver=solver)
    torch.testing.assert_close(f.seen[1], z0 + 0.25 * (wave(z0, *args) - z0))


def test_damping_function_is_asked_for_each_step(kind):
    z0, *args = wave_batch(3, 5, seed=1)
    steps = {"max_steps": 8, "rtol": 0.0, "atol": 0.0}
    asked = []

    def damping(step):
        asked.append(step)
        return halving_damping(step)

    f = Counted(wave)
    solver = kind(damping=damping, **steps)
    with torch.no_grad():
        deqcore.fixed_point(f, z0, *args, solver=solver)
    assert asked == list(range(1, 9))
    if kind is Picard:
        for step, (z, after) in enumerate(zip(f.seen[:-1], f.seen[1:], strict=True), start=1):
            expected = z + halving_damping(step) * (wave(z, *args) - z)
            torch.testing.assert_close(after, expected)


def test_constant_damping_function_equals_the_constant(kind):
    z0, *args = wave_batch(3, 5, seed=1)
    a = deqcore.fixed_point(wave, z0, *args, solver=kind(damping=0.5))
    b = deqcore.fixed_point(wave, z0, *args, solver=kind(damping=lambda step: 0.5))
    assert equal(a.value, b.value)
    assert torch.equal(a.steps, b.steps)


@pytest.mark.parametrize(
    "keep",
    [
        lambda z: z,
        lambda z: z.detach(),
        lambda z: z.detach()[:2],
        lambda z: z.detach().numpy(),
        lambda z: torch.utils.dlpack.to_dlpack(z.detach()),
    ],
    ids=["tensor", "alias", "view", "array", "capsule"],
)
@pytest.mark.parametrize("shape", [(3, 5), (3, 5, 1), (3,)])
def test_iterates_that_f_keeps_are_never_changed_later(kind, adjoint, keep, shape):
    shift = torch.linspace(-1, 1, 3 * 5 if len(shape) > 1 else 3, dtype=torch.float64).view(shape)
    kept = []

    def f(z):
        kept.append((keep(z), z.detach().clone()))
        return 0.5 * z.roll(1, 0) + 0.3 * torch.sin(z) + shift

    deqcore.fixed_point(f, torch.zeros_like(shift), solver=kind(max_steps=30), adjoint=adjoint)
    assert len(kept) > 5
    for held, copy in kept:
        tensor = held if isinstance(held, torch.Tensor) else torch.from_dlpack(held)
        assert equal(tensor.detach(), copy[: len(tensor)])


def test_start_is_neither_changed_nor_aliased(kind, adjoint):
    z0, *args = wave_batch(3, 5, seed=1)
    before = z0.clone()
    for max_steps in (1, 5):
        solver = kind(max_steps=max_steps)
        value = deqcore.fixed_point(wave, z0, *args, solver=solver, adjoint=adjoint).value
        value.detach().fill_(7.0)
        assert torch.equal(z0, before)


def test_f_that_changes_its_argument_in_place_raises(kind, adjoint):
    z0 = torch.ones(2, 3)
    for grad in (False, True):
        with torch.set_grad_enabled(grad), pytest.raises(RuntimeError, match="in place"):
            deqcore.fixed_point(lambda z: z.mul_(0.5).add_(1.0), z0, solver=kind(), adjoint=adjoint)


def test_value_is_the_same_with_and_without_grad(kind, adjoint):
    z0, shift, strength = wave_batch(4, 9, seed=2, dtype=torch.float32)
    shift.requires_grad_()
    for max_steps in (4, 40):
        solver = kind(max_steps=max_steps)
        with torch.no_grad():
            a = deqcore.fixed_point(wave, z0, shift, strength, solver=solver, adjoint=adjoint)
        b = deqcore.fixed_point(wave, z0, shift, strength, solver=solver, adjoint=adjoint)
        assert b.value.requires_grad
        assert not a.value.requires_grad
        for name in ("value", "status", "residual", "steps"):
            assert equal(getattr(a, name), getattr(b, name).detach())


def test_value_is_that_of_inference_mode(kind, adjoint):
    z0, *args = wave_batch(4, 9, seed=2)
    a = deqcore.fixed_point(wave, z0, *args, solver=kind(), adjoint=adjoint)
    with torch.inference_mode():
        b = deqcore.fixed_point(wave, z0, *args, solver=kind(), adjoint=adjoint)
        assert equal(a.value.detach(), b.value)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("leaves", ["one", "mixed"])
def test_f_that_works_in_place_is_refused_in_inference_mode(kind, adjoint, dtype, leaves):
    def f(state):
        first = state[0].mul_(0.5).add_(1.0)
        return (first, *(0.5 * leaf for leaf in state[1:]))

    for inference_start in (False, True):
        with torch.inference_mode(inference_start):
            z0 = [torch.zeros(4, 8, dtype=dtype)]
            if leaves == "mixed":  # the leaf whose dtype is that of the whole is no copy for f
                z0.insert(0, torch.zeros(4, 3, dtype=torch.float64))
        with torch.inference_mode(), pytest.raises(RuntimeError, match="in place"):
            deqcore.fixed_point(f, tuple(z0), solver=kind(), adjoint=adjoint)


def test_start_made_in_inference_mode_is_solved_outside_of_it(kind, adjoint):
    with torch.inference_mode():
        z0 = torch.zeros(3, 4)
    weight = torch.ones(4, requires_grad=True)
    solution = deqcore.fixed_point(lambda z: 0.5 * z + weight, z0, solver=kind(), adjoint=adjoint)
    solution.value.sum().backward()
    assert weight.grad is not None
    assert not z0.any()


@pytest.mark.parametrize("check_every", [2, 3, 7])
def test_looking_less_often_changes_no_row(kind, check_every):
    z0, *args = wave_batch(5, 6, seed=3)
    with torch.no_grad():
        often = deqcore.fixed_point(wave, z0, *args, solver=kind())
        rarely = deqcore.fixed_point(wave, z0, *args, solver=kind(check_every=check_every))
    for name in ("value", "status", "residual", "steps"):
        assert equal(getattr(often, name), getattr(rarely, name))
    assert often.evaluations <= rarely.evaluations < often.evaluations + check_every


def test_never_looking_takes_every_step(kind):
    z0, *args = wave_batch(5, 6, seed=3)
    often = deqcore.fixed_point(wave, z0, *args, solver=kind())
    f = Counted(wave)
    with torch.no_grad():
        solution = deqcore.fixed_point(f, z0, *args, solver=kind(check_every=0, max_steps=60))
    assert f.calls == solution.evaluations == 60
    done = often.converged
    assert done.any()
    assert equal(often.value[done], solution.value[done])
    assert torch.equal(often.steps[done], solution.steps[done])


def test_trace_holds_the_residual_of_every_step(kind, adjoint):
    z0, *args = wave_batch(5, 6, seed=3)
    f = Counted(wave)
    solver = kind(record_trace=True, max_steps=12)
    with torch.no_grad():
        solution = deqcore.fixed_point(f, z0, *args, solver=solver, adjoint=adjoint)
    assert solution.trace.shape == (5, solution.evaluations)
    for step, z in enumerate(f.seen):
        active = solution.steps > step
        measured = rms(wave(z, *args) - z)
        torch.testing.assert_close(solution.trace[active, step], measured[active])
        ended = solution.trace[~active, step]
        assert torch.equal(ended, solution.trace[~active, step - 1])  # repeats its last value
    assert deqcore.fixed_point(wave, z0, *args, solver=kind()).trace is None


def test_picard_is_anderson_with_one_residual():
    z0, *args = wave_batch(5, 6, seed=3)
    common = {"damping": 0.7, "max_steps": 30}
    picard = deqcore.fixed_point(wave, z0, *args, solver=Picard(**common))
    for same in (Anderson(memory=1, **common), Anderson(restart=1, safeguard=9e9, **common)):
        other = deqcore.fixed_point(wave, z0, *args, solver=same)
        assert torch.equal(picard.steps, other.steps)
        assert torch.equal(picard.residual, other.residual)
        # Its best iterate may be rebuilt from another ring slot, within rounding.
        torch.testing.assert_close(picard.value, other.value, rtol=1e-14, atol=1e-14)


def test_plain_start_and_restart_delay_mixing():
    z0, *args = wave_batch(3, 6, seed=3)
    plain, mixed, late, restarted = (Counted(wave) for _ in range(4))
    steps = {"max_steps": 8, "rtol": 0.0, "atol": 0.0}
    deqcore.fixed_point(plain, z0, *args, solver=Picard(**steps))
    deqcore.fixed_point(mixed, z0, *args, solver=Anderson(**steps))
    deqcore.fixed_point(late, z0, *args, solver=Anderson(start=4, **steps))
    deqcore.fixed_point(restarted, z0, *args, solver=Anderson(restart=3, safeguard=9e9, **steps))
    for i in range(5):  # z0 and the results of four plain steps
        assert equal(late.seen[i], plain.seen[i])
    assert not equal(late.seen[5], plain.seen[5])
    for i in range(4):
        assert equal(restarted.seen[i], mixed.seen[i]) == (i <= 3)
    z = restarted.seen[3]  # the history was cleared before the fourth step
    torch.testing.assert_close(restarted.seen[4], wave(z, *args))


def test_root_finds_where_g_vanishes(kind):
    A, b = affine(6, 0.5)
    solution = deqcore.root(
        lambda z, b: b - z + z @ A.T,
        torch.zeros(3, 6, dtype=A.dtype),
        b,
        solver=kind(rtol=1e-9, atol=1e-9),
    )
    solution.raise_for_status()
    exact = torch.linalg.solve(torch.eye(6, dtype=A.dtype) - A, b)
    torch.testing.assert_close(solution.value, exact.expand(3, 6), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(
        solution.residual, rms(b - solution.value + solution.value @ A.T), rtol=1e-3, atol=1e-12
    )


def test_root_takes_a_pytree_and_its_adjoint():
    b = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    z0 = {"a": torch.zeros(3, 4, dtype=torch.float64), "b": torch.zeros(3, 2, dtype=torch.float64)}

    def g(z):
        return {"a": b - 2 * z["a"], "b": 1 - z["b"]}

    solution = deqcore.root(g, z0, solver=Broyden(rtol=1e-12, atol=1e-12))
    torch.testing.assert_close(solution.value["a"], b / 2)
    solution.value["a"].sum().backward()
    torch.testing.assert_close(b.grad, torch.full_like(b, 0.5), rtol=1e-4, atol=1e-4)
