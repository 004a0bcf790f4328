"""The open contract: solvers and adjoints that do not come from deqcore."""

from __future__ import annotations

import dataclasses
import pickle
from dataclasses import dataclass

import pytest
import torch

import deqcore
from deqcore import Anderson, Broyden, Implicit, Phantom, Picard, Status, Unrolled
from examples.own_solver import Aitken, Neumann, main
from tests.support.problems import affine, wave, wave_batch

ADJOINTS = [Implicit(), Phantom(), Unrolled(), Unrolled(checkpoint_every=3), Neumann()]


@dataclass(frozen=True, kw_only=True)
class Momentum(deqcore.Solver):
    """That of Solver's docstring."""

    momentum: float = 0.5

    def begin(self, x):
        return x

    def step(self, before, x, f, info):
        return x, x + info.damping * (f - x) + self.momentum * (x - before)


@dataclass(frozen=True, kw_only=True)
class MadeOf(deqcore.Solver):
    """Takes the steps of another solver."""

    inner: deqcore.Solver

    def begin(self, x):
        return self.inner.begin(x)

    def step(self, history, x, f, info):
        return self.inner.step(history, x, f, info)


def test_the_example_shows_what_it_says():
    shown = main()
    assert shown["steps"]["Aitken"] < shown["steps"]["Picard"]
    torch.testing.assert_close(shown["root"], torch.full((3, 1), 2**0.5), rtol=1e-3, atol=0)
    implicit, unrolled, long, short = shown["gradients"].values()
    for near in (unrolled, long):
        torch.testing.assert_close(near, implicit, rtol=1e-3, atol=1e-3)
    assert (short - implicit).norm() > 0.01 * implicit.norm()


def test_the_docstring_s_solver_is_heavy_ball_iteration():
    A, b = affine(5, 0.6)
    z = [torch.zeros(2, 5, dtype=A.dtype)]
    z += [z[0] @ A.T + b]
    for _ in range(5):
        z.append(z[-1] @ A.T + b + 0.5 * (z[-1] - z[-2]))
    solver = Momentum(max_steps=7, rtol=0.0, atol=0.0)
    seen = []
    deqcore.fixed_point(lambda x: seen.append(x) or x @ A.T + b, z[0], solver=solver)
    torch.testing.assert_close(torch.stack(seen[:7]), torch.stack(z[:7]))


@pytest.mark.parametrize("adjoint", ADJOINTS, ids=str)
@pytest.mark.parametrize("solver", [Aitken(), Momentum(momentum=0.1)], ids=str)
def test_own_solver_and_own_adjoint_work_in_a_layer(solver, adjoint):
    cell = torch.nn.Linear(6, 6)
    torch.nn.init.orthogonal_(cell.weight, gain=0.3)
    layer = deqcore.ImplicitLayer(lambda z, x: cell(z) + x, solver=solver, adjoint=adjoint)
    x = torch.randn(4, 6, requires_grad=True)
    z = layer(x)
    layer.report.raise_for_status()
    z.sum().backward()
    exact = torch.linalg.solve(torch.eye(6) - cell.weight.detach().T, torch.ones(6))
    if not isinstance(adjoint, Phantom):
        torch.testing.assert_close(x.grad, exact.expand(4, 6), rtol=1e-2, atol=1e-2)
    assert pickle.loads(pickle.dumps((solver, adjoint))) == (solver, adjoint)


def test_own_solver_solves_the_linear_problem_of_backward():
    A, b = affine(6, 0.6)
    b = b.expand(3, 6).clone().requires_grad_()
    adjoint = Implicit(solver=Aitken(rtol=1e-10, atol=1e-12, max_steps=200))
    solution = deqcore.fixed_point(lambda z: z @ A.T + b, torch.zeros_like(b), adjoint=adjoint)
    solution.value.sum().backward()
    assert solution.backward.converged.all()
    exact = torch.linalg.solve(torch.eye(6, dtype=A.dtype) - A.T, torch.ones(6, dtype=A.dtype))
    torch.testing.assert_close(b.grad, exact.expand(3, 6), rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("solver", [Picard(), Anderson(), Broyden(), Broyden(memory=4)], ids=str)
@pytest.mark.parametrize("adjoint", [Implicit(), Unrolled()], ids=str)
def test_a_solver_made_of_another_takes_its_steps(solver, adjoint):
    z0, *args = wave_batch(5, 40, seed=2)
    made = MadeOf(inner=solver, max_steps=30)
    solver = dataclasses.replace(solver, max_steps=30)
    a, b = (deqcore.fixed_point(wave, z0, *args, solver=s, adjoint=adjoint) for s in (solver, made))
    assert torch.equal(a.status, b.status)
    assert torch.equal(a.steps, b.steps)
    torch.testing.assert_close(a.residual, b.residual, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(a.value, b.value, rtol=1e-9, atol=1e-9)


def test_a_bad_row_harms_neither_values_nor_gradients_of_the_others():
    z0, shift, strength = wave_batch(4, 7, seed=1)
    shift[2] = float("nan")
    for adjoint in (Unrolled(), Unrolled(checkpoint_every=2), Implicit()):
        x = shift.clone().requires_grad_()
        solution = deqcore.fixed_point(wave, z0, x, strength, solver=Aitken(), adjoint=adjoint)
        assert solution.status.tolist().index(Status.NONFINITE) == 2
        others = [0, 1, 3]
        solution.value[others].sum().backward()
        assert x.grad[others].isfinite().all()
        assert (x.grad[others] != 0).any()


@pytest.mark.parametrize("returned", [3.0, torch.tensor(1.0), torch.zeros(5, 2)])
def test_a_history_that_is_not_row_by_row_is_refused(returned):
    @dataclass(frozen=True, kw_only=True)
    class Wrong(Momentum):
        def begin(self, x):
            return (x, returned)

    with pytest.raises(ValueError, match=r"Wrong\.begin: expected tensors with 2 rows in dim 0"):
        deqcore.fixed_point(torch.cos, torch.ones(2, 3), solver=Wrong())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda h, z: (h, z[0]), r"expected a next iterate of shape \(2, 3\)"),
        (lambda h, z: (h, z.double()), r"in torch\.float32, got shape \(2, 3\) in torch\.float64"),
        (lambda h, z: (h, None), "got None"),
        (lambda h, z: ((h, h), z), "expected the history's structure"),
        (lambda h, z: (h[:, :2], z), r"like that of begin, shape \(2, 3\)"),
    ],
)
def test_a_step_of_another_kind_than_it_began_is_refused(change, message):
    @dataclass(frozen=True, kw_only=True)
    class Wrong(Momentum):
        def step(self, before, x, f, info):
            return change(*super().step(before, x, f, info))

    with pytest.raises(ValueError, match=rf"Wrong\.step: .*{message}"):
        deqcore.fixed_point(torch.cos, torch.ones(2, 3), solver=Wrong())


def test_a_solver_that_lacks_a_method_cannot_be_made():
    class Half(deqcore.Solver):
        def begin(self, x):
            return x

    class Nothing(deqcore.Adjoint):
        pass

    with pytest.raises(TypeError, match=r"abstract method.*step"):
        Half()
    with pytest.raises(TypeError, match=r"abstract method.*solve"):
        Nothing()


def test_options_that_all_solvers_share_are_checked():
    with pytest.raises(ValueError, match="Momentum: max_steps must be an integer at least 1"):
        Momentum(max_steps=0)
    with pytest.raises(TypeError, match="unexpected keyword argument 'momentun'"):
        Momentum(momentun=0.1)
    with pytest.raises(ValueError, match=r"Aitken: damping\(1\) must be above 0"):
        deqcore.fixed_point(torch.cos, torch.ones(2, 3), solver=Aitken(damping=lambda step: 3.0))
