"""prune_layer and restore_pruned where parameters are shared."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

import deqcore
from deqcore import MaskedLinear


class Tied(nn.Module):
    """Two linears with one weight, and if asked one bias."""

    def __init__(self, bias: bool = False) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)
        self.b.weight = self.a.weight
        if bias:
            self.b.bias = self.a.bias

    def forward(self, x: Tensor) -> Tensor:
        return self.b(torch.tanh(self.a(x)))


class Tagger(nn.Module):
    """A head that shares the weight of an embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(10, 6)
        self.hidden = nn.Linear(6, 6)
        self.head = nn.Linear(6, 10)
        self.head.weight = self.embedding.weight


@pytest.mark.parametrize("bias", [True, False])
def test_linears_with_one_weight_go_on_sharing_it(bias: bool) -> None:
    dense = Tied(bias)
    pruned = copy.deepcopy(dense)
    deqcore.prune_layer(pruned, sparsity=0.5)
    assert isinstance(pruned.a, MaskedLinear)
    assert isinstance(pruned.b, MaskedLinear)
    assert pruned.a.values is pruned.b.values
    assert (pruned.a.bias is pruned.b.bias) == bias
    assert len(list(pruned.parameters())) == len(list(dense.parameters()))

    pattern = pruned.a.pattern
    with torch.no_grad():
        dense.a.weight.mul_(pattern.mask())
    x = torch.randn(3, 8)
    torch.testing.assert_close(pruned(x), dense(x))
    pruned(x).square().sum().backward()
    dense(x).square().sum().backward()
    assert pruned.a.values.grad is not None
    assert dense.a.weight.grad is not None
    torch.testing.assert_close(pruned.a.values.grad, pattern.from_dense(dense.a.weight.grad))


@pytest.mark.parametrize("bias", [True, False])
def test_restored_layers_share_what_the_layer_shares(bias: bool) -> None:
    pruned = deqcore.prune_layer(Tied(bias), sparsity=0.5)
    for start in (Tied(bias), deqcore.prune_layer(Tied(bias), sparsity=0.9)):
        restored = deqcore.restore_pruned(start, pruned.state_dict())
        assert restored.a.values is restored.b.values
        assert (restored.a.bias is restored.b.bias) == bias
        x = torch.randn(3, 8)
        assert torch.equal(restored(x), pruned(x))


def test_one_weight_cannot_keep_two_sets_of_entries() -> None:
    expected = r"a\.weight and b\.weight are one parameter.*different entries.*untie"
    tied = Tied()
    with pytest.raises(ValueError, match=expected):
        deqcore.prune_layer(tied, {"a": torch.rand(8, 8), "b": torch.rand(8, 8)}, 0.5)
    assert isinstance(tied.a, nn.Linear)
    untied = Tied()
    untied.b.weight = nn.Parameter(torch.randn(8, 8))
    state = deqcore.prune_layer(untied, sparsity=0.5).state_dict()
    with pytest.raises(ValueError, match=expected):
        deqcore.restore_pruned(tied, state)
    assert isinstance(tied.a, nn.Linear)


def test_a_weight_that_something_dense_shares_is_refused() -> None:
    tagger = Tagger()
    with pytest.raises(
        ValueError,
        match=r"head\.weight is also embedding\.weight, which stays dense.*leave 'head' dense.*"
        r"untie.*get_submodule\('head'\); m\.weight = ",
    ):
        deqcore.prune_layer(tagger)
    assert isinstance(tagger.hidden, nn.Linear)
    with pytest.raises(ValueError, match=r"a\.weight is also b\.weight, which stays dense"):
        deqcore.prune_layer(Tied(), {"a": torch.rand(8, 8)}, 0.5)

    deqcore.prune_layer(tagger, {"hidden": torch.rand(6, 6)}, 0.5)  # as the error suggests
    assert tagger.head.weight is tagger.embedding.weight
    untied = Tagger()
    untied.head.weight = nn.Parameter(untied.head.weight.detach().clone())
    state = deqcore.prune_layer(untied, sparsity=0.5).state_dict()
    with pytest.raises(ValueError, match=r"head\.weight is also embedding\.weight"):
        deqcore.restore_pruned(Tagger(), state)


def test_scores_by_one_of_its_names_prune_a_linear_in_all_its_places() -> None:
    twice = Tied()
    twice.b = twice.a
    deqcore.prune_layer(twice, {"b": torch.rand(8, 8)}, 0.5)
    assert isinstance(twice.a, MaskedLinear)
    assert twice.b is twice.a
