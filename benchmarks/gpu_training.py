"""G7: whole training steps of an implicit layer on a GPU, against torchdeq's."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

import deqcore
from benchmarks.gpu_bench import Bench
from benchmarks.peers import torchdeq_step

EVALUATIONS = 24  # of the cell, forward, and as many of its derivative backward


class Mlp(nn.Module):
    """tanh(A z + B x), a contraction."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.inner, self.outer = nn.Linear(dim, dim), nn.Linear(dim, dim)
        with torch.no_grad():
            self.inner.weight.mul_(0.5)

    def forward(self, z: Tensor, x: Tensor) -> Tensor:
        return torch.tanh(self.inner(z) + self.outer(x))


class Convolution(nn.Module):
    """tanh of a 3 x 3 convolution of z, plus x."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.inner = nn.Conv2d(channels, channels, 3, padding=1)
        with torch.no_grad():
            self.inner.weight.mul_(0.3)

    def forward(self, z: Tensor, x: Tensor) -> Tensor:
        return torch.tanh(self.inner(z) + x)


def bench_training(bench: Bench) -> None:
    """A step as a user writes it: forward, loss, backward, with early exit off."""
    for name, make, shape, gate in (
        ("MLP 16x512", partial(Mlp, 512), (16, 512), 25.0),
        ("MLP 256x1024", partial(Mlp, 1024), (256, 1024), None),
        ("convolution 64x64x32x32", partial(Convolution, 64), (64, 64, 32, 32), None),
    ):
        torch.manual_seed(0)
        cell = make().to(bench.device)
        x = torch.randn(shape if bench.real else (2, *shape[1:]), device=bench.device)
        with torch.enable_grad():
            contestants = {
                "deqcore": our_step(cell, x),
                "torchdeq": torchdeq_step(cell, x, EVALUATIONS),
            }
            gates = {} if gate is None else {"torchdeq": gate}
            bench.compare(f"G7 training step {name}", contestants, gates)


def our_step(cell: nn.Module, x: Tensor) -> Callable[[], None]:
    solver = deqcore.Anderson(
        memory=5, max_steps=EVALUATIONS, check_every=0, rtol=0.0, atol=0.0, patience=10**6
    )
    layer = deqcore.ImplicitLayer(cell, solver=solver, adjoint=deqcore.Implicit(solver=solver))

    def step() -> None:
        value = layer(x)
        value.square().mean().backward()

    return step
