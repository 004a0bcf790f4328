"""Peak memory of a whole training step against the steps of its solves.

Bytes of live tensors, counted, so that they do not depend on the processor; in states, each one
[B, D] of float32.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

import deqcore
from benchmarks.harness import Report, Result, peak_bytes
from benchmarks.peers import torchdeq_step

BATCH, DIM, HISTORY = 16, 4096, 5
STEPS = (5, 10, 20, 40, 80)


class Cell(torch.nn.Module):
    """tanh(scale * z + x): D parameters, and one state kept for backward."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = torch.nn.Parameter(torch.full((DIM,), 0.5))

    def forward(self, z: Tensor, x: Tensor) -> Tensor:
        return torch.tanh(self.scale * z + x)


def run(report: Report) -> None:
    for steps in (5, 10) if report.short else STEPS:
        for result in measure(steps):
            report.add(result)


@torch.enable_grad()
def measure(steps: int) -> list[Result]:
    """deqcore's implicit gradient beside its unrolled one and torchdeq's implicit one."""
    torch.manual_seed(0)
    cell, x = Cell(), torch.randn(BATCH, DIM)
    solver = deqcore.Anderson(memory=HISTORY, max_steps=steps, check_every=0, rtol=0.0, atol=0.0)
    peaks = {
        "Implicit": _ours(cell, x, solver, deqcore.Implicit(solver=solver, on_failure="ignore")),
        "Unrolled": _ours(cell, x, solver, deqcore.Unrolled()),
        "torchdeq m=6, implicit": torchdeq_step(cell, x, steps),
    }
    states = {name: peak_bytes(step) / (4 * BATCH * DIM) for name, step in peaks.items()}
    ours = states.pop("Implicit")
    return [
        Result(
            f"training step memory, {steps} steps", name, peer / ours, peer / ours, peer / ours,
            ours, peer, "states",
        )
        for name, peer in states.items()
    ]  # fmt: skip


def _ours(
    cell: Cell, x: Tensor, solver: deqcore.Solver, adjoint: deqcore.Adjoint
) -> Callable[[], object]:
    layer = deqcore.ImplicitLayer(cell, solver=solver, adjoint=adjoint)
    return lambda: layer(x).square().mean().backward()
