"""Layers that are captured beside their twins that are not."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from deqcore import ImplicitLayer, _checks, _layer_graphs
from deqcore._layer_graphs import CALLS_BEFORE
from tests.support.problems import equal
from tests.support.tape import Taped


@dataclass
class Gpu:
    """Where layers are captured, and the recorders of those that were."""

    device: torch.device
    recorders: list[Any] = field(default_factory=list)


def captured_here(gpu: Gpu, put: Callable[[Any, str, Any], None] = setattr) -> None:
    """Have layers captured on ``gpu.device``, and their recorders noted."""
    make = _layer_graphs._recorder
    if gpu.device.type == "cpu":
        make = Taped
        put(_layer_graphs, "_is_usable", lambda tensor: True)
        put(_layer_graphs, "_stream", lambda device: 0)
        put(_checks, "_free", lambda tensor: False)  # no look at a value

    def recorder() -> Any:
        gpu.recorders.append(make())
        return gpu.recorders[-1]

    put(_layer_graphs, "_recorder", recorder)


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
    gradients = {name: p.grad.clone() for name, p in layer.named_parameters() if p.grad is not None}
    assert report is not None
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


class Reads(Cell):
    """Waits for the GPU."""

    def forward(self, z: Tensor, x: Tensor, shift: Any = 0.0) -> Tensor:
        return super().forward(z, x, shift) * (1.0 if z.sum().item() < 1e9 else 0.0)
