"""LION's implicit layer: a small equilibrium network added to a representation."""

from __future__ import annotations

from typing import TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import deqcore

__all__ = ["BottleneckCell", "ImplicitPrompt", "Solver"]

Solver: TypeAlias = deqcore.Anderson | deqcore.Broyden | deqcore.Picard

UP_GAIN = 0.5


class BottleneckCell(nn.Module):
    """f(z, x) = up(gelu(norm(down(z + x)))), a map of R^D through h dimensions [ours].

    `down` starts with orthonormal rows and `up` with singular values of UP_GAIN, and the norm
    divides by about one, so at the start f contracts in z by about UP_GAIN and a solve takes few
    steps. The norm also bounds f, so no weights can make the iteration run off to infinity.

    Args:
        dim: D, width of z and x.
        hidden: h, width of the bottleneck.
    """

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.down = nn.Linear(dim, hidden, bias=False)
        self.norm = nn.LayerNorm(hidden)
        self.up = nn.Linear(hidden, dim)
        nn.init.orthogonal_(self.down.weight)
        nn.init.orthogonal_(self.up.weight, gain=UP_GAIN)
        nn.init.zeros_(self.up.bias)

    def forward(self, z: Tensor, x: Tensor) -> Tensor:  # (..., D), (..., D) -> (..., D)
        return self.up(F.gelu(self.norm(self.down(z + x))))


class ImplicitPrompt(nn.Module):
    """x -> x + strength * z*, where z* = f(z*, normalised x) [fusion and f: ours].

    The gradient is that of the equilibrium (implicit function theorem), so memory does not grow
    with the solver's steps [paper].

    Args:
        dim: D, width of x.
        hidden: h, width of the bottleneck; D * (2h + 1) + 2h + 1 parameters in all.
        strength: initial value of the learned scalar lambda.
        solver: for z* and for the backward solve; None means Anderson with its defaults.
        iterations: None for the equilibrium; k replaces it by k explicit applications of f from
            zero with ordinary backpropagation (an ablation: k layers that share their weights).
    """

    def __init__(
        self,
        dim: int,
        hidden: int,
        strength: float = 1.0,
        solver: Solver | None = None,
        iterations: int | None = None,
    ) -> None:
        super().__init__()
        solver = deqcore.Anderson() if solver is None else solver
        self.layer = deqcore.ImplicitLayer(
            BottleneckCell(dim, hidden), solver=solver, adjoint=deqcore.Implicit(solver=solver)
        )
        self.strength = nn.Parameter(torch.tensor(float(strength)))
        self.iterations = iterations

    def forward(self, x: Tensor) -> Tensor:  # (B, ..., D) -> (B, ..., D)
        injected = F.layer_norm(x, x.shape[-1:])
        if self.iterations is None:
            return x + self.strength * self.layer(injected)
        z = torch.zeros_like(injected)
        for _ in range(self.iterations):
            z = self.layer.cell(z, injected)
        return x + self.strength * z

    @torch.no_grad()
    def residual_trace(self, x: Tensor, solver: Solver) -> Tensor | None:
        """Residual after each step for every row, (B, n); None for explicit layers.

        Args:
            x: (B, ..., D), what the layer sees in the network.
            solver: one with `record_trace=True`.
        """
        if self.iterations is not None:
            return None
        injected = F.layer_norm(x, x.shape[-1:])
        cell, z0 = self.layer.cell, torch.zeros_like(injected)
        return deqcore.fixed_point(cell, z0, injected, solver=solver).trace
