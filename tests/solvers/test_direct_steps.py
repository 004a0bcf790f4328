"""Steps that pass the dispatcher by are the op's own, and are not taken where it has to be seen."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

import deqcore
from deqcore import Anderson, Broyden, Picard, _kernels
from deqcore.ops._rows import HISTORY, Rows
from deqcore.solvers import _fused
from deqcore.solvers._direct import DirectSteps
from tests.support.problems import equal, wave, wave_batch

pytestmark = pytest.mark.skipif(not _kernels.CPU_KERNELS, reason="no kernels here")

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
SOLVERS = [
    Picard(damping=0.7),
    Anderson(memory=3, max_steps=30),
    Anderson(memory=12, start=2, restart=9, damping=lambda step: 1 / (1 + 0.1 * step)),
    Broyden(memory=4, patience=3),
    Broyden(memory=20, max_steps=30, damping=0.8),
]


class OpCalls:
    """Counts a solver's calls of its op, within a ``with`` block."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.monkeypatch, self.count = monkeypatch, 0

    def of(self, run: Callable[[], Any]) -> int:
        self.count = 0
        with self.monkeypatch.context() as patch:
            for solver in (Anderson, Broyden, Picard):
                patch.setattr(solver, "advance", self._counting(solver.advance))
            run()
        return self.count

    def _counting(self, advance: Callable[..., None]) -> Callable[..., None]:
        def counted(*args: Any) -> None:
            self.count += 1
            advance(*args)

        return counted


@pytest.fixture
def op_calls(monkeypatch):
    return OpCalls(monkeypatch)


def same_solution(ours: deqcore.Solution, other: deqcore.Solution) -> bool:
    names = ("value", "status", "residual", "steps")
    return all(equal(getattr(ours, name), getattr(other, name)) for name in names)


@given(
    st.integers(0, 5),
    st.sampled_from([0, 1, 7, 130, 600]),
    st.sampled_from(DTYPES),
    st.sampled_from(SOLVERS),
    st.integers(0, 999),
)
def test_a_solve_is_that_of_the_op_bit_for_bit(batch, dim, dtype, solver, seed):
    z0, shift, strength = wave_batch(batch, dim, seed, dtype)
    solve = lambda: deqcore.fixed_point(wave, z0, shift, strength, solver=solver)
    ours = solve()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_fused, "direct_steps", lambda *args: None)
        other = solve()
    assert same_solution(ours, other)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_narrow_history_is_that_of_the_op(monkeypatch, dtype):
    z0, shift, strength = wave_batch(4, 300, 1, dtype)
    solver = Broyden(history_dtype=torch.bfloat16, memory=6)
    ours = deqcore.fixed_point(wave, z0, shift, strength, solver=solver)
    monkeypatch.setattr(_fused, "direct_steps", lambda *args: None)
    assert same_solution(ours, deqcore.fixed_point(wave, z0, shift, strength, solver=solver))


def test_a_root_and_its_gradient_are_those_of_the_op(monkeypatch):
    def solved() -> tuple[deqcore.Solution, torch.Tensor]:
        a = torch.linspace(0.5, 3, 40).repeat(3, 1).requires_grad_()
        solution = deqcore.root(lambda z: a - z - 0.2 * z.sin(), torch.zeros(3, 40))
        (gradient,) = torch.autograd.grad(solution.value.square().sum(), a)
        return solution, gradient

    ours, gradient = solved()
    monkeypatch.setattr(_fused, "direct_steps", lambda *args: None)
    other, expected = solved()
    assert same_solution(ours, other)
    assert equal(gradient, expected)


@pytest.mark.parametrize("solver", SOLVERS, ids=lambda solver: type(solver).__name__)
def test_no_step_of_a_usual_solve_passes_the_dispatcher(op_calls, solver):
    f = lambda z: 0.5 * z.cos()
    for dtype in DTYPES:
        assert op_calls.of(lambda d=dtype: deqcore.fixed_point(f, torch.ones(2, 9, dtype=d))) == 0
    with torch.inference_mode():
        assert op_calls.of(lambda: deqcore.fixed_point(f, torch.ones(2, 9), solver=solver)) == 0


def test_a_profiler_sees_every_step(op_calls):
    with torch.profiler.profile() as profile:
        solution = deqcore.fixed_point(lambda z: 0.5 * z.cos(), torch.ones(1, 9))
    (event,) = [e for e in profile.key_averages() if e.key == "deqcore::anderson_step"]
    assert event.count == solution.steps.item()


def test_a_dispatch_mode_sees_every_step():
    class Names(TorchDispatchMode):
        def __init__(self) -> None:
            super().__init__()
            self.seen: list[str] = []

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            self.seen.append(str(func))
            return func(*args, **(kwargs or {}))

    with Names() as names:
        solution = deqcore.fixed_point(lambda z: 0.5 * z.cos(), torch.ones(1, 9))
    assert names.seen.count("deqcore.anderson_step.default") == solution.steps.item()


def test_a_function_mode_and_a_trace_see_every_step(op_calls):
    f = lambda z: 0.5 * z.cos()
    solver = Anderson(check_every=0, max_steps=7)
    solve = lambda: deqcore.fixed_point(f, torch.ones(1, 9), solver=solver)

    class Through(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            return func(*args, **(kwargs or {}))

    with Through():
        assert op_calls.of(solve) == 7
    names = []

    def traced(z: torch.Tensor) -> torch.Tensor:
        names.append(op_calls.of(lambda: deqcore.fixed_point(f, z, solver=solver)))
        return z

    torch.jit.trace(traced, torch.ones(1, 9), check_trace=False)
    assert names == [7]


def test_a_start_that_is_stored_negated_is_itself():
    z0 = torch._neg_view(torch.full((2, 3), 2.0))
    seen = []

    def f(z: torch.Tensor) -> torch.Tensor:
        seen.append(z.clone())
        return 0 * z - 2

    solution = deqcore.fixed_point(f, z0, solver=Picard())
    assert equal(seen[0], torch.full((2, 3), -2.0))
    assert equal(solution.value, torch.full((2, 3), -2.0))
    assert equal(solution.residual, torch.zeros(2))


class Marked(torch.Tensor):
    """A subclass, as f may return one."""


@pytest.mark.parametrize(
    "last",
    [
        torch._neg_view,
        lambda t: torch.nn.Parameter(t, requires_grad=False),
        lambda t: t.as_subclass(Marked),
    ],
    ids=["negated", "parameter", "subclass"],
)
def test_what_f_returns_reaches_the_op_where_it_is_no_plain_tensor(op_calls, last):
    solutions = []
    f = lambda z: last(-0.5 * z - 1)
    solve = lambda: solutions.append(deqcore.fixed_point(f, torch.ones(2, 5)))
    assert op_calls.of(solve) > 0
    expected = torch.full((2, 5), 2.0 if last is torch._neg_view else -2 / 3)
    assert solutions[0].converged.all()
    assert torch.allclose(solutions[0].value.as_subclass(torch.Tensor), expected, atol=1e-3)


def test_what_is_not_as_the_kernel_was_told_is_left_to_the_op():
    x = torch.randn(4, 5)
    solver = Anderson()
    state = solver.new_state(x, Rows.start(4, x.device))
    context = solver.context(x, x.dtype, ())
    taken = lambda f: context.direct.take(
        state, x, f, context.damping, context.options, torch.empty_like(x), context.nothing
    )
    assert taken(x + 1)
    assert not taken(x.double())
    assert not taken(x.t().contiguous().t())
    assert not taken(torch.randn(4, 6))
    assert not taken(torch.randn(4, 5, requires_grad=True))
    assert not taken(torch.randn(4, 5, device="meta"))


def test_a_row_without_a_slot_left_is_an_error_here_too():
    x = torch.randn(2, 5)
    solver = Broyden()
    rows = Rows.start(2, x.device)
    rows.counters[:, HISTORY] = 8
    state = solver.new_state(x, rows)
    context = solver.context(x, x.dtype, ())
    assert isinstance(context.direct, DirectSteps)
    with pytest.raises(RuntimeError, match="needs room for one more, got a capacity of 8"):
        context.direct.take(
            state, x, x + 1, context.damping, context.options, torch.empty_like(x), context.nothing
        )
