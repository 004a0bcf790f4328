"""Second derivatives of implicit solves, against finite differences and unrolled steps."""

from __future__ import annotations

import pytest
import torch
from torch.autograd import gradgradcheck

import deqcore
from deqcore import Anderson, Broyden, FixedDropout, Implicit, NewtonKrylov, Picard, Unrolled
from tests.support.nonlinear import EXACT, TIGHT, coupled_elements, inputs, solution_of
from tests.support.problems import generator

ADJOINT = Implicit(solver=TIGHT)
INPUTS = ("x", "weight", "bias")


def second_derivatives(solved, leaves, seed=1):
    """Gradients of a square of all first gradients, which takes the whole of the Hessian."""
    value = solved(*leaves)
    first = torch.autograd.grad(value.pow(3).sum(), leaves, create_graph=True)
    weights = [torch.randn(g.shape, generator=generator(seed), dtype=g.dtype) for g in first]
    total = sum((w * g.square()).sum() for w, g in zip(weights, first, strict=True))
    return torch.autograd.grad(total, leaves)


def test_gradgradcheck_of_arguments_and_of_what_f_closes_over():
    def closed_over(x, weight, bias):
        shift, scaled = 1.5 * x, weight + 0.1
        return deqcore.fixed_point(
            lambda z: coupled_elements(z, shift, scaled, bias),
            torch.zeros_like(x), solver=TIGHT, adjoint=ADJOINT,
        ).value  # fmt: skip

    assert gradgradcheck(closed_over, inputs())


def test_a_hessian_is_that_of_the_unrolled_steps():
    leaves = inputs()

    def hessian(adjoint):
        return torch.autograd.functional.hessian(
            lambda *leaves: solution_of(*leaves, adjoint=adjoint).pow(3).sum(), leaves
        )

    for ours, theirs in zip(hessian(ADJOINT), hessian(Unrolled()), strict=True):
        for one, other in zip(ours, theirs, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("kind", [Picard, Anderson, Broyden, NewtonKrylov])
@pytest.mark.parametrize("batch", ["rows", "coupled"])
def test_all_solvers_give_the_same_second_derivatives(kind, batch):
    leaves, solver = inputs(3, 3, seed=2), kind(**EXACT)
    ours = second_derivatives(
        lambda *leaves: solution_of(
            *leaves, adjoint=Implicit(solver=solver), solver=solver, batch=batch
        ),
        leaves,
    )
    theirs = second_derivatives(
        lambda *leaves: solution_of(*leaves, adjoint=Unrolled(), solver=Picard(**EXACT)), leaves
    )
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-8, atol=1e-8)


def test_root_and_layers_have_second_derivatives():
    leaves = inputs(3, 3, seed=3)

    def by_root(x, weight, bias):
        return deqcore.root(
            lambda z: coupled_elements(z, x, weight, bias) - z, torch.zeros_like(x),
            solver=TIGHT, adjoint=ADJOINT, u_scale=2.0,
        ).value  # fmt: skip

    class Cell(torch.nn.Module):
        def forward(self, z, x, weight, bias):
            return coupled_elements(z, x, weight, bias)

    layer = deqcore.ImplicitLayer(Cell(), solver=TIGHT, adjoint=ADJOINT)
    expected = second_derivatives(solution_of, leaves)
    for solved in (by_root, layer):
        for one, other in zip(second_derivatives(solved, leaves), expected, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-8, atol=1e-8)


def test_a_gradient_penalty_trains_parameters_by_backward():
    """With what else the loss has of the same tensors, and of two solves in a row."""
    grads = []
    for adjoint in (ADJOINT, Unrolled()):
        x, weight, bias = inputs(3, 3, seed=4)
        once = solution_of(x, weight, bias, adjoint=adjoint)
        twice = solution_of(once * x, weight, bias, adjoint=adjoint)
        (slope,) = torch.autograd.grad(twice.sum(), x, create_graph=True)
        (slope.square().sum() + weight.pow(3).sum() + twice.sum()).backward()
        grads.append([leaf.grad for leaf in (x, weight, bias)])
    for one, other in zip(*grads, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-8, atol=1e-8)


def test_second_derivatives_keep_the_mask_of_fixed_dropout():
    dropout = FixedDropout(0.5).train()

    def solved(adjoint):
        torch.manual_seed(0)

        def f(z, x, weight, bias):
            return coupled_elements(dropout(z), x, weight, bias)

        return lambda *leaves: (
            deqcore.fixed_point(
                f, torch.zeros(3, 4, dtype=torch.float64), *leaves, solver=TIGHT, adjoint=adjoint
            ).value
        )

    leaves = inputs(3, 4, seed=5)
    ours, theirs = (second_derivatives(solved(one), leaves) for one in (ADJOINT, Unrolled()))
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-8, atol=1e-8)


def test_a_linear_loss_has_a_second_derivative():
    """Its incoming gradient is constant: all of it comes from J."""
    leaves = inputs(3, 3, seed=7)

    def by_x(adjoint):
        (slope,) = torch.autograd.grad(
            solution_of(*leaves, adjoint=adjoint).sum(), leaves[0], create_graph=True
        )
        return torch.autograd.grad(slope.sum(), leaves[0])[0]

    assert by_x(ADJOINT).abs().min() > 1e-3
    torch.testing.assert_close(by_x(ADJOINT), by_x(Unrolled()), rtol=1e-8, atol=1e-8)


def test_gradients_can_be_had_again_and_with_respect_to_some_inputs_only():
    leaves = inputs(3, 3, seed=6)
    value = solution_of(*leaves)
    expected = torch.autograd.grad(value.square().sum(), leaves, retain_graph=True)
    for index in range(3):
        (first,) = torch.autograd.grad(value.square().sum(), leaves[index], create_graph=True)
        torch.testing.assert_close(first, expected[index], rtol=1e-12, atol=1e-12)
    again = torch.autograd.grad(value.square().sum(), leaves)
    for one, other in zip(again, expected, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("of", range(3), ids=INPUTS)
@pytest.mark.parametrize("by", range(3), ids=INPUTS)
def test_a_third_derivative_is_an_error(of, by):
    leaves = inputs()
    value = solution_of(*leaves)
    (first,) = torch.autograd.grad(value.pow(3).sum(), leaves[of], create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), leaves[by], create_graph=True)
    for leaf in leaves:
        with pytest.raises(RuntimeError, match=r"third derivative.*deqcore\.Unrolled"):
            torch.autograd.grad(second.sum(), leaf, retain_graph=True)


def test_a_second_solve_that_fails_acts_as_the_first():
    """J = diag(0.5, 3): the first solve has a gradient in the tame element alone."""
    slope = torch.tensor([0.5, 3.0], dtype=torch.float64)
    x = torch.tensor([[0.3, 0.2]], dtype=torch.float64, requires_grad=True)

    def slope_of(on_failure):
        solution = deqcore.fixed_point(
            lambda z: slope * z + x.square(), torch.zeros(1, 2, dtype=torch.float64),
            solver=Broyden(**EXACT), adjoint=Implicit(solver=Picard(), on_failure=on_failure),
        )  # fmt: skip
        assert solution.converged.all()
        (first,) = torch.autograd.grad(solution.value[0, 0], x, create_graph=True)
        assert solution.backward.converged.all()
        return solution, first[0, 1]

    solution, wild = slope_of("raise")
    with pytest.raises(deqcore.ConvergenceError, match="linear solve"):
        torch.autograd.grad(wild, x)
    solution, wild = slope_of("ignore")
    torch.autograd.grad(wild, x)
    assert not solution.backward.converged.any()


def test_cells_with_masked_weights_have_the_second_derivatives_of_dense_ones():
    mask = torch.arange(9).reshape(3, 3) % 2 == 0
    pattern = deqcore.SparsityPattern.from_mask(mask)
    x = inputs(2, 3, seed=8)[0]
    values = (0.1 * torch.arange(1.0, 6.0, dtype=torch.float64)).requires_grad_()

    def solved(product, adjoint):
        return lambda x, values: deqcore.fixed_point(
            lambda z: torch.tanh(product(z, values) + x), torch.zeros_like(x),
            solver=TIGHT, adjoint=adjoint,
        ).value  # fmt: skip

    def dense(z, values):
        weight = torch.zeros(3, 3, dtype=torch.float64)
        return z @ weight.index_put(mask.nonzero(as_tuple=True), values).t()

    def masked(z, values):
        return deqcore.masked_linear(z, values, pattern)

    ours = second_derivatives(solved(masked, ADJOINT), (x, values))
    theirs = second_derivatives(solved(dense, Unrolled()), (x, values))
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-8, atol=1e-8)


def test_phantom_has_the_second_derivative_of_its_steps():
    leaves, phantom = inputs(3, 3, seed=10), deqcore.Phantom(steps=2)

    def two_steps(*leaves):
        z = solution_of(*leaves).detach()
        return coupled_elements(coupled_elements(z, *leaves), *leaves)

    ours = second_derivatives(lambda *leaves: solution_of(*leaves, adjoint=phantom), leaves)
    for one, other in zip(ours, second_derivatives(two_steps, leaves), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-8, atol=1e-8)
