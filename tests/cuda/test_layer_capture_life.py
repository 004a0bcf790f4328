"""Layers that replay their solves in the life of a model: what is around them, copies, failures."""

from __future__ import annotations

import copy
import gc
import io
import pickle
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

import deqcore
from deqcore import (
    Anderson,
    Implicit,
    ImplicitLayer,
    Picard,
)
from deqcore._layer_graphs import CALLS_BEFORE
from tests.support.captured_layers import (
    Cell,
    Gpu,
    Reads,
    assert_same,
    count,
    inputs,
    results,
    twins,
)
from tests.support.problems import equal


def test_calls_that_someone_follows_are_eager(gpu: Gpu) -> None:
    layer, _ = twins(gpu, capture=True)
    x = inputs(gpu, 0)
    layer(x).sum().backward()
    recorder = gpu.recorders[0]
    launches = getattr(recorder, "launches", None)
    value = checkpoint(layer, x, use_reentrant=False)
    value.sum().backward()
    with torch.autograd.detect_anomaly(check_nan=False), torch.autograd.graph.save_on_cpu():
        layer(x).sum().backward()
    with FlopCounterMode(display=False):
        layer(x)
    assert len(gpu.recorders) == 1
    if launches is not None:
        assert recorder.launches == launches


def test_arguments_decide_what_a_call_looks_like(gpu: Gpu) -> None:
    layer, eager = twins(gpu, capture=True)
    x = inputs(gpu, 0)
    shift = inputs(gpu, 1).t().contiguous().t()
    calls: list[tuple[Any, ...]] = [
        (x,), (x, 0.5), (x, 0.25), (x, True), (x, shift), (x, shift.contiguous()),
        (x, inputs(gpu, 1)[:1]), (x.clone().requires_grad_(), 0.5),
    ]  # fmt: skip
    for args in calls * 2:
        assert equal(layer(*args).detach(), eager(*args).detach())
    assert len(gpu.recorders) == len(calls) - 0
    with torch.no_grad():
        assert equal(layer(x, z0=x), eager(x, z0=x))
        assert equal(layer(x, z0=2 * x), eager(x, z0=2 * x))
    assert len(gpu.recorders) == len(calls) + 1


def test_autocast_is_part_of_the_signature_and_backward_runs_outside_of_it(gpu: Gpu) -> None:
    class Linear(Cell):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(6, 6)
            nn.init.orthogonal_(self.linear.weight, 0.3)

        def forward(self, z: Tensor, x: Tensor) -> Tensor:
            return self.linear(z).float() * 0.5 + super().forward(z, x)

    layer, eager = twins(gpu, Linear(), capture=True)
    for dtype in (torch.bfloat16, torch.float32, torch.bfloat16):
        outs = []
        for one in (layer, eager):
            one.zero_grad()
            with torch.autocast(gpu.device.type, torch.bfloat16, enabled=dtype != torch.float32):
                value = one(inputs(gpu, 3))
            value.square().sum().backward()
            outs.append([value.detach(), *(p.grad for p in one.parameters())])
        for a, b in zip(*outs, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
    assert len(gpu.recorders) == 2


def test_the_gradient_of_a_gradient_is_refused_where_the_solve_is_captured(gpu: Gpu) -> None:
    captured, eager = twins(gpu, capture=True)
    slopes = []
    for layer in (captured, eager):
        x = inputs(gpu, 0).requires_grad_()
        (grad,) = torch.autograd.grad(layer(x).square().sum(), x, create_graph=True)
        slopes.append(grad.sum())
    with pytest.raises(RuntimeError, match=r"gradient of a gradient.*capture=False"):
        slopes[0].backward()
    slopes[1].backward()


def test_backward_that_fails_raises_as_an_eager_one_does(gpu: Gpu) -> None:
    adjoint = Implicit(solver=Picard(max_steps=1, rtol=0.0, atol=0.0), on_failure="raise")
    for layer in twins(gpu, adjoint=adjoint, capture=True):
        with pytest.raises(deqcore.ConvergenceError, match="linear solve of backward"):
            layer(inputs(gpu, 0)).sum().backward()
    assert len(gpu.recorders) == 1


def test_hooks_of_parameters_see_each_gradient_once(gpu: Gpu) -> None:
    layer, eager = twins(gpu, capture=True)
    for one in (layer, eager):
        one.cell.weight.register_hook(lambda grad: 2 * grad)
    for seed in range(2):
        x = inputs(gpu, seed)
        assert_same(results(layer, x), results(eager, x))


def test_copies_and_pickles_hold_no_recordings(gpu: Gpu) -> None:
    layer, _ = twins(gpu, capture=True)
    x = inputs(gpu, 0)
    expected = results(layer, x)
    buffer = io.BytesIO()
    torch.save(layer, buffer)
    buffer.seek(0)
    for other in (
        copy.copy(layer), copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)),
        torch.load(buffer, weights_only=False),
    ):  # fmt: skip
        assert count(other) == 0
        assert other.capture is True
        assert_same(results(other, x), expected)
    assert count(layer) == 1


def test_a_layer_pickled_by_an_earlier_version_is_captured_as_by_default(gpu: Gpu) -> None:
    layer, _ = twins(gpu)
    state = layer.__getstate__()
    del state["capture"]
    old = ImplicitLayer.__new__(ImplicitLayer)
    old.__setstate__(state)
    assert old.capture == "auto"
    old(inputs(gpu, 0))


class Normed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear, self.norm = nn.Linear(6, 6), nn.BatchNorm1d(6)
        nn.init.orthogonal_(self.linear.weight, gain=0.3)

    def forward(self, z: Tensor, x: Tensor) -> Tensor:
        return torch.tanh(self.norm(self.linear(z) + x)) * 0.5


def test_running_statistics_are_those_of_eager_training(gpu: Gpu) -> None:
    layer, eager = twins(gpu, Normed(), batch="coupled")
    for seed in range(CALLS_BEFORE + 3):
        x = inputs(gpu, seed)
        results(layer, x), results(eager, x)
        for a, b in zip(layer.buffers(), eager.buffers(), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)
    assert count(layer) == 1


def test_a_pruned_cell_reads_its_values_anew_in_each_replay(gpu: Gpu) -> None:
    class Sparse(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            pattern = deqcore.SparsityPattern.from_scores(torch.rand(6, 6), 0.5)
            self.linear = deqcore.MaskedLinear(pattern, backend="dense")

        def forward(self, z: Tensor, x: Tensor) -> Tensor:
            return torch.tanh(0.5 * self.linear(z) + x)

    layer, eager = twins(gpu, Sparse(), solver=Anderson(rtol=1e-5))
    optimizers = [torch.optim.SGD(one.parameters(), lr=0.1) for one in (layer, eager)]
    for seed in range(CALLS_BEFORE + 4):
        x = inputs(gpu, seed)
        got, expected = results(layer, x), results(eager, x)
        for name in ("value", "x.grad", "cell.linear.values"):
            torch.testing.assert_close(got[name], expected[name], rtol=1e-5, atol=1e-6)
        for optimizer in optimizers:
            optimizer.step()
    assert count(layer) == 1


def test_options_of_capture_are_named(gpu: Gpu) -> None:
    with pytest.raises(ValueError, match="capture: expected 'auto', True or False, got 'yes'"):
        ImplicitLayer(Cell(), capture="yes")
    assert "capture='auto'" in repr(ImplicitLayer(Cell()))


def test_threads_that_share_a_layer_do_not_meet(gpu: Gpu) -> None:
    layer, eager = twins(gpu, capture=True)
    xs = [inputs(gpu, seed) for seed in range(8)]
    with torch.no_grad():
        expected = [eager(x) for x in xs]

    def solve(x: Tensor) -> Tensor:
        with torch.no_grad():
            for _ in range(5):
                value = layer(x)
        return value

    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(solve, xs))
    assert all(equal(a, b) for a, b in zip(found, expected, strict=True))
    assert count(layer) == 1


DISTRIBUTED = """
import os, sys, torch
from torch import nn
from tests.support.captured_layers import Gpu, captured_here, count, inputs, twins
from tests.support.problems import equal

gpu = Gpu(torch.device(sys.argv[1]))
captured_here(gpu)
layer, eager = twins(gpu, capture=True)
store = torch.distributed.HashStore()
torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
model = nn.parallel.DistributedDataParallel(layer)
for seed in range(3):
    grads = []
    for one in (model, eager):
        one.zero_grad()
        one(inputs(gpu, seed)).square().sum().backward()
        grads.append([p.grad.clone() for p in one.parameters()])
    assert all(equal(a, b) for a, b in zip(*grads, strict=True))
assert count(layer) == 1
print("the same", flush=True)
os._exit(0)  # a process group that is destroyed with the interpreter's lock may wait for it
"""


def test_distributed_training_has_the_gradients_of_one_process(gpu: Gpu) -> None:
    """Its hooks sit on autograd's nodes of the parameters, which live as long as it does."""
    command = [sys.executable, "-c", DISTRIBUTED, gpu.device.type]
    root = Path(__file__).parents[2]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=120, check=False, cwd=root
    )
    assert "the same" in done.stdout, done.stderr


def test_a_layer_in_a_cell_is_part_of_no_recording(gpu: Gpu) -> None:
    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = ImplicitLayer(Cell())

        def forward(self, z: Tensor, x: Tensor) -> Tensor:
            return 0.5 * self.inner(0.5 * z + x)

    layer, eager = twins(gpu, Outer())
    with torch.no_grad():
        for seed in range(CALLS_BEFORE + 2):
            x = inputs(gpu, seed)
            assert equal(layer(x), eager(x))
    assert count(layer) == 0


def test_inside_of_another_capture_a_layer_is_eager(cuda_device: torch.device) -> None:
    gpu = Gpu(cuda_device)
    layer, _ = twins(gpu, solver=Anderson(check_every=0, max_steps=12), capture=True)
    x = inputs(gpu, 0)
    with torch.no_grad():
        expected = layer(x)
        graph = torch.cuda.CUDAGraph()
        layer.capture = False
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            layer(x)
        torch.cuda.synchronize()
        layer.capture = True
        before = count(layer)
        with torch.cuda.graph(graph, stream=stream):
            value = layer(x)
        assert count(layer) == before
        x.mul_(2)
        graph.replay()
        assert not equal(value, expected)
        assert equal(value, layer(x))


@pytest.mark.parametrize("way", ["script", "compiled", "in place"])
def test_cells_that_are_programs_of_their_own_are_solved_eagerly(gpu: Gpu, way: str) -> None:
    cell: Any = nn.Tanh()
    if way == "script":
        cell = torch.jit.script(cell)
    elif way == "compiled":
        cell = torch.compile(cell, backend="eager")
    else:
        cell.compile(backend="eager")

    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = cell

        def forward(self, z: Tensor, x: Tensor) -> Tensor:
            return self.inner(0.5 * z + x)

    layer = ImplicitLayer(Outer().to(gpu.device), capture=True)
    with torch.no_grad():
        layer(inputs(gpu, 0))
    assert count(layer) == 0
    assert torch.is_grad_enabled()


def test_streams_have_recordings_of_their_own(cuda_device: torch.device) -> None:
    gpu = Gpu(cuda_device)
    layer, eager = twins(gpu, capture=True)
    xs = [inputs(gpu, seed) for seed in range(2)]
    streams = [torch.cuda.Stream() for _ in xs]
    with torch.no_grad():
        expected = [eager(x) for x in xs]
        torch.cuda.synchronize()
        for _ in range(3):
            found = []
            for x, stream in zip(xs, streams, strict=True):
                with torch.cuda.stream(stream):
                    found.append(layer(x))
            torch.cuda.synchronize()
            assert all(equal(a, b) for a, b in zip(found, expected, strict=True))
    assert count(layer) == 2


def test_a_replay_waits_for_nothing(cuda_device: torch.device) -> None:
    gpu = Gpu(cuda_device)
    layer, _ = twins(gpu)
    x = inputs(gpu, 0)
    for _ in range(CALLS_BEFORE + 1):
        layer(x).sum().backward()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(40):
            layer(x).sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_after_a_capture_that_failed_generators_and_memory_are_as_before(
    cuda_device: torch.device,
) -> None:
    gpu = Gpu(cuda_device)
    layer, _ = twins(gpu, Reads(), capture=True)
    layer(inputs(gpu, 0))
    torch.manual_seed(0)
    first = torch.rand(5, device=cuda_device)
    torch.manual_seed(0)
    assert equal(torch.rand(5, device=cuda_device), first)
    assert F.dropout(first, 0.5).shape == (5,)
    torch.cuda.empty_cache()
    before = torch.cuda.memory_reserved()
    large = torch.empty(1 << 26, device=cuda_device)
    del large
    torch.cuda.empty_cache()
    assert torch.cuda.memory_reserved() <= before
    other, eager = twins(gpu, capture=True)
    assert equal(other(inputs(gpu, 1)), eager(inputs(gpu, 1)))
    assert count(other) == 1


def test_recordings_give_their_memory_back(cuda_device: torch.device) -> None:
    gpu = Gpu(cuda_device)

    def used() -> int:
        torch.cuda.synchronize()
        gc.collect()
        return torch.cuda.memory_allocated()

    def run() -> None:
        layer, _ = twins(gpu, capture=True)
        for rows in (2, 3, 4):
            layer(inputs(gpu, rows, rows)).sum().backward()

    run()  # workspaces of libraries stay
    before = used()
    for _ in range(2):
        run()
    assert used() == before
