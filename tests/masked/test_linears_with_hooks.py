"""Pruning linears that have hooks: those of torch.nn.utils, which compute weights, and others."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import prune

import deqcore
from deqcore import MaskedLinear


def masked_by_torch(names: tuple[str, ...] = ("weight",)) -> nn.Linear:
    linear = nn.Linear(8, 6)
    for name in names:
        prune.random_unstructured(linear, name, amount=0.5)
    return linear


def loaded() -> nn.Linear:
    """As a checkpoint is loaded: the masks and weights of another linear, not called since."""
    linear = nn.Linear(8, 6)
    for name in ("weight", "bias"):
        prune.identity(linear, name)
    linear.load_state_dict(masked_by_torch(("weight", "bias")).state_dict())
    return linear


def trained() -> nn.Linear:
    linear = masked_by_torch(("weight", "bias"))
    optimizer = torch.optim.SGD(linear.parameters(), lr=1.0)
    linear(torch.randn(4, 8)).sum().backward()
    optimizer.step()
    return linear


@pytest.mark.parametrize("changed", [loaded, trained])
@pytest.mark.parametrize("convert", ["from_linear", "prune_layer", "prune_layer by scores"])
def test_weights_masked_by_torch_are_those_of_the_next_call(changed: Any, convert: str) -> None:
    linear = changed()
    if convert == "from_linear":
        masked: Any = MaskedLinear.from_linear(linear, linear.weight_mask.bool())
    elif convert == "prune_layer":
        masked = deqcore.prune_layer(linear, sparsity=0.5)
    else:
        masked = deqcore.prune_layer(linear, lambda linear: linear.weight.abs(), 0.5)
    x = torch.randn(3, 8)
    torch.testing.assert_close(masked(x), linear(x))
    assert torch.equal(masked.pattern.mask(), linear.weight_mask.bool())


def test_what_is_frozen_under_a_mask_of_torch_stays_frozen() -> None:
    linear = masked_by_torch(("weight", "bias"))
    linear.weight_orig.requires_grad_(False)
    state = deqcore.prune_layer(linear, sparsity=0.5).state_dict()
    for masked in (
        MaskedLinear.from_linear(linear, linear.weight_mask.bool()),
        deqcore.restore_pruned(linear, state),
    ):
        assert not masked.values.requires_grad
        assert masked.bias.requires_grad


@pytest.mark.parametrize(
    ("add", "advice"),
    [
        (nn.utils.weight_norm, "remove_weight_norm"),
        (nn.utils.spectral_norm, "remove_spectral_norm"),
    ],
)
@pytest.mark.filterwarnings("ignore:.*weight_norm:FutureWarning")
def test_a_weight_that_another_hook_computes_is_refused(add: Any, advice: str) -> None:
    linear = add(nn.Linear(8, 6))
    expected = rf"linear: expected weight to be a parameter.*torch\.nn\.utils.*{advice}"
    with pytest.raises(ValueError, match=expected):
        MaskedLinear.from_linear(linear, torch.ones(6, 8, dtype=torch.bool))
    model = nn.Sequential(nn.Linear(8, 8), linear)
    with pytest.raises(ValueError, match=expected):
        deqcore.prune_layer(model)
    assert type(model[0]) is nn.Linear


def nothing(*args: Any) -> None:
    pass


@pytest.mark.parametrize(
    "register",
    [
        "register_forward_hook",
        "register_forward_pre_hook",
        "register_full_backward_hook",
        "register_full_backward_pre_hook",
    ],
)
def test_hooks_are_not_dropped_in_silence(register: str) -> None:
    model = nn.Sequential(nn.Linear(8, 8), masked_by_torch())
    state = deqcore.prune_layer(copy.deepcopy(nn.Sequential(nn.Linear(8, 8)))).state_dict()
    handle = getattr(model[0], register)(nothing)
    expected = r"linear: has hooks \(nothing\).*would lose.*remove them.*register"
    with pytest.raises(ValueError, match=expected):
        MaskedLinear.from_linear(model[0], torch.ones(8, 8, dtype=torch.bool))
    with pytest.raises(ValueError, match=expected):
        deqcore.prune_layer(model)
    with pytest.raises(ValueError, match=expected):
        deqcore.restore_pruned(model, state)
    assert type(model[0]) is nn.Linear
    handle.remove()
    deqcore.prune_layer(model)
    assert isinstance(model[0], MaskedLinear)
    getattr(model[0], register)(nothing)
    with pytest.raises(ValueError, match=expected):
        deqcore.restore_pruned(model, state)


class Tied(nn.Module):
    """Two linears with one weight and one bias, both masked by torch."""

    def __init__(self, same: bool, name: str) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)
        self.b.weight, self.b.bias = self.a.weight, self.a.bias
        mask = torch.rand_like(self.a.get_parameter(name)) > 0.5
        prune.custom_from_mask(self.a, name, mask)
        prune.custom_from_mask(self.b, name, mask if same else ~mask)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(torch.tanh(self.a(x)))


@pytest.mark.parametrize("name", ["weight", "bias"])
def test_ties_under_masks_of_torch_are_kept_if_the_masks_are_the_same(name: str) -> None:
    tied = Tied(True, name)
    x = torch.randn(3, 8)
    expected = tied(x)
    deqcore.prune_layer(tied, sparsity=0.0)
    assert tied.a.values is tied.b.values
    assert tied.a.bias is tied.b.bias
    torch.testing.assert_close(tied(x), expected)
    scores = {"a": torch.rand(8, 8)}
    scores["b"] = scores["a"]
    message = rf"a\.{name}_orig and b\.{name}_orig are one parameter under different masks.*untie"
    with pytest.raises(ValueError, match=message):
        deqcore.prune_layer(Tied(False, name), scores, 0.5)
