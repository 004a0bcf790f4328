"""Layers that replay their solves: on a GPU, and anywhere on a tape that stands in for graphs."""

from __future__ import annotations

import copy
import logging
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from deqcore import (
    Anderson,
    Broyden,
    FixedDropout,
    Implicit,
    ImplicitLayer,
    Phantom,
    Picard,
    Unrolled,
    _layer_graphs,
)
from deqcore._layer_graphs import (
    CALLS_BEFORE,
    GRAPHS,
    GRAPHS_ALIVE,
    LATER,
    TIMES_REPLACED,
)
from tests.support.captured_layers import (
    Cell,
    Gpu,
    Reads,
    assert_same,
    count,
    inputs,
    results,
    twins,
    warm,
)
from tests.support.problems import equal


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
    launches = [getattr(recorder, "launches", None) for recorder in gpu.recorders]
    with torch.no_grad():
        layer(inputs(gpu, 0, GRAPHS + 2))
        layer(inputs(gpu, 0, 1))  # its recording was the oldest
    assert len(gpu.recorders) == GRAPHS + 2
    if None not in launches:
        launches[-1] += 1
        assert [recorder.launches for recorder in gpu.recorders] == launches


def test_more_signatures_than_recordings_are_not_recorded_again_and_again(gpu: Gpu) -> None:
    layer, eager = twins(gpu)
    shapes = range(1, GRAPHS + 4)
    with torch.no_grad():
        for seed in range(LATER * CALLS_BEFORE):
            for rows in shapes:
                x = inputs(gpu, seed, rows)
                assert equal(layer(x), eager(x))
    assert len(gpu.recorders) == len(shapes)


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


class Drops(Cell):
    def forward(self, z: Tensor, x: Tensor) -> Tensor:
        return super().forward(z, F.dropout(x, 0.5, self.training))


class DropsOnce(Cell):
    def __init__(self) -> None:
        super().__init__()
        self.dropout = FixedDropout(0.5)

    def forward(self, z: Tensor, x: Tensor) -> Tensor:
        return super().forward(z, self.dropout(x))


class Counts(Cell):
    calls = 0

    def forward(self, z: Tensor, x: Tensor) -> Tensor:
        self.calls += 1
        return super().forward(z, x)


class Keeps(Cell):
    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Tensor] = []
        self.by_name: dict[str, Any] = {}

    def forward(self, z: Tensor, x: Tensor) -> Tensor:
        self.last = super().forward(z, x)
        self.seen.append(z)
        self.by_name[str(len(self.seen))] = z
        return self.last


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


def len_or_number(value: Any) -> int:
    return value if isinstance(value, int) else len(value)


@pytest.mark.parametrize(
    ("cell", "reason"),
    [
        (Reads, "cannot be captured"), (Drops, "draws random numbers"),
        (Counts, "changes attributes"), (Keeps, "changes attributes"),
        (Borrows, "neither its parameters nor its arguments"),
        (Hooked, "has hooks"), (DropsOnce, "draws random numbers"),
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
        for name in ("calls", "seen", "by_name"):
            if hasattr(eager.cell, name):
                assert len_or_number(getattr(layer.cell, name)) == len_or_number(
                    getattr(eager.cell, name)
                )
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


@pytest.mark.parametrize("limit", ["LARGEST", "MOST_BYTES"])
def test_true_records_the_first_call_and_large_states(
    gpu: Gpu, limit: str, monkeypatch: Any
) -> None:
    monkeypatch.setattr(_layer_graphs, limit, 12)
    layer, _ = twins(gpu)
    eager, _ = twins(gpu, capture=True)
    x = inputs(gpu, 0)
    warm(layer, x)
    layer(x)
    assert count(layer) == 0
    eager(x)
    assert count(eager) == 1
