"""torch.func's transforms of implicit solves, against unrolled steps and loops over entries."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.func import (
    functional_call,
    grad,
    hessian,
    jacfwd,
    jacrev,
    jvp,
    stack_module_state,
    vjp,
    vmap,
)
from torch.utils import _pytree as pytree

import deqcore
from deqcore import Anderson, Broyden, Implicit, NewtonKrylov, Phantom, Picard, Unrolled
from tests.support.nonlinear import EXACT, TIGHT, inputs, solution_of


def detached(batch=2, dim=2, seed=0):
    return tuple(leaf.detach() for leaf in inputs(batch, dim, seed))


def several(count=3, **options):
    """Inputs of ``count`` problems, each stacked."""
    one = detached(**options)
    return tuple(torch.stack([t * (1 - 0.4 * i) for i in range(count)]) for t in one)


def with_adjoint(adjoint, **options):
    return lambda *leaves: solution_of(*leaves, adjoint=adjoint, **options)


def loss_of(solved):
    return lambda *leaves: solved(*leaves).pow(3).sum()


def squares(gradients):
    return sum(g.square().sum() for g in pytree.tree_leaves(gradients))


def check_close(ours, theirs):
    ours, theirs = pytree.tree_leaves(ours), pytree.tree_leaves(theirs)
    assert len(ours) == len(theirs)
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-8, atol=1e-8)


def check_mapped_backward(value, leaves):
    """vmap over the rows of a basis gives what one backward a row gives."""
    basis = torch.eye(value.numel(), dtype=value.dtype).view(-1, *value.shape)

    def backward(g):
        return torch.autograd.grad(value, leaves, g, retain_graph=True)

    rows = [torch.stack(r) for r in zip(*(backward(g) for g in basis), strict=True)]
    check_close(vmap(backward)(basis), rows)


IMPLICIT = with_adjoint(Implicit(solver=TIGHT))
UNROLLED = with_adjoint(Unrolled())
ALL = (0, 1, 2)
TANGENTS = detached(seed=9)

TRANSFORMS = {
    "grad": lambda solved: grad(loss_of(solved), ALL),
    "vjp": lambda solved: lambda *a: vjp(solved, *a)[1](TANGENTS[0]),
    "jacrev": lambda solved: jacrev(solved, ALL),
    "jvp": lambda solved: lambda *a: jvp(solved, a, TANGENTS),
    "jacfwd": lambda solved: jacfwd(solved, ALL),
    "hessian": lambda solved: hessian(loss_of(solved), ALL),
    "grad_of_grad": lambda solved: grad(lambda *a: squares(grad(loss_of(solved), ALL)(*a)), ALL),
    "jacrev_of_jacfwd": lambda solved: jacrev(jacfwd(solved, 1), ALL),
    "jvp_of_jvp": lambda solved: (
        lambda *a: jvp(lambda *a: jvp(solved, a, TANGENTS)[1], a, TANGENTS)
    ),
}


@pytest.mark.parametrize("name", TRANSFORMS)
def test_a_transform_is_that_of_the_unrolled_steps(name):
    leaves = detached()
    ours, theirs = (TRANSFORMS[name](solved)(*leaves) for solved in (IMPLICIT, UNROLLED))
    check_close(ours, theirs)


def test_a_third_derivative_by_nested_transforms():
    def third(solved):
        once = grad(loss_of(solved), 1)
        twice = grad(lambda *a: once(*a).square().sum(), 1)
        return grad(lambda *a: twice(*a).square().sum(), 1)(*detached())

    check_close(third(IMPLICIT), third(UNROLLED))


@pytest.mark.parametrize("kind", [Picard, Broyden, NewtonKrylov])
@pytest.mark.parametrize("batch", ["rows", "coupled"])
def test_all_solvers_have_reverse_and_forward_mode(kind, batch):
    solver, leaves = kind(**EXACT), detached()
    solved = with_adjoint(Implicit(solver=solver), solver=solver, batch=batch)
    check_close(grad(loss_of(solved), ALL)(*leaves), grad(loss_of(UNROLLED), ALL)(*leaves))
    check_close(jvp(solved, leaves, TANGENTS), jvp(UNROLLED, leaves, TANGENTS))


@pytest.mark.parametrize("in_dims", [(0, None, None), (0, 0, 0), (None, 0, None), (None, 2, 1)])
@pytest.mark.parametrize("batch", ["rows", "coupled"])
def test_vmap_solves_each_entry_as_if_it_were_alone(in_dims, batch):
    single, stacked = detached(), several()
    solved = with_adjoint(Implicit(solver=TIGHT), batch=batch)
    arguments = [
        one if d is None else many.movedim(0, d)
        for d, one, many in zip(in_dims, single, stacked, strict=True)
    ]
    expected = [
        solved(
            *[
                one if d is None else many[i]
                for d, one, many in zip(in_dims, single, stacked, strict=True)
            ]
        )
        for i in range(3)
    ]
    check_close(vmap(solved, in_dims)(*arguments), torch.stack(expected))


def test_vmapped_statuses_are_those_of_each_entry():
    slopes = torch.tensor([0.5, 0.99, 3.0], dtype=torch.float64)

    def report(slope):
        solution = deqcore.fixed_point(
            lambda z: slope * z + 1.0, torch.zeros(2, 3, dtype=torch.float64),
            solver=Picard(max_steps=40),
        )  # fmt: skip
        return solution.status, solution.steps, solution.residual, solution.converged

    mapped = vmap(report)(slopes)
    for i, slope in enumerate(slopes):
        for ours, alone in zip(mapped, report(slope), strict=True):
            assert torch.equal(ours[i], alone)


def test_gradients_of_each_sample_are_those_of_a_loop():
    xs, (_, weight, bias) = several()[0], detached()
    each = grad(loss_of(IMPLICIT), ALL)
    ours = vmap(each, (0, None, None))(xs, weight, bias)
    theirs = [torch.stack(g) for g in zip(*(each(x, weight, bias) for x in xs), strict=True)]
    check_close(ours, theirs)


def test_the_gradient_of_a_vmapped_solve_and_its_hessian():
    xs, (_, weight, bias) = several()[0], detached()

    def total(solved):
        return lambda w: vmap(lambda x: solved(x, w, bias))(xs).pow(3).sum()

    def looped(w):
        return sum(UNROLLED(x, w, bias).pow(3).sum() for x in xs)

    check_close(grad(total(IMPLICIT))(weight), grad(looped)(weight))
    check_close(hessian(total(IMPLICIT))(weight), hessian(looped)(weight))


def test_nested_vmap():
    xs, weights, bias = several()[0], several()[1], detached()[2]
    ours = vmap(lambda w: vmap(lambda x: IMPLICIT(x, w, bias))(xs))(weights)
    theirs = torch.stack([torch.stack([IMPLICIT(x, w, bias) for x in xs]) for w in weights])
    check_close(ours, theirs)


class Cell(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(3, 3)
        with torch.no_grad():
            self.linear.weight *= 0.5

    def forward(self, z, x):
        return torch.tanh(self.linear(z) + x)


def test_an_ensemble_of_layers_trains_by_backward():
    torch.manual_seed(0)
    layers = [
        deqcore.ImplicitLayer(Cell(), TIGHT, Implicit(solver=TIGHT)).double() for _ in range(3)
    ]
    x = several(dim=3)[0][0]
    parameters, buffers = stack_module_state(layers)

    def call(parameters, buffers):
        return functional_call(layers[0], (parameters, buffers), (x,))

    vmap(call)(parameters, buffers).pow(2).sum().backward()
    sum(layer(x).pow(2).sum() for layer in layers).backward()
    for name, stacked in parameters.items():
        alone = torch.stack([dict(layer.named_parameters())[name].grad for layer in layers])
        torch.testing.assert_close(stacked.grad, alone, rtol=1e-8, atol=1e-8)


def test_vmap_of_a_backward_through_an_eager_solve():
    leaves = inputs()
    value = IMPLICIT(*leaves)
    check_mapped_backward(value, leaves)


def test_jacobians_of_layers_train_parameters_by_backward():
    """torch.func inside, torch.autograd outside."""

    def grads(solved):
        x, weight, bias = inputs()
        jacobian = jacrev(lambda x: solved(x, weight, bias))(x.detach())
        jacobian.square().sum().backward()
        return weight.grad, bias.grad

    check_close(grads(IMPLICIT), grads(UNROLLED))


def test_root_under_transforms():
    x, weight, _ = detached()

    def by_root(x):
        return deqcore.root(
            lambda z: torch.tanh(z @ weight + x) - z, torch.zeros_like(x), solver=TIGHT,
            adjoint=Implicit(solver=TIGHT), u_scale=2.0, f_scale=x.detach().abs().mean() + 1,
        ).value  # fmt: skip

    def by_fixed_point(x):
        return deqcore.fixed_point(
            lambda z: torch.tanh(z @ weight + x), torch.zeros_like(x), solver=TIGHT,
            adjoint=Unrolled(),
        ).value  # fmt: skip

    check_close(jacrev(by_root)(x), jacrev(by_fixed_point)(x))
    check_close(jacfwd(by_root)(x), jacfwd(by_fixed_point)(x))
    f_scaled = torch.stack([x, 2 * x])
    check_close(vmap(by_root)(f_scaled), torch.stack([by_root(one) for one in f_scaled]))


def test_states_of_several_leaves_and_aux_under_transforms():
    x = detached()[0]

    def solved(x, adjoint):
        def f(z):
            a, b = z["a"], z["b"]
            return {"a": torch.tanh(0.5 * b + x), "b": 0.3 * a.sin()}, a.sum()

        z0 = {"a": torch.zeros_like(x), "b": torch.zeros_like(x)}
        solution = deqcore.fixed_point(f, z0, solver=TIGHT, adjoint=adjoint, has_aux=True)
        return solution.value["a"], solution.aux

    def value(adjoint):
        return lambda x: solved(x, adjoint)[0]

    implicit = Implicit(solver=TIGHT)
    check_close(jacrev(value(implicit))(x), jacrev(value(Unrolled()))(x))
    xs = torch.stack([x, 2 * x])
    mapped = vmap(lambda x: solved(x, implicit))(xs)
    alone = zip(*(solved(x, implicit) for x in xs), strict=True)
    check_close(mapped, [torch.stack(one) for one in alone])


@pytest.mark.parametrize("steps", [1, 3])
def test_phantom_under_transforms_is_its_own_gradient(steps):
    leaves = inputs()
    phantom = with_adjoint(Phantom(steps=steps))
    expected = torch.autograd.grad(loss_of(phantom)(*leaves), leaves)
    plain = detached()
    check_close(grad(loss_of(phantom), ALL)(*plain), expected)
    value, tangent = jvp(phantom, plain, TANGENTS)
    assert torch.equal(value, phantom(*plain))
    jacobians = jacrev(phantom, ALL)(*plain)
    by_rows = sum(
        torch.tensordot(jacobian, t, t.dim())
        for jacobian, t in zip(jacobians, TANGENTS, strict=True)
    )
    check_close(tangent, by_rows)
    xs = several()[0]
    check_close(
        vmap(phantom, (0, None, None))(xs, *plain[1:]),
        torch.stack([phantom(x, *plain[1:]) for x in xs]),
    )


def test_a_solve_beside_what_is_mapped_or_differentiated_is_made_once():
    calls = []

    def f(z):
        calls.append(z)
        return 0.5 * z + 1.0

    def solved(x):
        return x + deqcore.fixed_point(f, torch.zeros(2, 3)).value

    alone = solved(torch.zeros(2, 3))
    count = len(calls)
    mapped = vmap(solved)(torch.zeros(5, 2, 3))
    assert torch.equal(mapped, alone.expand(5, 2, 3))
    assert all(z.shape == (2, 3) for z in calls)
    assert not any(torch._C._functorch.is_batchedtensor(z) for z in calls)
    assert len(calls) <= 2 * count + 2


@pytest.mark.parametrize("transform", [grad, lambda f: lambda x: jvp(f, (x,), (x,))])
def test_a_linear_solve_that_fails_in_a_transform_acts_as_in_backward(transform):
    def solved(on_failure):
        def loss(x):
            solution = deqcore.fixed_point(
                lambda z: 3.0 * z + x, torch.zeros(1, 2, dtype=torch.float64),
                solver=Broyden(**EXACT), adjoint=Implicit(solver=Picard(), on_failure=on_failure),
            )  # fmt: skip
            return solution.value.sum()

        return loss

    x = torch.ones(1, 2, dtype=torch.float64)
    with pytest.raises(deqcore.ConvergenceError, match="linear solve"):
        transform(solved("raise"))(x)
    with pytest.warns(deqcore.ConvergenceWarning, match="linear solve"):
        transform(solved("warn"))(x)
    check_close(transform(solved("fallback"))(x), transform(lambda x: (-0.5 * x).sum())(x))


def test_autograd_twice_inside_of_one_transform_says_what_to_nest():
    x, weight, bias = detached()

    def penalty(x):
        (slope,) = torch.autograd.grad(IMPLICIT(x, weight, bias).sum(), x, create_graph=True)
        return slope.square().sum()

    with pytest.raises(RuntimeError, match=r"nest the transforms"):
        grad(penalty)(x)


def test_no_grad_inside_and_outside_of_a_transform():
    leaves = detached()
    with torch.no_grad():
        ours = grad(loss_of(IMPLICIT), ALL)(*leaves)
    check_close(ours, grad(loss_of(IMPLICIT), ALL)(*leaves))

    def constant(x, weight, bias):
        with torch.no_grad():
            value = IMPLICIT(x, weight, bias)
        return (x * value).sum()

    check_close(grad(constant)(*leaves), IMPLICIT(*leaves))


def test_default_solvers_in_single_precision():
    leaves = tuple(leaf.float() for leaf in detached(4, 5))
    solved = with_adjoint(Implicit(), solver=Anderson())
    theirs = grad(loss_of(UNROLLED), ALL)(*[leaf.double() for leaf in leaves])
    for one, other in zip(grad(loss_of(solved), ALL)(*leaves), theirs, strict=True):
        torch.testing.assert_close(one.double(), other, rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize("adjoint", [Phantom(), Unrolled()], ids=["Phantom", "Unrolled"])
def test_steps_that_autograd_follows_have_what_it_has(adjoint):
    """A mapped backward, autograd twice inside of a transform, and a third derivative."""
    solved, leaves = with_adjoint(adjoint), inputs()
    value = solved(*leaves)
    check_mapped_backward(value, leaves)

    def penalty(x):
        (slope,) = torch.autograd.grad(solved(x, *leaves[1:]).pow(3).sum(), x, create_graph=True)
        return slope.square().sum()

    (expected,) = torch.autograd.grad(penalty(leaves[0]), leaves[0])
    check_close(grad(penalty)(leaves[0].detach()), expected)

    w = torch.ones(1, 2, dtype=torch.float64, requires_grad=True)
    slope = deqcore.fixed_point(
        lambda z: 0.5 * z + w**3, torch.zeros_like(w), solver=TIGHT, adjoint=adjoint
    ).value
    for _ in range(3):
        (slope,) = torch.autograd.grad(slope.sum(), w, create_graph=True)
    check_close(slope, torch.full_like(w, 6.0 if isinstance(adjoint, Phantom) else 12.0))
