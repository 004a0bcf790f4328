"""Gradients against dense linear algebra and finite differences, in float64."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.autograd import gradcheck, gradgradcheck

import deqcore
from deqcore import Anderson, Broyden, Implicit, Phantom, Picard, Unrolled
from examples.own_solver import Aitken
from tests.support.problems import affine, generator

TIGHT = {"rtol": 1e-13, "atol": 1e-14, "max_steps": 200, "patience": 200}
SOLVERS = [Picard(**TIGHT), Anderson(**TIGHT), Broyden(**TIGHT), Aitken(**TIGHT)]
EXACT_ADJOINTS = [
    Implicit(solver=Picard(**TIGHT)),
    Implicit(solver=Anderson(**TIGHT)),
    Implicit(solver=Broyden(**TIGHT)),
    Phantom(steps=150),
    Phantom(steps=250, damping=0.7),
    Unrolled(),
    Unrolled(checkpoint_every=7),
]
SEEDS = st.integers(0, 10_000)


def kind(value):
    return type(value).__name__


@pytest.fixture(params=EXACT_ADJOINTS, ids=[
    "Implicit-Picard", "Implicit-Anderson", "Implicit-Broyden", "Phantom", "Phantom-damped",
    "Unrolled", "Unrolled-checkpointed",
])  # fmt: skip
def adjoint(request):
    return request.param


def tanh_cell(z, x, weight, bias):
    return torch.tanh(z @ weight.T + x) * 0.9 + bias


def tanh_problem(batch: int, dim: int, seed: int):
    weight, bias = affine(dim, 0.5, seed)
    x = torch.randn(batch, dim, generator=generator(seed), dtype=torch.float64)
    return tuple(t.requires_grad_() for t in (x, weight, bias))


def dense_gradients(cell, z, grad, inputs):
    """dL/dtheta = lambda^T df/dtheta with lambda = (I - df/dz)^-T dL/dz, row by row."""
    z = z.detach()
    solved = []
    for i in range(len(z)):

        def row(z_i, i=i):
            return cell(torch.cat([z[:i], z_i[None], z[i + 1 :]]), *inputs)[i]

        jacobian = torch.autograd.functional.jacobian(row, z[i])
        solved.append(
            torch.linalg.solve((torch.eye(len(z[i]), dtype=z.dtype) - jacobian).T, grad[i])
        )
    return torch.autograd.grad(cell(z, *inputs), inputs, torch.stack(solved))


@pytest.mark.parametrize("solver", SOLVERS, ids=kind)
@given(st.integers(1, 4), st.integers(1, 8), SEEDS)
def test_implicit_gradient_is_that_of_dense_linear_algebra(solver, batch, dim, seed):
    inputs = tanh_problem(batch, dim, seed)
    z0 = torch.zeros(batch, dim, dtype=torch.float64)
    solution = deqcore.fixed_point(
        tanh_cell, z0, *inputs, solver=solver, adjoint=Implicit(solver=solver)
    )
    grad = torch.randn(batch, dim, generator=generator(seed + 1), dtype=torch.float64)
    mine = torch.autograd.grad(solution.value, inputs, grad)
    for a, b in zip(mine, dense_gradients(tanh_cell, solution.value, grad, inputs), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-10)


@given(st.integers(1, 4), st.integers(1, 12), SEEDS, st.sampled_from([0.3, 0.9]))
def test_affine_gradient_is_that_of_the_inverse(batch, dim, seed, radius):
    A, b = (t.requires_grad_() for t in affine(dim, radius, seed))
    z0 = torch.zeros(batch, dim, dtype=torch.float64)
    tight = Anderson(memory=20, rtol=1e-13, atol=1e-14, max_steps=100, patience=100)
    solution = deqcore.fixed_point(
        lambda z: z @ A.T + b, z0, solver=tight, adjoint=Implicit(solver=tight)
    )
    grad = torch.randn(batch, dim, generator=generator(seed), dtype=torch.float64)
    mine = torch.autograd.grad(solution.value, (A, b), grad)
    exact = torch.linalg.solve(torch.eye(dim, dtype=A.dtype) - A, b).expand(batch, dim)
    condition = torch.linalg.cond(torch.eye(dim, dtype=A.dtype) - A).item()
    for got, expected in zip(mine, torch.autograd.grad(exact, (A, b), grad), strict=True):
        tolerance = 1e-11 * condition * condition
        assert (got - expected).abs().max() <= tolerance * (1 + expected.abs().max())


def test_gradcheck_of_every_input(adjoint):
    inputs = tanh_problem(2, 2, seed=4)
    z0 = torch.zeros(2, 2, dtype=torch.float64)
    solver = Anderson(memory=3, max_steps=25, rtol=1e-13, atol=1e-14)

    def solve(*inputs):
        return deqcore.fixed_point(tanh_cell, z0, *inputs, solver=solver, adjoint=adjoint).value

    assert gradcheck(solve, inputs, atol=1e-6, rtol=1e-6, nondet_tol=1e-12)


@pytest.mark.parametrize("solver", [Picard, Anderson, Broyden, Aitken])
@pytest.mark.parametrize("checkpoint_every", [None, 1, 3])
def test_unrolled_gradient_of_few_steps_is_exact(solver, checkpoint_every):
    """Far from the solution too: it is the gradient of the iterate that was computed."""
    inputs = tanh_problem(2, 2, seed=5)
    z0 = torch.randn(2, 2, dtype=torch.float64, requires_grad=True)
    solver = solver(max_steps=4, rtol=0.0, atol=0.0, damping=0.8)
    adjoint = Unrolled(checkpoint_every=checkpoint_every)

    def solve(z0, *inputs):
        return deqcore.fixed_point(tanh_cell, z0, *inputs, solver=solver, adjoint=adjoint).value

    assert gradcheck(solve, (z0, *inputs), atol=1e-6, rtol=1e-5)


def test_unrolled_is_differentiable_twice():
    x, weight, bias = tanh_problem(1, 2, seed=6)
    z0 = torch.zeros(1, 2, dtype=torch.float64)
    kinds = (Anderson, Broyden, Aitken)
    for solver in (Picard(max_steps=3), *(kind(max_steps=4) for kind in kinds)):

        def solve(x, weight, bias, solver=solver):
            return deqcore.fixed_point(
                tanh_cell, z0, x, weight, bias, solver=solver, adjoint=Unrolled()
            ).value

        assert gradgradcheck(solve, (x, weight, bias), atol=1e-5, rtol=1e-4)


def test_gradient_reaches_parameters_closed_over_and_arguments_alike(adjoint):
    x, weight, bias = tanh_problem(2, 3, seed=7)
    z0 = torch.zeros(2, 3, dtype=torch.float64)
    options = {"solver": SOLVERS[1], "adjoint": adjoint}
    by_args = deqcore.fixed_point(tanh_cell, z0, x, weight, bias, **options).value
    closed = deqcore.fixed_point(lambda z: tanh_cell(z, x, weight, bias), z0, **options).value
    tree = {"x": x, "rest": [weight, (bias,)]}
    by_tree = deqcore.fixed_point(
        lambda z, t: tanh_cell(z, t["x"], t["rest"][0], t["rest"][1][0]), z0, tree, **options
    ).value
    expected = torch.autograd.grad(by_args.square().sum(), (x, weight, bias))
    for value in (closed, by_tree):
        got = torch.autograd.grad(value.square().sum(), (x, weight, bias))
        for a, b in zip(got, expected, strict=True):
            assert torch.equal(a, b)


def test_gradient_of_a_pytree_is_that_of_the_same_state_as_one_tensor(adjoint):
    x, weight, bias = tanh_problem(2, 5, seed=8)
    z0 = torch.zeros(2, 5, dtype=torch.float64)

    def split(z):
        return {"a": z[:, :2], "b": (z[:, 2:].reshape(-1, 3, 1),)}

    def join(tree):
        return torch.cat([tree["a"], tree["b"][0].reshape(-1, 3)], dim=1)

    options = {"solver": SOLVERS[1], "adjoint": adjoint}
    one = deqcore.fixed_point(tanh_cell, z0, x, weight, bias, **options).value
    many = deqcore.fixed_point(
        lambda t, *inputs: split(tanh_cell(join(t), *inputs)), split(z0), x, weight, bias, **options
    ).value
    coefficients = torch.arange(1.0, 6.0, dtype=torch.float64)
    expected = torch.autograd.grad((one * coefficients).sum(), (x, weight, bias))
    got = torch.autograd.grad((join(many) * coefficients).sum(), (x, weight, bias))
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-13)


def test_gradient_of_some_leaves_alone_is_right(adjoint):
    """The others get a gradient of zero, not None, in the linear solve."""
    x, weight, bias = tanh_problem(2, 3, seed=9)
    zeros = torch.zeros(2, 3, dtype=torch.float64)

    def f(t):
        return {"a": tanh_cell(t["a"], x, weight, bias), "b": 0.5 * t["b"] + t["a"]}

    options = {"solver": SOLVERS[1], "adjoint": adjoint}
    value = deqcore.fixed_point(f, {"a": zeros, "b": zeros}, **options).value
    alone = deqcore.fixed_point(tanh_cell, zeros, x, weight, bias, **options).value
    expected = torch.autograd.grad(alone.sum(), (x, weight, bias), retain_graph=True)
    for a, b in zip(torch.autograd.grad(value["a"].sum(), (x, weight, bias), retain_graph=True),
                    expected, strict=True):  # fmt: skip
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-10)
    twice = torch.autograd.grad(value["b"].sum(), (x, weight, bias))
    for a, b in zip(twice, expected, strict=True):
        torch.testing.assert_close(a, 2 * b, rtol=1e-9, atol=1e-10)


def test_start_gets_no_gradient_from_an_implicit_solution():
    x, weight, bias = tanh_problem(2, 3, seed=9)
    z0 = torch.zeros(2, 3, dtype=torch.float64, requires_grad=True)
    value = deqcore.fixed_point(tanh_cell, z0, x, weight, bias).value
    value.sum().backward()
    assert z0.grad is None
    assert weight.grad is not None


@pytest.mark.parametrize("damping", [1.0, 0.4])
@pytest.mark.parametrize("steps", [1, 3])
def test_phantom_gradient_is_that_of_its_steps(steps, damping):
    inputs = tanh_problem(2, 3, seed=10)
    z0 = torch.zeros(2, 3, dtype=torch.float64)
    solver = Anderson(max_steps=5, rtol=0.0, atol=0.0)  # not converged, so that steps move
    adjoint = Phantom(steps=steps, damping=damping)
    solution = deqcore.fixed_point(tanh_cell, z0, *inputs, solver=solver, adjoint=adjoint)
    z = solution.value.detach()
    for _ in range(steps):
        z = (1 - damping) * z + damping * tanh_cell(z, *inputs)
    grad = torch.randn(2, 3, dtype=torch.float64)
    got = torch.autograd.grad(solution.value, inputs, grad)
    for a, b in zip(got, torch.autograd.grad(z, inputs, grad), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-13, atol=1e-14)
    assert solution.evaluations == 5 + steps


@given(st.integers(1, 5), st.integers(1, 20), SEEDS)
def test_float32_gradients_are_near_those_of_float64(batch, dim, seed):
    inputs = tanh_problem(batch, dim, seed)
    grad = torch.randn(batch, dim, generator=generator(seed), dtype=torch.float64)
    wide, narrow = [
        torch.autograd.grad(
            deqcore.fixed_point(
                tanh_cell,
                torch.zeros(batch, dim, dtype=dtype),
                *(t.to(dtype) for t in inputs),
                solver=Anderson(rtol=1e-6),
                adjoint=Implicit(solver=Anderson(rtol=1e-6)),
            ).value,
            inputs,
            grad.to(dtype),
        )
        for dtype in (torch.float64, torch.float32)
    ]
    for a, b in zip(narrow, wide, strict=True):
        assert (a - b).abs().max() <= 1e-4 * (1 + b.abs().max())
