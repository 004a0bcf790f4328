"""What a solver stores grows as steps are taken: measured on the tensors of its state."""

from __future__ import annotations

import pytest
import torch
from torch.utils import _pytree as pytree

import deqcore
from deqcore import Anderson, Broyden
from deqcore.solvers._fused import FusedSolver
from tests.support.problems import equal, wave, wave_batch


@pytest.fixture
def bytes_held(monkeypatch):
    """Bytes of the state after each step."""
    held: list[int] = []
    take_step = FusedSolver.take_step

    def watched(self, *args):
        out = take_step(self, *args)
        held.append(sum(t.untyped_storage().nbytes() for t in pytree.tree_leaves(out[0])))
        return out

    monkeypatch.setattr(FusedSolver, "take_step", watched)
    return held


def solve(batch, dim, solver):
    z0 = torch.zeros(batch, dim)
    with torch.no_grad():
        return deqcore.fixed_point(lambda z: 0.5 * z.cos() + 1, z0, solver=solver)


@pytest.mark.parametrize(
    ("solver", "row_before"),  # bytes a row held from the first step on, before storage grew
    [(Broyden(), 30 * 30 * 8), (Broyden(memory=64), 64 * 64 * 8), (Anderson(memory=64), 33_000)],
    ids=["Broyden", "Broyden-64", "Anderson-64"],
)
def test_a_solve_of_few_steps_holds_little_beside_its_state(solver, row_before, bytes_held):
    solution = solve(2000, 3, solver)
    assert solution.converged.all()
    assert solution.evaluations <= 9  # eight and the one at the solution
    assert max(bytes_held) <= 2000 * 900
    assert max(bytes_held) < 2000 * row_before / 7


@pytest.mark.parametrize("kind", [Broyden, Anderson])
@pytest.mark.parametrize("max_steps", [1, 3, 12])
def test_memory_is_bounded_by_the_steps_that_are_allowed(kind, max_steps, bytes_held):
    solve(100, 3, kind(memory=64, max_steps=max_steps, rtol=0.0, atol=0.0))
    vectors = 3 if kind is Anderson else 2
    slots = max_steps**2 * 8 + vectors * (max_steps + 1) * 3 * 4
    assert max(bytes_held) <= 100 * (slots + 100)


@pytest.mark.parametrize("kind", [Broyden, Anderson])
def test_memory_grows_with_the_steps_and_stops_at_the_option(kind, bytes_held):
    solver = kind(memory=20, max_steps=40, patience=99)
    calls = 0

    def f(z):  # never solved: the target moves with each call
        nonlocal calls
        calls += 1
        return 0.5 * z + calls

    with torch.no_grad():
        deqcore.fixed_point(f, torch.zeros(10, 64), solver=solver)
    assert len(bytes_held) == 40
    assert bytes_held[0] < bytes_held[9] < bytes_held[19]
    grown = bytes_held[20]  # Anderson's best iterate may need a place of its own from then on
    assert max(bytes_held[20:]) <= grown + 10 * 64 * 4
    assert bytes_held[0] < 0.6 * grown


@pytest.mark.parametrize("solver", [Anderson(memory=20), Broyden(memory=20)])
def test_a_history_that_grows_is_that_of_one_that_had_room_at_once(solver, monkeypatch):
    problem = wave_batch(4, 37, seed=1)
    z0, *args = problem
    with torch.no_grad():
        grown = deqcore.fixed_point(wave, z0, *args, solver=solver)
        new_state = type(solver).new_state
        monkeypatch.setattr(
            type(solver),
            "new_state",
            lambda self, x, rows: self.with_all_room(new_state(self, x, rows)),
        )
        roomy = deqcore.fixed_point(wave, z0, *args, solver=solver)
    assert (grown.steps > 8).any()
    assert torch.equal(grown.steps, roomy.steps)
    assert equal(grown.value, roomy.value)
