"""Layers that replay their solves: on a GPU, and anywhere on a tape that stands in for graphs."""

from __future__ import annotations

import copy
import io
import logging
import pickle
from dataclasses import dataclass, field
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
    Broyden,
    Implicit,
    ImplicitLayer,
    Phantom,
    Picard,
    Unrolled,
    _checks,
    _layer_graphs,
)
from deqcore._layer_graphs import CALLS_BEFORE, GRAPHS, GRAPHS_ALIVE, TIMES_REPLACED
from tests.support.problems import equal
from tests.support.tape import Taped


@dataclass
class Gpu:
    """Where layers are captured, and the recorders of those that were."""

    device: torch.device
    recorders: list[Any] = field(default_factory=list)


@pytest.fixture(params=["host", "graph"])
def gpu(request: Any, monkeypatch: pytest.MonkeyPatch) -> Gpu:
    make = _layer_graphs._recorder
    if request.param == "graph":
        gpu = Gpu(request.getfixturevalue("cuda_device"))
    else:
        gpu = Gpu(torch.device("cpu"))
        make = Taped
        monkeypatch.setattr(_layer_graphs, "_is_usable", lambda tensor: True)
        monkeypatch.setattr(_layer_graphs, "_stream", lambda device: 0)
        monkeypatch.setattr(_checks, "_free", lambda tensor: False)  # no look at a value

    def recorder() -> Any:
        gpu.recorders.append(make())
        return gpu.recorders[-1]

    monkeypatch.setattr(_layer_graphs, "_recorder", recorder)
    return gpu


class Cell(nn.Module):
    """Of kernels that are the same under capture; a gemm's need not be."""

    def __init__(self, dim: int = 6) -> None:
        super().__init__()
        self.weight = nn.Parameter(0.4 * torch.rand(dim))
        self.bias = nn.Parameter(torch.randn(dim))
        self.gain = 1.0

    def forward(self, z: Tensor, x: Tensor, shift: Any = 0.0) -> Tensor:
        mixed = z.roll(1, -1) * self.weight - 0.3 * z
        return torch.tanh(mixed) * self.gain + self.bias * 0.1 + x + shift


def twins(gpu: Gpu, cell: nn.Module | None = None, **options: Any) -> list[ImplicitLayer]:
    """A layer that is captured, and one that is not."""
    torch.manual_seed(0)
    layer = ImplicitLayer(Cell() if cell is None else cell, **options).to(gpu.device)
    eager = copy.deepcopy(layer)
    eager.capture = False
    return [layer, eager]


def inputs(gpu: Gpu, seed: int, rows: int = 4) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, 6, generator=generator).to(gpu.device)


def count(layer: ImplicitLayer) -> int:
    """Recordings that a layer holds."""
    return sum(len(one.solvers) for one in layer._graphs._signatures.values())


def warm(layer: ImplicitLayer, x: Tensor, *args: Any) -> None:
    """So many calls that the next one is recorded; without their backward passes."""
    for _ in range(CALLS_BEFORE):
        layer(x, *args)


def results(layer: ImplicitLayer, x: Tensor, *args: Any) -> dict[str, Tensor]:
    """Value, gradients and reports of a call with its backward pass."""
    layer.zero_grad()
    x = x.clone().requires_grad_()
    value = layer(x, *args)
    report = layer.report
    weights = torch.linspace(-1, 2, value.numel(), device=value.device).view(value.shape)
    (value * weights).square().sum().backward()
    gradients = {name: p.grad.clone() for name, p in layer.named_parameters()}
    assert report.backward is not None
    reports = {
        f"{where}.{name}": getattr(one, name)
        for where, one in (("forward", report), ("backward", report.backward))
        for name in ("status", "steps", "residual")
    }
    return {"value": value.detach(), "x.grad": x.grad, **gradients, **reports}


def assert_same(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    assert a.keys() == b.keys()
    for name, value in a.items():
        assert equal(value, b[name]), name


@pytest.mark.parametrize("solver", [Anderson(), Broyden(memory=4), Picard()], ids=str)
def test_training_has_the_bits_of_eager_training(gpu: Gpu, solver: Any) -> None:
    layer, eager = twins(gpu, solver=solver, adjoint=Implicit(solver=solver))
    optimizers = [torch.optim.SGD(one.parameters(), lr=0.1) for one in (layer, eager)]
    for step in range(CALLS_BEFORE + 5):
        x = inputs(gpu, step)
        assert_same(results(layer, x), results(eager, x))
        for optimizer in optimizers:
            optimizer.step()
        assert count(layer) == (step >= CALLS_BEFORE)
    assert layer.report.evaluations == int(layer.report.steps.max()) + 1


def test_an_ordinary_loop_needs_one_recording(gpu: Gpu) -> None:
    """The loss of the step before is alive when the next one begins."""
    layer, _ = twins(gpu)
    for step in range(CALLS_BEFORE + 4):
        loss = layer(inputs(gpu, step)).square().sum()
        loss.backward()
    assert count(layer) == 1


def test_inference_has_the_bits_of_eager_inference(gpu: Gpu) -> None:
    layer, eager = twins(gpu)
    for mode in (torch.no_grad, torch.inference_mode):
        for step in range(CALLS_BEFORE + 3):
            with mode():
                x = inputs(gpu, step)
                assert equal(layer(x), eager(x))
                assert equal(layer.report.steps, eager.report.steps)
                assert layer(x).is_inference() == (mode is torch.inference_mode)
    assert count(layer) == 1


def test_each_signature_has_a_recording_and_the_oldest_goes(gpu: Gpu) -> None:
    layer, eager = twins(gpu)
    with torch.no_grad():
        for rows in range(1, GRAPHS + 3):
            x = inputs(gpu, rows, rows)
            for _ in range(CALLS_BEFORE + 2):
                assert equal(layer(x), eager(x))
            assert count(layer) == min(rows, GRAPHS)
    before = len(gpu.recorders)
    with torch.no_grad():
        layer(inputs(gpu, 0, GRAPHS + 2))
        assert len(gpu.recorders) == before
        layer(inputs(gpu, 0, 1))
    assert len(gpu.recorders) == before + 1, "its recording was the oldest"


def test_several_calls_before_their_backward_passes_do_not_meet(gpu: Gpu) -> None:
    layer, eager = twins(gpu)
    warm(layer, inputs(gpu, 0).requires_grad_())
    for run in range(2):
        grads = []
        for one in (layer, eager):
            one.zero_grad()
            xs = [inputs(gpu, 10 * run + i).requires_grad_() for i in range(GRAPHS_ALIVE + 2)]
            values = [one(x) for x in xs]
            for value in reversed(values):
                value.square().sum().backward()
            grads.append([*(x.grad for x in xs), *(p.grad for p in one.parameters())])
        assert all(equal(a, b) for a, b in zip(*grads, strict=True))
        assert count(layer) == GRAPHS_ALIVE


def test_a_layer_used_twice_in_one_model(gpu: Gpu) -> None:
    layer, eager = twins(gpu)
    for step in range(CALLS_BEFORE + 3):
        x = inputs(gpu, step)
        grads = []
        for one in (layer, eager):
            one.zero_grad()
            one(0.5 * one(x)).square().sum().backward()
            grads.append([p.grad.clone() for p in one.parameters()])
        assert all(equal(a, b) for a, b in zip(*grads, strict=True))
    assert count(layer) == 2


def test_a_graph_that_is_kept_can_be_used_again_and_one_that_is_freed_not(gpu: Gpu) -> None:
    layer, eager = twins(gpu)
    warm(layer, inputs(gpu, 0))
    grads = []
    for one in (layer, eager):
        loss = one(inputs(gpu, 1)).square().sum()
        loss.backward(retain_graph=True)
        one.zero_grad()
        one(inputs(gpu, 2))  # in between
        loss.backward()
        grads.append([p.grad.clone() for p in one.parameters()])
        with pytest.raises(RuntimeError, match="second time"):
            loss.backward()
    assert all(equal(a, b) for a, b in zip(*grads, strict=True))


def replace_parameter(layer: ImplicitLayer) -> None:
    layer.cell.weight = nn.Parameter(layer.cell.weight.detach() * 0.9)


def move_parameter(layer: ImplicitLayer) -> None:
    layer.cell.weight.data = layer.cell.weight.data * 0.9


def load_in_place(layer: ImplicitLayer) -> None:
    state = {name: 0.9 * value for name, value in layer.state_dict().items()}
    layer.load_state_dict(state)


def set_attribute(layer: ImplicitLayer) -> None:
    layer.cell.gain = 0.9


def replace_cell(layer: ImplicitLayer) -> None:
    cell = copy.deepcopy(layer.cell)
    cell.gain = 0.8
    layer.cell = cell


def set_solver(layer: ImplicitLayer) -> None:
    layer.solver = Picard(max_steps=5)


def go_double(layer: ImplicitLayer) -> None:
    layer.double().float()


@pytest.mark.parametrize(
    ("change", "anew"),
    [
        (load_in_place, False), (replace_parameter, True), (move_parameter, True),
        (set_attribute, True), (replace_cell, True), (set_solver, True), (go_double, True),
    ],
)  # fmt: skip
def test_what_is_replaced_is_recorded_anew(gpu: Gpu, change: Any, anew: bool) -> None:
    layer, eager = twins(gpu)
    for seed in range(CALLS_BEFORE + 2):
        results(layer, inputs(gpu, seed))
    assert count(layer) == 1
    change(layer)
    change(eager)
    for seed in range(CALLS_BEFORE + 2):
        x = inputs(gpu, seed)
        assert_same(results(layer, x), results(eager, x))
        assert count(layer) == (not anew or seed >= CALLS_BEFORE)
    assert len(gpu.recorders) == 1 + anew


def test_a_cell_that_is_replaced_time_and_again_is_left_alone(
    gpu: Gpu, caplog: pytest.LogCaptureFixture
) -> None:
    layer, eager = twins(gpu)
    with caplog.at_level(logging.INFO, "deqcore"), torch.no_grad():
        for seed in range(3 * (TIMES_REPLACED + 2) * (CALLS_BEFORE + 1)):
            if seed % (CALLS_BEFORE + 2) == 0:
                replace_parameter(layer)
                replace_parameter(eager)
            x = inputs(gpu, seed)
            assert equal(layer(x), eager(x))
    assert len(gpu.recorders) == TIMES_REPLACED + 1
    assert [r.message for r in caplog.records] == [
        "deqcore: ImplicitLayer(Cell) runs without a CUDA graph: its parameters or attributes are "
        "replaced between calls"
    ]


class Reads(Cell):
    def forward(self, z: Tensor, x: Tensor) -> Tensor:
        return super().forward(z, x) * (1.0 if z.sum().item() < 1e9 else 0.0)


class Drops(Cell):
    def forward(self, z: Tensor, x: Tensor) -> Tensor:
        return super().forward(z, F.dropout(x, 0.5, self.training))


class Counts(Cell):
    calls = 0

    def forward(self, z: Tensor, x: Tensor) -> Tensor:
        self.calls += 1
        return super().forward(z, x)


class Borrows(Cell):
    def __init__(self) -> None:
        super().__init__()
        self.other = [nn.Parameter(torch.ones(6))]  # of another module

    def forward(self, z: Tensor, x: Tensor) -> Tensor:
        return super().forward(z, x) * self.other[0].to(x.device)


class Hooked(Cell):
    def __init__(self) -> None:
        super().__init__()
        self.register_forward_hook(lambda *args: None)


@pytest.mark.parametrize(
    ("cell", "reason"),
    [
        (Reads, "cannot be captured"), (Drops, "draws random numbers"),
        (Counts, "changes attributes"), (Borrows, "neither its parameters nor its arguments"),
        (Hooked, "has hooks"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("when", ["auto", True])
def test_a_cell_that_cannot_be_captured_is_solved_eagerly_with_one_line(
    gpu: Gpu, cell: Any, reason: str, when: Any, caplog: pytest.LogCaptureFixture
) -> None:
    layer, eager = twins(gpu, cell(), capture=when)
    with caplog.at_level(logging.INFO, "deqcore"):
        for seed in range(CALLS_BEFORE + 3):
            x = inputs(gpu, seed)
            states = []
            for one in (layer, eager):
                torch.manual_seed(seed)
                states.append((results(one, x), torch.rand(2), torch.rand(2, device=gpu.device)))
            assert_same(states[0][0], states[1][0])
            assert all(equal(a, b) for a, b in zip(states[0][1:], states[1][1:], strict=True))
    assert count(layer) == 0
    (record,) = caplog.records
    assert reason in record.message
    assert record.levelno == (logging.INFO if when == "auto" else logging.WARNING)


def test_dropout_that_is_off_is_captured(gpu: Gpu) -> None:
    layer, _ = twins(gpu, Drops())
    layer.eval()
    for seed in range(CALLS_BEFORE + 1):
        results(layer, inputs(gpu, seed))
    assert count(layer) == 1


@pytest.mark.parametrize(
    ("options", "grad", "captured"),
    [
        ({"adjoint": Phantom()}, True, False), ({"adjoint": Phantom()}, False, True),
        ({"adjoint": Unrolled()}, False, False),
        ({"adjoint": Implicit(on_failure="fallback")}, True, False),
        ({"adjoint": Implicit(on_failure="fallback")}, False, True),
        ({"adjoint": Implicit(reuse_forward=True), "solver": Broyden()}, True, False),
        ({"solver": Anderson(record_trace=True)}, False, False),
        ({"capture": False}, True, False),
    ],
)  # fmt: skip
def test_which_options_are_captured(gpu: Gpu, options: Any, grad: bool, captured: bool) -> None:
    layer, eager = twins(gpu, **options)
    with torch.set_grad_enabled(grad):
        for seed in range(CALLS_BEFORE + 2):
            x = inputs(gpu, seed)
            assert equal(layer(x), eager(x))
            assert (layer.report.trace is None) == (not layer.solver.record_trace)
    assert count(layer) == captured


def test_true_records_the_first_call_and_large_states(gpu: Gpu, monkeypatch: Any) -> None:
    monkeypatch.setattr(_layer_graphs, "LARGEST", 12)
    layer, _ = twins(gpu)
    eager, _ = twins(gpu, capture=True)
    x = inputs(gpu, 0)
    warm(layer, x)
    layer(x)
    assert count(layer) == 0
    eager(x)
    assert count(eager) == 1


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


def test_the_gradient_of_a_gradient_is_refused_as_an_eager_one_is(gpu: Gpu) -> None:
    for layer in twins(gpu, capture=True):
        x = inputs(gpu, 0).requires_grad_()
        (grad,) = torch.autograd.grad(layer(x).square().sum(), x, create_graph=True)
        with pytest.raises(RuntimeError, match="gradient of a gradient is not supported"):
            grad.sum().backward()


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
