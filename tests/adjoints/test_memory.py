"""What a solve keeps for backward, and that it lets go of it."""

from __future__ import annotations

import gc
import weakref
from collections import Counter

import pytest
import torch

import deqcore
from deqcore import Anderson, Broyden, Implicit, Phantom, Picard, Unrolled
from tests.support.problems import equal

DIM = 1000
ROW_BYTES = 4 * 2 * DIM  # of one float32 state [2, DIM]


def cell(z, w):
    return 0.9 * torch.tanh(z * w) + w


def live_bytes() -> int:
    """Of all tensors that Python can reach, each storage once."""
    kinds = (torch.Tensor, torch.nn.Parameter)
    tensors = [item for item in gc.get_objects() if type(item) in kinds]
    storages = [tensor.untyped_storage() for tensor in tensors]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


class Token:
    """Something that can be watched."""


class Watched(torch.autograd.Function):
    """Identity; its context, and the token in it, live as long as its node of the graph."""

    @staticmethod
    def forward(ctx, z, tokens):
        ctx.token = Token()
        tokens.append(weakref.ref(ctx.token))
        return z.clone()

    @staticmethod
    def backward(ctx, grad):
        return grad, None


def saved_bytes(adjoint, max_steps, solver=Picard) -> tuple[int, torch.Tensor]:
    """Bytes that autograd packs for backward, each storage once, and the gradient."""
    w = torch.linspace(0.2, 0.9, DIM).requires_grad_()
    saved: dict[int, torch.Tensor] = {}

    def pack(tensor):
        saved[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        value = deqcore.fixed_point(
            cell,
            torch.zeros(2, DIM),
            w,
            solver=solver(max_steps=max_steps, rtol=0.0, atol=0.0),
            adjoint=adjoint,
        ).value
    total = sum(tensor.untyped_storage().nbytes() for tensor in saved.values())
    (grad,) = torch.autograd.grad(value.sum(), w)
    return total, grad


@pytest.mark.parametrize("solver", [Picard, Anderson, Broyden])
@pytest.mark.parametrize("adjoint", [Implicit(), Phantom(), Phantom(steps=3)], ids=repr)
def test_memory_of_the_graph_does_not_grow_with_steps(adjoint, solver):
    few, _ = saved_bytes(adjoint, 4, solver)
    many, _ = saved_bytes(adjoint, 24, solver)
    assert many == few > 0


def test_memory_of_an_unrolled_graph_grows_with_steps():
    few, _ = saved_bytes(Unrolled(), 4)
    many, _ = saved_bytes(Unrolled(), 24)
    assert many > 4 * few


@pytest.mark.parametrize("solver", [Picard, Anderson, Broyden])
@pytest.mark.parametrize("every", [1, 5, 12, 100])
def test_checkpointing_saves_less_and_gives_the_same_gradient_bit_for_bit(every, solver):
    everything, expected = saved_bytes(Unrolled(), 24, solver)
    less, grad = saved_bytes(Unrolled(checkpoint_every=every), 24, solver)
    assert equal(grad, expected)
    assert less < everything


@pytest.mark.parametrize(
    "solver", [Picard(), Anderson(), Broyden()], ids=lambda s: type(s).__name__
)
@pytest.mark.parametrize(
    "adjoint", [Implicit(), Phantom(), Unrolled()], ids=lambda a: type(a).__name__
)
@pytest.mark.parametrize("backward", [False, True])
def test_nothing_stays_alive_after_a_solve_is_dropped(solver, adjoint, backward):
    w = torch.linspace(0.2, 0.9, 50).requires_grad_()
    watched: list[weakref.ref] = []

    def f(z, w):
        watched.append(weakref.ref(z))
        return cell(Watched.apply(z, watched), w)

    gc.disable()  # reference counts alone must free everything: there are no cycles
    try:
        solution = deqcore.fixed_point(f, torch.zeros(2, 50), w, solver=solver, adjoint=adjoint)
        if backward:
            solution.value.sum().backward()
        watched.append(weakref.ref(solution.value))
        assert watched[-1]() is not None
        del solution
        alive = [ref() for ref in watched if ref() is not None]
    finally:
        gc.enable()
    assert not alive


@pytest.mark.parametrize("solver", [Anderson(memory=20), Broyden()], ids=lambda s: type(s).__name__)
def test_history_is_freed_before_the_graph_is_built(solver):
    """Peak memory is that of the solver or of the graph, not of both."""
    w = torch.linspace(0.2, 0.9, DIM).requires_grad_()
    seen = []

    def f(z, w):
        if torch.is_grad_enabled():
            seen.append(live_bytes())
        return cell(z, w)

    before = live_bytes()
    deqcore.fixed_point(f, torch.zeros(2, DIM), w, solver=solver)
    assert len(seen) == 1
    assert seen[0] - before <= 6 * ROW_BYTES  # far from 20 or 40 stored states


def test_a_bfloat16_history_takes_half_the_memory_of_a_solve():
    peaks, steps, calls = {}, 12, Counter()

    def f(z, w, history_dtype):
        calls[history_dtype] += 1
        if calls[history_dtype] >= steps:  # looking takes its time; before there is less
            peaks[history_dtype] = max(peaks.get(history_dtype, 0), live_bytes())
        return cell(z, w)

    w = torch.linspace(0.2, 0.9, DIM)
    for history_dtype in (None, torch.bfloat16):
        solver = Broyden(history_dtype=history_dtype, max_steps=steps, rtol=0.0, atol=0.0)
        solution = deqcore.fixed_point(f, torch.zeros(2, DIM), w, history_dtype, solver=solver)
        assert (solution.steps == steps).all()
        del solution  # it would be live in the next solve
    # All stored steps, and up to half as much again for those to come.
    saved = peaks[None] - peaks[torch.bfloat16]
    assert (steps - 1) * ROW_BYTES / 2 <= saved <= 1.5 * steps * ROW_BYTES / 2


def test_report_of_a_layer_keeps_no_graph():
    layer = deqcore.ImplicitLayer(torch.nn.Linear(8, 8), solver=Anderson(record_trace=True))
    layer.cell.forward = lambda z, x: 0.1 * torch.nn.functional.linear(z, layer.cell.weight) + x
    layer(torch.randn(3, 8))
    for name in ("status", "residual", "steps", "trace"):
        tensor = getattr(layer.report, name)
        assert not tensor.requires_grad
        assert tensor.grad_fn is None
    assert not hasattr(layer.report, "value")
