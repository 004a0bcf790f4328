"""Spectral and weight norm for cells."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import deqcore
from deqcore.normalization import remove_normalization, spectral_normalize, weight_normalize
from tests.support.problems import generator


class Cell(nn.Module):
    def __init__(self, dim=6, gain=3.0):
        super().__init__()
        self.inner = nn.Linear(dim, 2 * dim)
        self.outer = nn.Linear(2 * dim, dim)
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.mul_(gain)

    def forward(self, z, x):
        return self.outer(torch.tanh(self.inner(z))) + x


LAYERS = [
    lambda: nn.Linear(5, 7),
    lambda: nn.Conv1d(3, 4, 3),
    lambda: nn.Conv2d(4, 6, 3, groups=2),
    lambda: nn.Conv3d(2, 3, 2),
    lambda: nn.ConvTranspose1d(3, 5, 2),
    lambda: nn.ConvTranspose2d(4, 3, 2),
]
NORMS = [spectral_normalize, weight_normalize]


def matrix(layer):
    transposed = "Transpose" in type(layer).__name__
    return layer.weight.detach().movedim(1 if transposed else 0, 0).flatten(1)


def largest(layer):
    return torch.linalg.matrix_norm(matrix(layer), 2)


# Spectral norm


@pytest.mark.parametrize("make", LAYERS)
@given(bound=st.floats(0.05, 20), seed=st.integers(0, 2**31))
def test_the_spectral_norm_is_bounded_and_smaller_weights_stay(make, bound, seed):
    layer = make()
    with torch.no_grad():
        layer.weight.normal_(generator=generator(seed))
    before, norm = layer.weight.clone(), largest(layer)
    spectral_normalize(layer, bound=bound)
    torch.testing.assert_close(largest(layer), norm.clamp(max=bound))
    if norm < bound:
        torch.testing.assert_close(layer.weight, before)


def test_the_weight_does_not_move_while_it_is_used_and_follows_the_optimizer():
    cell = spectral_normalize(Cell(), bound=0.5).train()
    optimizer = torch.optim.SGD(cell.parameters(), lr=0.3)
    x = torch.randn(4, 6)
    for _ in range(20):
        first = cell.inner.weight
        assert all(torch.equal(first, cell.inner.weight) for _ in range(3))
        optimizer.zero_grad()
        cell(x, x).square().mean().backward()
        optimizer.step()
        assert not torch.equal(first, cell.inner.weight)
        assert largest(cell.inner) < 0.5 * 1.02


@pytest.mark.parametrize("batch", ["rows", "coupled"])
def test_bound_follows_a_weight_that_changed_before_a_solve(batch):
    layer = spectral_normalize(nn.Linear(3, 3, bias=False), bound=0.5, iterations=50)
    with torch.no_grad():
        layer.parametrizations.weight.original.copy_(torch.diag(torch.tensor([1.0, 2.0, 5.0])))
        layer.parametrizations.weight.original[0, 1] = 0.5
    x = torch.ones(4, 3)
    solution = deqcore.fixed_point(lambda z: layer(z) + x, torch.zeros(4, 3), batch=batch)
    solution.raise_for_status()
    assert torch.linalg.matrix_norm(layer.weight, 2).item() == pytest.approx(0.5, rel=1e-4)


def test_evaluation_mode_keeps_the_singular_vectors():
    cell = spectral_normalize(Cell(), bound=0.5).eval()
    vectors = {name: value.clone() for name, value in cell.named_buffers()}
    with torch.no_grad():
        cell.inner.parametrizations.weight.original.mul_(2).add_(0.1)
    cell(torch.ones(1, 6), 0)
    assert all(torch.equal(value, vectors[name]) for name, value in cell.named_buffers())


def test_a_bounded_cell_converges_and_trains_where_the_free_one_does_not():
    x = torch.randn(5, 6)
    solver = deqcore.Picard(max_steps=60)
    with torch.no_grad():
        free = deqcore.fixed_point(Cell(), torch.zeros(5, 6), x, solver=solver)
    assert not free.converged.all()
    layer = deqcore.ImplicitLayer(spectral_normalize(Cell(), bound=0.8), solver)
    layer(x).sum().backward()
    assert layer.report.converged.all()
    assert layer.report.backward.converged.all()
    assert all(p.grad is not None and p.grad.any() for p in layer.parameters())


def test_gradient_is_that_of_finite_differences():
    layer = spectral_normalize(nn.Linear(3, 4).double(), bound=0.4).eval()
    norm = layer.parametrizations.weight[0]
    weight = layer.parametrizations.weight.original.detach().clone().requires_grad_()
    assert torch.autograd.gradcheck(norm, weight)


def test_two_uses_across_a_change_of_weight_can_be_differentiated():
    layer = spectral_normalize(nn.Linear(4, 4), bound=0.1)
    first = layer.weight.sum()
    with torch.no_grad():
        layer.parametrizations.weight[0].u.mul_(1)  # as a broadcast of buffers does
    first.backward()


def follow(layer, uses):
    """Use the layer in training mode, each time after a change that PyTorch counts."""
    for _ in range(uses):
        with torch.no_grad():
            layer.parametrizations.weight.original.mul_(1)
        layer(torch.ones(1, layer.in_features))


@pytest.mark.parametrize("dead", [False, True])
def test_the_bound_holds_for_a_weight_that_starts_at_zero(dead):
    """``dead``: the first input is always zero, so that its weights stay zero in training."""
    layer = nn.Linear(8, 8, bias=False)
    nn.init.zeros_(layer.weight)
    spectral_normalize(layer, bound=0.9)
    optimizer = torch.optim.SGD(layer.parameters(), lr=1.0)
    x = torch.randn(64, 8, generator=generator(0))
    x[:, 0] *= not dead
    for _ in range(100):
        optimizer.zero_grad()
        (5 * x - layer(x)).square().mean().backward()
        optimizer.step()
    follow(layer, 20)
    assert largest(layer) < 0.9 * 1.02
    assert largest(layer) > 0.8


@pytest.mark.parametrize("meanwhile", [0.0, 1e-30, float("nan"), float("inf")])
def test_the_bound_comes_back_after_a_weight_that_has_no_direction(meanwhile):
    layer = spectral_normalize(nn.Linear(8, 8, bias=False), bound=0.9)
    original = layer.parametrizations.weight.original
    with torch.no_grad():
        original.fill_(meanwhile)
    follow(layer, 2)
    torch.testing.assert_close(layer.parametrizations.weight[0].v.norm(), torch.tensor(1.0))
    with torch.no_grad():
        original.copy_(10 * torch.randn(8, 8, generator=generator(0)))
    follow(layer, 50)
    assert largest(layer) < 0.9 * 1.02


def test_a_change_through_data_is_followed_after_the_call_that_the_docstring_names():
    layer = spectral_normalize(nn.Linear(8, 8, bias=False), bound=0.9)
    vector = 10 * torch.randn(64, generator=generator(0))
    nn.utils.vector_to_parameters(vector, layer.parameters())
    follow(layer, 50)
    assert largest(layer) < 0.9 * 1.02


def test_the_bound_does_not_depend_on_the_lengths_of_averaged_vectors():
    layer = spectral_normalize(nn.Linear(8, 8, bias=False).double(), bound=0.1).eval()
    norm = layer.parametrizations.weight[0]
    original = layer.parametrizations.weight.original
    norm.u.mul_(0.3)
    norm.v.mul_(0.2)
    torch.testing.assert_close(largest(layer), torch.tensor(0.1, dtype=torch.float64))
    assert torch.autograd.gradcheck(norm, original.detach().clone().requires_grad_())


def test_averaged_models_are_near_the_bound_and_meet_it_when_normalised_anew():
    layer = spectral_normalize(nn.Linear(8, 8, bias=False), bound=0.9)
    averaged = torch.optim.swa_utils.AveragedModel(layer, use_buffers=True)
    optimizer = torch.optim.SGD(layer.parameters(), lr=1.0)
    g = generator(0)
    for _ in range(100):
        x, noise = torch.randn(2, 32, 8, generator=g)
        optimizer.zero_grad()
        (layer(x) - 5 * x - 5 * noise).square().mean().backward()
        optimizer.step()
        averaged.update_parameters(layer)
    averaged.eval()
    assert averaged.module.parametrizations.weight[0].u.norm() < 0.5
    assert largest(averaged.module) < 0.9 * 1.5
    spectral_normalize(remove_normalization(averaged), bound=0.9)
    assert largest(averaged.module) < 0.9 * 1.0001


def test_a_substituted_weight_is_followed_in_training_whatever_its_version():
    layer = spectral_normalize(nn.Linear(8, 8, bias=False), bound=0.9, iterations=50)
    version = layer.parametrizations.weight.original._version
    name = "parametrizations.weight.original"

    def weight_of(original):
        return torch.func.functional_call(layer, {name: original}, (torch.eye(8),)).detach()

    other = torch.zeros(8, 8)
    others = [torch.randn(8, 8, generator=generator(seed)) for seed in range(3)]
    for scale, value in enumerate(others, start=10):
        other = torch.empty(8, 8)
        for _ in range(version):
            other.copy_(scale * value)
        assert other._version == version
        first = weight_of(other)
        assert torch.linalg.matrix_norm(first, 2) < 0.9 * 1.02
        assert torch.equal(weight_of(other), first)
    vectors = layer.parametrizations.weight[0].u.clone()
    weight_of(other)
    assert torch.equal(layer.parametrizations.weight[0].u, vectors)
    assert largest(layer) < 0.9 * 1.02  # its own weight again


@pytest.mark.parametrize("training", [True, False])
def test_a_copy_follows_its_own_weight(training):
    cell = spectral_normalize(Cell(), bound=0.5, iterations=20)
    twin = copy.deepcopy(cell).train(training)
    with torch.no_grad():
        twin.inner.parametrizations.weight.original.normal_(generator=generator(0)).mul_(5)
    followed = largest(twin.inner) < 0.5 * 1.02
    assert followed == training
    assert largest(cell.inner) < 0.5 * 1.02


def test_half_precision_weights():
    layer = spectral_normalize(nn.Linear(16, 16).bfloat16(), bound=0.5)
    assert layer.weight.dtype == torch.bfloat16
    assert torch.linalg.matrix_norm(layer.weight.float(), 2) < 0.51


# Weight norm


@pytest.mark.parametrize("make", LAYERS)
def test_weight_norm_keeps_the_weight_and_frees_the_length_of_each_output(make):
    layer = make()
    before = layer.weight.detach().clone()
    weight_normalize(layer)
    torch.testing.assert_close(layer.weight, before)
    lengths, directions = layer.parametrizations.weight.parameters()
    torch.testing.assert_close(lengths.flatten(), matrix(layer).norm(dim=1))
    with torch.no_grad():
        directions.mul_(3)
    torch.testing.assert_close(layer.weight, before)


def test_an_output_of_zeros_stays_so_and_can_be_trained():
    layer = nn.Linear(3, 2)
    nn.init.zeros_(layer.weight)
    weight_normalize(layer)
    assert torch.equal(layer.weight, torch.zeros(2, 3))
    layer(torch.ones(1, 3)).sum().backward()
    lengths, _ = layer.parametrizations.weight.parameters()
    assert (lengths.grad > 0).all()


# Both


@pytest.mark.parametrize("normalize", NORMS)
def test_removal_keeps_the_weight_and_leaves_an_ordinary_module(normalize):
    cell = normalize(Cell())
    x = torch.randn(3, 6)
    expected = cell(x, x)
    assert remove_normalization(cell) is cell
    torch.testing.assert_close(cell(x, x), expected)
    assert cell.state_dict().keys() == Cell().state_dict().keys()
    assert torch.equal(pickle.loads(pickle.dumps(cell))(x, x), cell(x, x))
    normalize(cell)  # may be applied again


@pytest.mark.parametrize("normalize", NORMS)
def test_copies_are_independent_and_state_dicts_make_the_round_trip(normalize, tmp_path):
    cell = normalize(Cell())
    x = torch.randn(3, 6)
    twin = copy.deepcopy(cell)
    torch.testing.assert_close(twin(x, x), cell(x, x))
    with pytest.raises(RuntimeError, match=r"state_dict\(\)"):
        pickle.dumps(cell)
    torch.save(cell.state_dict(), tmp_path / "cell.pt")
    fresh = normalize(Cell())
    fresh.load_state_dict(torch.load(tmp_path / "cell.pt"))
    torch.testing.assert_close(fresh.eval()(x, x), cell.eval()(x, x), rtol=0, atol=0)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.add_(1)
    torch.testing.assert_close(fresh(x, x), cell(x, x), rtol=0, atol=0)


@pytest.mark.parametrize("normalize", NORMS)
def test_names_choose_layers_and_all_are_checked_first(normalize):
    cell = normalize(Cell(), names=["inner"])
    assert hasattr(cell.inner, "parametrizations")
    assert not hasattr(cell.outer, "parametrizations")
    with pytest.raises(ValueError, match="weight of 'inner' is parametrized already"):
        normalize(cell)
    with pytest.raises(ValueError, match="no submodule 'outter'; the nearest is 'outer'"):
        normalize(cell, names=["outer", "outter"])
    with pytest.raises(ValueError, match=r"'' is a Cell; expected nn\.Linear or a convolution"):
        normalize(cell, names=["outer", ""])
    assert not hasattr(cell.outer, "parametrizations")
    with pytest.raises(ValueError, match=r"ReLU has no nn\.Linear or convolution"):
        normalize(nn.ReLU())


def test_other_parametrizations_stay():
    cell = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    nn.utils.parametrizations.orthogonal(cell[0])
    spectral_normalize(cell, names=["1"])
    remove_normalization(cell)
    assert hasattr(cell[0], "parametrizations")
    assert not hasattr(cell[1], "parametrizations")


@pytest.mark.parametrize("bound", [0, -1.0, float("inf"), float("nan"), True, "1"])
def test_a_bad_bound_is_named(bound):
    with pytest.raises(ValueError, match="bound: expected a finite number above 0"):
        spectral_normalize(nn.Linear(2, 2), bound=bound)


@pytest.mark.parametrize("iterations", [0, 1.5, True])
def test_a_bad_number_of_iterations_is_named(iterations):
    with pytest.raises(ValueError, match="iterations: expected an integer of at least 1"):
        spectral_normalize(nn.Linear(2, 2), iterations=iterations)
