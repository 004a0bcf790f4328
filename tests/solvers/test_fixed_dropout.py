"""Dropout whose mask lasts for a solve."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import deqcore
from deqcore import Anderson, FixedDropout, Implicit, ImplicitLayer, Phantom, Unrolled
from tests.solvers.test_coupled_elsewhere import captured
from tests.support.problems import rms

TIGHT = Anderson(rtol=1e-10, atol=1e-12, max_steps=200, patience=200)
ADJOINTS = [Implicit(solver=TIGHT), Phantom(), Unrolled(), Unrolled(checkpoint_every=2)]


class Cell(nn.Module):
    def __init__(self, dim=6, p=0.3, **options):
        super().__init__()
        self.linear = nn.Linear(dim, dim)
        nn.init.orthogonal_(self.linear.weight, gain=0.6)
        self.dropout = FixedDropout(p, **options)
        self.double()

    def forward(self, z, x):
        return torch.tanh(self.linear(self.dropout(z))) + x


def by_hand(cell, x, seed):
    """(solution, gradients) with the mask that a seed gives, by autograd through many steps."""
    p = cell.dropout.p
    torch.manual_seed(seed)
    mask = torch.empty_like(x).bernoulli_(1 - p) / (1 - p)
    z = torch.zeros_like(x)
    for _ in range(150):
        z = torch.tanh(cell.linear(z * mask)) + x
    return z, torch.autograd.grad(z.square().sum(), [*cell.parameters()])


@pytest.mark.parametrize("adjoint", ADJOINTS, ids=str)
def test_solutions_and_gradients_are_those_of_one_mask(adjoint):
    cell, x = Cell(), torch.randn(32, 6, dtype=torch.float64)
    torch.manual_seed(5)
    solution = deqcore.fixed_point(cell, torch.zeros_like(x), x, solver=TIGHT, adjoint=adjoint)
    solution.raise_for_status()
    cell.dropout(torch.ones(1, 1).double())  # other calls and solves in between change nothing
    with torch.no_grad():
        deqcore.fixed_point(cell, torch.zeros_like(x[:3]), x[:3])
    gradients = torch.autograd.grad(solution.value.square().sum(), [*cell.parameters()])
    value, expected = by_hand(cell, x, seed=5)
    torch.testing.assert_close(solution.value, value, rtol=1e-8, atol=1e-8)
    if not isinstance(adjoint, Phantom):
        torch.testing.assert_close(gradients, expected, rtol=1e-6, atol=1e-6)


def test_each_solve_has_a_mask_of_its_own():
    layer, x = ImplicitLayer(Cell()), torch.randn(4, 6, dtype=torch.float64)
    with torch.no_grad():
        a, b = layer(x), layer(x)
    layer.report.raise_for_status()
    assert (a != b).any()
    layer.eval()
    assert torch.equal(layer(x), layer(x))


def test_two_modules_have_different_masks_and_one_has_the_same_in_each_place():
    one, two = FixedDropout(0.5), FixedDropout(0.5)
    seen = []

    def f(z):
        seen.append((one(torch.ones_like(z)), two(torch.ones_like(z)), one(torch.ones_like(z))))
        return 0.5 * z

    deqcore.fixed_point(f, torch.ones(4, 50))
    assert len(seen) > 2
    assert all(torch.equal(a, seen[0][0]) and torch.equal(a, c) for a, _, c in seen)
    assert not torch.equal(*seen[0][:2])


def test_the_share_of_zeros_and_the_scale_are_those_of_dropout():
    mask = FixedDropout(0.3)(torch.ones(100, 1000))
    assert set(mask.unique().tolist()) == {0.0, torch.tensor(1 / 0.7).item()}
    assert abs((mask == 0).double().mean().item() - 0.3) < 0.01
    assert FixedDropout(1.0)(torch.ones(3, 3)).eq(0).all()
    assert FixedDropout(0.0)(torch.ones(3, 3)).eq(1).all()


@pytest.mark.parametrize(("shared", "shape"), [((1,), (4, 7, 50)), ((2, -1), (4, 50, 3, 3))])
def test_elements_share_their_fate_along_shared_dims(shared, shape):
    mask = FixedDropout(0.5, shared=shared)(torch.ones(shape))
    assert torch.equal(mask, mask.amax(shared, keepdim=True).expand(shape))
    assert 0 < (mask == 0).double().mean() < 1


def test_a_solve_inside_of_f_has_the_masks_of_the_outer_one():
    inner, x = Cell(), torch.randn(8, 6, dtype=torch.float64)

    def f(z):
        return 0.5 * z + deqcore.fixed_point(inner, torch.zeros_like(x), x, solver=TIGHT).value

    with torch.no_grad():
        solution = deqcore.fixed_point(f, torch.zeros_like(x))
    solution.raise_for_status()


def test_regularizers_at_the_solution_see_its_mask():
    cell, x = Cell(), torch.randn(8, 6, dtype=torch.float64)
    with torch.no_grad():
        z = deqcore.fixed_point(cell, torch.zeros_like(x), x, solver=TIGHT).value
    assert rms(cell(z, x) - z).max() < 1e-8
    first = deqcore.spectral_radius(cell, z, x)
    torch.testing.assert_close(deqcore.spectral_radius(cell, z, x), first)
    cell.dropout.reset()
    assert rms(cell(z, x) - z).max() > 1e-3


@pytest.mark.parametrize("adjoint", ADJOINTS, ids=str)
def test_a_checkpointed_region_of_two_solves_has_both_masks_again(adjoint):
    layer = ImplicitLayer(Cell(), solver=TIGHT, adjoint=adjoint)

    def gradients(run):
        torch.manual_seed(1)
        x = torch.linspace(-1, 1, 24, dtype=torch.float64).view(4, 6).requires_grad_()
        layer.zero_grad()
        out = run(x)
        out.square().sum().backward()
        return out.detach(), x.grad, [p.grad for p in layer.parameters()]

    twice = lambda x: layer(layer(x))
    plain = gradients(twice)
    again = gradients(lambda x: checkpoint(twice, x, use_reentrant=False))
    torch.testing.assert_close(plain, again, rtol=0, atol=0)


def gradient_with_a_checkpoint_inside(f, cell, x, adjoint):
    torch.manual_seed(1)
    value = deqcore.fixed_point(f, torch.zeros_like(x), x, adjoint=adjoint).value
    deqcore.fixed_point(cell, torch.zeros_like(x), x)  # with another mask
    return torch.autograd.grad(value.sum(), [*cell.parameters()])


@pytest.mark.parametrize("adjoint", ADJOINTS[:3], ids=str)
def test_a_checkpoint_inside_of_f_is_refused(adjoint):
    cell, x = Cell(), torch.randn(4, 6, dtype=torch.float64)
    f = lambda z, x: checkpoint(cell, z, x, use_reentrant=False)
    with pytest.raises(RuntimeError, match="checkpoint the whole solve"):
        gradient_with_a_checkpoint_inside(f, cell, x, adjoint)


def test_a_checkpoint_inside_of_f_is_right_where_steps_are_checkpointed():
    cell, x = Cell(), torch.randn(4, 6, dtype=torch.float64)
    f = lambda z, x: checkpoint(cell, z, x, use_reentrant=False)
    again = gradient_with_a_checkpoint_inside(f, cell, x, Unrolled(checkpoint_every=2))
    plain = gradient_with_a_checkpoint_inside(cell, cell, x, Unrolled())
    torch.testing.assert_close(again, plain, rtol=0, atol=0)


def test_a_captured_solve_keeps_the_mask_of_the_recording():
    cell, x = Cell(), torch.randn(4, 6, dtype=torch.float64)
    cell(x, x)  # outside of a solve: another mask
    torch.manual_seed(5)
    solve = captured(cell, torch.zeros_like(x), x, solver=TIGHT)
    value, _ = by_hand(cell, x, seed=5)
    for _ in range(2):
        torch.testing.assert_close(solve(torch.zeros_like(x), x).value, value, rtol=1e-8, atol=1e-8)


def test_it_can_be_used_in_inference_mode_and_then_trained():
    cell, x = Cell(), torch.randn(4, 6, dtype=torch.float64)
    with torch.inference_mode():
        deqcore.fixed_point(cell, torch.zeros_like(x), x).raise_for_status()
    cell(torch.zeros_like(x), x).sum().backward()


def test_copies_have_masks_of_their_own_and_no_state():
    cell, x = Cell(), torch.randn(4, 6, dtype=torch.float64)
    deqcore.fixed_point(cell, torch.zeros_like(x), x)
    assert set(cell.state_dict()) == {"linear.weight", "linear.bias"}
    for other in (copy.deepcopy(cell), pickle.loads(pickle.dumps(cell))):
        deqcore.fixed_point(other, torch.zeros_like(x), x).raise_for_status()
        assert other.dropout.p == 0.3
    assert "p=0.3" in repr(cell)


@pytest.mark.parametrize("p", [-0.1, 1.1, True, "half"])
def test_a_bad_probability_is_refused(p):
    with pytest.raises(ValueError, match="p: expected a probability"):
        FixedDropout(p)


def test_a_diagnosis_tells_it_from_dropout_that_is_drawn_anew():
    fixed = Cell()
    both = nn.Sequential(nn.Dropout(0.3), fixed.dropout, fixed.linear).double()
    z0 = torch.ones(4, 6, dtype=torch.float64)
    fine = deqcore.diagnose(lambda z: 0.5 * fixed.linear(fixed.dropout(z)), z0)
    assert "Two evaluations at the same z agree" in str(fine)
    text = " ".join(str(deqcore.diagnose(both, z0)).split())
    assert "draws random numbers (Dropout in training mode)" in text
    assert "FixedDropout" in text
