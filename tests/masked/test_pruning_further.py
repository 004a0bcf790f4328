"""Pruning what is pruned already, rewinding, and linears that compute something of their own."""

from __future__ import annotations

import copy
import re
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import deqcore
from deqcore import MaskedLinear


def mlp(width: int = 64) -> nn.Sequential:
    return nn.Sequential(nn.Linear(32, width), nn.Tanh(), nn.Linear(width, 32))


def sparsities(model: nn.Module) -> list[float]:
    return [m.pattern.sparsity for m in model.modules() if isinstance(m, MaskedLinear)]


class LoRALinear(nn.Linear):
    """A linear with a low-rank addition in its forward."""

    def __init__(self, *sizes: int) -> None:
        super().__init__(*sizes)
        self.a = nn.Parameter(torch.randn(2, sizes[0]))
        self.b = nn.Parameter(torch.randn(sizes[1], 2))

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + x @ self.a.T @ self.b.T


class FakeQuantised(nn.Linear):
    """A linear whose weight is rounded in its forward."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, (self.weight * 4).round() / 4, self.bias)


class CalledOtherwise(nn.Linear):
    """A linear with a call of its own."""

    def __call__(self, x: Tensor) -> Tensor:
        return 2 * super().__call__(x)


@pytest.mark.parametrize("kind", [LoRALinear, FakeQuantised, CalledOtherwise])
@pytest.mark.parametrize("by_name", [False, True])
def test_a_subclass_with_a_forward_of_its_own_is_refused_by_name_and_class(
    kind: type[nn.Linear], by_name: bool
) -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Sequential(kind(8, 6)))
    x = torch.randn(3, 8)
    before = model(x)
    scores: Any = {"1.0": torch.rand(6, 8)} if by_name else (lambda linear: linear.weight.abs())
    expected = rf"layer: '1\.0': expected the forward of Linear.*{kind.__qualname__}\) has a"
    with pytest.raises(ValueError, match=expected):
        deqcore.prune_layer(model, scores, 0.5)
    assert torch.equal(model(x), before)
    assert type(model[0]) is nn.Linear  # nothing was changed
    with pytest.raises(ValueError, match="forward of Linear"):
        MaskedLinear.from_linear(model[1][0], torch.ones(6, 8, dtype=torch.bool))
    deqcore.prune_layer(model, {"0": torch.rand(8, 8)}, 0.5)  # the others can be pruned by name


def test_a_forward_put_on_one_module_is_refused() -> None:
    model = nn.Sequential(nn.Linear(8, 8))
    model[0].forward = lambda x: torch.zeros_like(x)
    with pytest.raises(ValueError, match=r"layer: '0': .*the module itself .*forward of its own"):
        deqcore.prune_layer(model)


def test_a_parameter_that_computes_in_its_own_way_is_refused() -> None:
    class Special(Tensor):
        pass

    linear = nn.Linear(8, 8)
    linear.weight = nn.Parameter(torch.randn(8, 8).as_subclass(Special))
    with pytest.raises(ValueError, match=r"layer: expected weight to be a plain.*Special"):
        deqcore.prune_layer(linear)
    with pytest.raises(ValueError, match=r"no shape yet; run a batch through"):
        deqcore.prune_layer(nn.LazyLinear(4))


def test_a_subclass_that_computes_what_linear_does_is_pruned() -> None:
    attention = nn.MultiheadAttention(8, 2, batch_first=True)
    assert type(attention.out_proj) is not nn.Linear
    x = torch.randn(2, 5, 8)
    expected = attention(x, x, x)[0]
    deqcore.prune_layer(attention, sparsity=0.0)
    assert isinstance(attention.out_proj, MaskedLinear)
    torch.testing.assert_close(attention(x, x, x)[0], expected)


def test_restoring_refuses_it_too() -> None:
    state = deqcore.prune_layer(nn.Sequential(nn.Linear(8, 6))).state_dict()
    with pytest.raises(ValueError, match=r"layer: '0': expected the forward of Linear"):
        deqcore.restore_pruned(nn.Sequential(FakeQuantised(8, 6)), state)


@given(
    rounds=st.lists(st.floats(0, 1), min_size=2, max_size=4).map(sorted),
    structure=st.sampled_from([None, 16]),
    seed=st.integers(0, 1000),
)
def test_pruning_in_rounds_by_unchanged_scores_is_pruning_once(
    rounds: list[float], structure: Any, seed: int
) -> None:
    torch.manual_seed(seed)
    model = mlp()
    once = deqcore.prune_layer(copy.deepcopy(model), sparsity=rounds[-1], structure=structure)
    for sparsity in rounds:
        deqcore.prune_layer(model, sparsity=sparsity, structure=structure)
    x = torch.randn(4, 32)
    for first, second in ((model[0], once[0]), (model[2], once[2])):
        assert first.pattern == second.pattern
        assert torch.equal(first.values, second.values)
    assert torch.equal(model(x), once(x))


def test_a_second_pruning_reaches_pruned_and_dense_layers_alike() -> None:
    model = mlp()
    deqcore.prune_layer(model, {"0": model[0].weight.detach().abs()}, 0.5)
    deqcore.prune_layer(model, sparsity=0.9)
    assert sparsities(model) == pytest.approx([0.9, 0.9], abs=1e-3)


def test_what_was_dropped_never_comes_back_whatever_its_score() -> None:
    model = deqcore.prune_layer(nn.Linear(32, 32), sparsity=0.5)
    mask = model.pattern.mask()
    scores = torch.rand(32, 32).masked_fill(~mask, torch.nan)
    scores[~mask] = 1e9
    further = deqcore.prune_layer(model, {"": scores}, 0.75)
    assert not (further.pattern.mask() & ~mask).any()
    assert further.pattern.sparsity == 0.75
    assert torch.equal(further.weight, model.weight * further.pattern.mask())


def test_a_sparsity_below_what_is_dropped_already_is_refused() -> None:
    model = deqcore.prune_layer(mlp(), sparsity=0.75)
    values = model[0].values
    with pytest.raises(ValueError, match=r"sparsity: expected 0\.75 or more for '0'.*got 0\.5"):
        deqcore.prune_layer(model, sparsity=0.5)
    assert model[0].values is values
    assert sparsities(deqcore.prune_layer(model, sparsity=0.75)) == [0.75, 0.75]


def test_blocks_stay_blocks_and_entries_can_become_two_of_four() -> None:
    blocks = deqcore.prune_layer(mlp(), sparsity=0.5, structure=16)
    deqcore.prune_layer(blocks, sparsity=0.75)
    assert blocks[0].pattern.structure == 16
    entries = deqcore.prune_layer(nn.Linear(32, 32), sparsity=0.25)
    mask = entries.pattern.mask()
    two_four = deqcore.prune_layer(entries, sparsity=0.5, structure="2:4")
    assert two_four.pattern.structure == "2:4"
    assert not (two_four.pattern.mask() & ~mask).any()


def test_ties_frozen_parameters_mode_and_dtype_survive_a_second_pruning() -> None:
    model = mlp(32).to(torch.bfloat16).eval()
    model[2].weight = model[0].weight
    model[0].bias.requires_grad_(False)
    deqcore.prune_layer(model, sparsity=0.5)
    deqcore.prune_layer(model, sparsity=0.75)
    assert model[0].values is model[2].values
    assert model[0].values.dtype == torch.bfloat16
    assert not model[0].bias.requires_grad
    assert not model[0].training


def test_hooks_of_a_pruned_layer_are_not_dropped() -> None:
    model = deqcore.prune_layer(mlp(), sparsity=0.5)
    handle = model[0].register_forward_hook(lambda *args: None)
    with pytest.raises(ValueError, match="has hooks"):
        deqcore.prune_layer(model, sparsity=0.75)
    handle.remove()
    deqcore.prune_layer(model, sparsity=0.75)


@pytest.mark.parametrize("earlier", ["dense", "pruned less"])
def test_rewinding_gives_the_kept_weights_their_earlier_values(earlier: str) -> None:
    model = mlp()
    if earlier == "pruned less":
        deqcore.prune_layer(model, sparsity=0.25)
    start = copy.deepcopy(model)
    state = copy.deepcopy(model.state_dict())
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter))
    deqcore.prune_layer(model, sparsity=0.5)
    patterns = [model[0].pattern, model[2].pattern]
    assert deqcore.rewind_pruned(model, state) is model
    assert [model[0].pattern, model[2].pattern] == patterns
    for index in (0, 2):
        assert torch.equal(model[index].weight, start[index].weight * model[index].pattern.mask())
        assert torch.equal(model[index].bias, start[index].bias)
    assert state.keys() == start.state_dict().keys()  # the caller's state is as it was


def test_rewinding_to_a_state_that_lacks_entries_is_refused() -> None:
    sparse = deqcore.prune_layer(nn.Linear(32, 32), sparsity=0.9)
    wide = deqcore.prune_layer(nn.Linear(32, 32), sparsity=0.5)
    with pytest.raises(ValueError, match=r"values lacks \d+ of the 512 entries"):
        deqcore.rewind_pruned(wide, sparse.state_dict())
    with pytest.raises(ValueError, match=r"expected weight of shape \(32, 32\)"):
        deqcore.rewind_pruned(wide, nn.Linear(32, 16).state_dict())
    with pytest.raises(ValueError, match=re.escape("has neither weight nor values")):
        deqcore.rewind_pruned(wide, {})


def test_iterative_magnitude_pruning_with_rewinding_keeps_accuracy() -> None:
    """The lottery-ticket protocol end to end, on two moons' like data."""
    torch.manual_seed(0)
    angle = torch.rand(400) * torch.pi
    label = torch.arange(400) % 2
    side = 1.0 - 2.0 * label
    x = torch.stack([side * angle.cos() + label, side * angle.sin() + 0.5 * label], 1)
    x = x + 0.1 * torch.randn_like(x)

    def train(model: nn.Module) -> float:
        optimizer = torch.optim.Adam(model.parameters(), 0.02)
        for _ in range(150):
            optimizer.zero_grad()
            F.cross_entropy(model(x), label).backward()
            optimizer.step()
        return (model(x).argmax(1) == label).float().mean().item()

    model = nn.Sequential(nn.Linear(2, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(),
                          nn.Linear(64, 2))  # fmt: skip
    start = copy.deepcopy(model.state_dict())
    dense = train(model)
    for sparsity in (0.5, 0.75, 0.9):
        # By name: what connects two inputs and two outputs has nothing to spare.
        deqcore.prune_layer(model, {"2": model[2].weight.detach().abs()}, sparsity)
        deqcore.rewind_pruned(model, start)
        ticket = train(model)
    assert dense > 0.97
    assert ticket > 0.95
    assert sparsities(model) == pytest.approx([0.9], abs=0.001)
