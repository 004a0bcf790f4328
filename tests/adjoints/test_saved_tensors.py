"""Solves under the caller's saved-tensor hooks: activation checkpointing, offloading."""

from __future__ import annotations

import pytest
import torch
from torch.utils.checkpoint import checkpoint

import deqcore
from deqcore import Implicit, Phantom
from tests.support.problems import Counted, equal


@pytest.fixture
def weight():
    torch.manual_seed(0)
    return (0.15 * torch.randn(16, 16)).requires_grad_()


@pytest.fixture
def x():
    torch.manual_seed(1)
    return torch.randn(4, 16, requires_grad=True)


def block_of(weight, adjoint=Implicit()):
    f = Counted(lambda z, x: torch.tanh(z @ weight + x))

    def block(x):
        inner = deqcore.fixed_point(f, torch.zeros(4, 16), 2 * x, adjoint=adjoint)
        return torch.sin(inner.value * weight[0])  # the rest of the region saves tensors too

    return f, block


def gradients(value, weight, x, **options):
    return torch.autograd.grad(value.square().mean(), (weight, x), **options)


@pytest.mark.parametrize("adjoint", [Implicit(), Phantom(steps=2)], ids=["Implicit", "Phantom"])
@pytest.mark.parametrize("early_stop", [True, False])
def test_a_checkpointed_solve_is_solved_twice_and_has_the_same_gradient(
    weight, x, adjoint, early_stop
):
    f, block = block_of(weight, adjoint)
    expected = gradients(block(x), weight, x)
    plain = f.calls
    with torch.utils.checkpoint.set_checkpoint_early_stop(early_stop):
        got = gradients(checkpoint(block, x, use_reentrant=False), weight, x)
    assert f.calls - plain == 2 * plain
    assert all(equal(a, b) for a, b in zip(got, expected, strict=True))


def test_a_solve_that_is_all_of_the_region_is_solved_twice(weight, x):
    f = Counted(lambda z, x: torch.tanh(z @ weight + x))

    def block(x):
        return deqcore.fixed_point(f, torch.zeros(4, 16), x).value

    expected = gradients(block(x), weight, x)
    plain = f.calls
    got = gradients(checkpoint(block, x, use_reentrant=False), weight, x)
    assert f.calls - plain == 2 * plain
    assert all(equal(a, b) for a, b in zip(got, expected, strict=True))


def test_nested_checkpoints_and_a_retained_graph_keep_the_gradient(weight, x):
    f, block = block_of(weight)
    expected = gradients(block(x), weight, x)
    plain = f.calls

    def outer(x):
        return checkpoint(block, x, use_reentrant=False).neg().neg()

    value = checkpoint(outer, x, use_reentrant=False)
    first = gradients(value, weight, x, retain_graph=True)
    again = gradients(value, weight, x)
    assert f.calls - plain <= 5 * plain  # forward, and for each of the passes both regions
    for got in (first, again):
        assert all(equal(a, b) for a, b in zip(got, expected, strict=True))


def test_offloaded_tensors_come_back_once(weight, x):
    _, block = block_of(weight)
    expected = gradients(block(x), weight, x)
    counts = [0, 0]

    def pack(tensor):
        counts[0] += 1
        return tensor.detach().clone()

    def unpack(tensor):
        counts[1] += 1
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        value = block(x)
    got = gradients(value, weight, x)
    assert counts[0] == counts[1]
    assert all(equal(a, b) for a, b in zip(got, expected, strict=True))


def test_saved_tensors_are_freed_by_backward(weight, x):
    packed = []

    def pack(tensor):
        kept = tensor.detach().clone()
        packed.append(torch.utils.weak.TensorWeakRef(kept))
        return kept

    _, block = block_of(weight)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda kept: kept):
        value = block(x)
    assert all(reference() is not None for reference in packed)
    value.sum().backward()
    assert [reference() for reference in packed] == [None] * len(packed)


def test_a_cell_under_reentrant_checkpointing_does_not_lose_its_gradient_in_silence(weight):
    # Its graph shows no parameter: only PyTorch's own node knows that there is one.
    value = deqcore.fixed_point(
        lambda z: checkpoint(lambda z: torch.tanh(z @ weight) + 1, z, use_reentrant=True),
        torch.zeros(4, 16),
    ).value
    with pytest.raises(RuntimeError, match="use_reentrant"):
        value.sum().backward()
