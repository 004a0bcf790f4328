"""The value of a solve as a tensor in someone's model: graph, in-place changes, autocast, reuse."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

import deqcore
from deqcore import Anderson, Broyden, Implicit, Phantom, Picard, Unrolled
from tests.support.problems import equal, wave_batch

ADJOINTS = [
    Implicit(), Phantom(), Phantom(steps=3, damping=0.5), Unrolled(), Unrolled(checkpoint_every=2),
]  # fmt: skip


@pytest.fixture(params=ADJOINTS, ids=[
    "Implicit", "Phantom", "Phantom-damped", "Unrolled", "Unrolled-checkpointed",
])  # fmt: skip
def adjoint(request):
    return request.param


def cell(z, w):
    return 0.4 * torch.tanh(z * w) + w


def solve(w, adjoint, **options):
    return deqcore.fixed_point(cell, torch.zeros(2, 3), w, adjoint=adjoint, **options)


def weight():
    return torch.tensor([0.5, -0.3, 0.8], requires_grad=True)


def test_value_requires_no_grad_when_nothing_else_does(adjoint):
    for z0 in (torch.zeros(2, 3), {"a": torch.zeros(2, 3)}):
        solution = deqcore.fixed_point(
            lambda z: torch.utils._pytree.tree_map(lambda t: 0.5 * t + 1, z), z0, adjoint=adjoint
        )
        (value,) = torch.utils._pytree.tree_leaves(solution.value)
        assert not value.requires_grad
        assert value.grad_fn is None


def test_value_has_no_graph_under_no_grad(adjoint):
    with torch.no_grad():
        assert not solve(weight(), adjoint).value.requires_grad
    assert solve(weight(), adjoint).value.requires_grad


def test_value_may_be_changed_in_place(adjoint):
    w = weight()
    out_of_place = torch.relu(2 * solve(w, adjoint).value)
    (expected,) = torch.autograd.grad(out_of_place.square().sum(), w)
    value = solve(w, adjoint).value
    value *= 2
    F.relu(value, inplace=True)
    (got,) = torch.autograd.grad(value.square().sum(), w)
    assert equal(got, expected)


def test_value_may_be_changed_in_place_without_a_graph(adjoint):
    """Clamping the value must not change where the gradient is taken."""
    w = weight()
    expected = torch.autograd.grad(solve(w, adjoint).value.sum(), w)
    value = solve(w, adjoint).value
    with torch.no_grad():
        value.clamp_(max=0.1)
    assert (value <= 0.1).all()
    assert equal(torch.autograd.grad(value.sum(), w)[0], expected[0])


def test_leaves_of_a_pytree_value_may_be_changed_in_place(adjoint):
    w = weight()
    z0 = {"a": torch.zeros(2, 3), "b": torch.zeros(2, 3)}

    def value():
        return deqcore.fixed_point(
            lambda z: {"a": cell(z["a"], w), "b": 0.5 * z["b"] + w}, z0, adjoint=adjoint
        ).value

    tree = value()
    (expected,) = torch.autograd.grad((2 * tree["a"] + 3 * tree["b"]).sum(), w)
    tree = value()
    tree["a"].mul_(2)
    tree["b"].mul_(3)
    (got,) = torch.autograd.grad((tree["a"] + tree["b"]).sum(), w)
    torch.testing.assert_close(got, expected)


def test_gradient_of_nested_solutions_is_right(adjoint):
    """An inner fixed point in each evaluation of the outer one."""
    tight = {"solver": Anderson(rtol=1e-10, atol=1e-11)}
    w = weight().detach().double().requires_grad_()

    def outer(z, w):
        inner = deqcore.fixed_point(
            lambda y: 0.3 * torch.tanh(y + z) + w, torch.zeros_like(z), adjoint=adjoint, **tight
        )
        return 0.5 * torch.sin(inner.value)

    z0 = torch.zeros(2, 3, dtype=torch.float64)
    value = deqcore.fixed_point(outer, z0, w, adjoint=adjoint, **tight).value
    (got,) = torch.autograd.grad(value.sum(), w)
    y = z = torch.zeros(2, 3, dtype=torch.float64)
    for _ in range(60):
        y, z = 0.3 * torch.tanh(y + z) + w, 0.5 * torch.sin(y)
    (expected,) = torch.autograd.grad(z.sum(), w)
    exact = not isinstance(adjoint, Phantom)
    torch.testing.assert_close(value, z, rtol=1e-8, atol=1e-8)
    if exact:
        torch.testing.assert_close(got, expected, rtol=2e-4, atol=2e-4)
    else:
        assert F.cosine_similarity(got, expected, dim=0) > 0.9


def test_solution_used_twice_in_one_graph(adjoint):
    w = weight()
    first = solve(w, adjoint).value
    second = solve(first.mean(0), adjoint).value
    (both,) = torch.autograd.grad((first + second).sum(), w)
    first = solve(w, adjoint).value
    inner = first.mean(0).detach().requires_grad_()
    second = solve(inner, adjoint).value
    (to_inner,) = torch.autograd.grad(second.sum(), inner)
    (expected,) = torch.autograd.grad(first.sum() + (first.mean(0) * to_inner).sum(), w)
    torch.testing.assert_close(both, expected, rtol=1e-5, atol=1e-5)


def test_activation_checkpointing_around_a_solve_gives_the_same_gradient(adjoint):
    w = weight()

    def block(w):
        return 2 * solve(w, adjoint).value

    (expected,) = torch.autograd.grad(block(w).sum(), w)
    (got,) = torch.autograd.grad(checkpoint(block, w, use_reentrant=False).sum(), w)
    assert equal(got, expected)


# Not Anderson unrolled: its weights are fitted to residuals that are bfloat16 rounding here, and
# the gradient of such weights is noise.
@pytest.mark.parametrize(
    ("kind", "adjoint"),
    [
        (kind, adjoint)
        for kind in (Picard, Anderson, Broyden)
        for adjoint in (Implicit(), Phantom(), Unrolled(), Unrolled(checkpoint_every=2))
        if not (kind is Anderson and isinstance(adjoint, Unrolled))
    ],
)
def test_gradients_under_autocast_are_near_those_without(adjoint, kind):
    torch.manual_seed(0)
    layer = torch.nn.Linear(16, 16)
    torch.nn.init.orthogonal_(layer.weight, gain=0.5)
    x = torch.randn(4, 16)

    def gradient():
        value = deqcore.fixed_point(
            lambda z: torch.tanh(layer(z) + x), torch.zeros(4, 16), solver=kind(), adjoint=adjoint
        ).value
        assert value.dtype == torch.float32
        return torch.autograd.grad(value.square().sum(), layer.weight)[0]

    plain = gradient()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        under = gradient()
    assert (under - plain).norm() <= 0.05 * plain.norm()


def test_f_that_differentiates_inside_works(adjoint):
    """A cell that is the gradient of an energy asks for grad mode itself."""
    w = weight()

    def energy_step(z, w):
        with torch.enable_grad():
            z = z if z.requires_grad else z.detach().requires_grad_()
            energy = (0.5 * (z - w).square() + 0.1 * torch.cos(z)).sum()
            return z - 0.7 * torch.autograd.grad(energy, z, create_graph=True)[0]

    value = deqcore.fixed_point(
        energy_step, torch.zeros(2, 3), w, adjoint=adjoint, solver=Picard(max_steps=40)
    ).value
    stationary = value - w - 0.1 * torch.sin(value)
    assert stationary.abs().max() < 1e-3
    (grad,) = torch.autograd.grad(value.sum(), w)
    assert (grad > 0).all()


def test_every_row_ended_differently_still_has_its_gradient():
    z0, shift, _ = wave_batch(3, 4, seed=1)
    factors = torch.tensor([[0.5], [50.0], [0.99]], dtype=torch.float64)
    shift.requires_grad_()
    solution = deqcore.fixed_point(lambda z: factors * z + shift, z0, solver=Picard(max_steps=20))
    assert len(set(solution.status.tolist())) == 3
    solution.value.sum().backward()
    assert (shift.grad[0] - 2).abs().max() < 1e-3
    assert shift.grad.isfinite().all()
