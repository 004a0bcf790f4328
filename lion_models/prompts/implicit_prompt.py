"""LION's implicit layer: a small equilibrium network added to a representation."""

from __future__ import annotations

from dataclasses import replace
from typing import TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import deqcore
from lion_models.backbones.frozen import SPACES
from lion_models.base.errors import UserError, choose

__all__ = ["BottleneckCell", "ConvCell", "ImplicitPrompt", "Solver"]

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


class ConvCell(nn.Module):
    """f(z, x) = up(gelu(norm(down(z + x)))) on images, with 3x3 convolutions C -> c -> C [ours].

    The norm is a GroupNorm of one group: it divides by one number for each image, so f is bounded
    as `BottleneckCell` is. A 3x3 convolution can be 3 times as large as the matrix of its kernels;
    `up` starts with singular values of UP_GAIN / 3 at most for that.

    Args:
        channels: C of z and x.
        hidden: c.
    """

    def __init__(self, channels: int, hidden: int) -> None:
        super().__init__()
        self.down = nn.Conv2d(channels, hidden, 3, padding=1, bias=False)
        self.norm = nn.GroupNorm(1, hidden)
        self.up = nn.Conv2d(hidden, channels, 3, padding=1)
        nn.init.orthogonal_(self.down.weight)
        nn.init.orthogonal_(self.up.weight, gain=UP_GAIN / 3)
        if self.up.bias is not None:
            nn.init.zeros_(self.up.bias)

    def forward(self, z: Tensor, x: Tensor) -> Tensor:  # (B, C, H, W) twice -> (B, C, H, W)
        return self.up(F.gelu(self.norm(self.down(z + x))))


class ImplicitPrompt(nn.Module):
    """x -> x + strength * z*, where z* = f(z*, normalised x) [fusion and f: ours].

    The gradient is that of the equilibrium (implicit function theorem), so memory does not grow
    with the solver's steps [paper].

    Args:
        dim: D, width of x; C in the space `pixel`.
        hidden: h, width of the bottleneck; D (2h + 1) + 2h + 1 parameters in all, in the space
            `pixel` C (18h + 1) + 2h + 1.
        strength: initial value of the learned scalar lambda.
        solver: for z* and for the backward solve; None means Anderson with its defaults.
        iterations: None for the equilibrium; k replaces it by k explicit applications of f from
            zero with ordinary backpropagation (an ablation: k layers that share their weights).
        space: `token` for x (B, ..., D) and f a `BottleneckCell` on each row; `pixel` for images
            (B, C, H, W) and a `ConvCell`.
    """

    def __init__(
        self,
        dim: int,
        hidden: int,
        strength: float = 1.0,
        solver: Solver | None = None,
        iterations: int | None = None,
        space: str = "token",
    ) -> None:
        super().__init__()
        choose("space", space, SPACES)
        if hidden < 1:
            raise UserError(f"`hidden`: expected 1 or more, got {hidden}")
        solver = deqcore.Anderson() if solver is None else solver
        self.space = space
        self.layer = deqcore.ImplicitLayer(
            (BottleneckCell if space == "token" else ConvCell)(dim, hidden),
            solver=solver,
            adjoint=deqcore.Implicit(solver=solver),
        )
        self.strength = nn.Parameter(torch.tensor(float(strength)))
        self.iterations = iterations

    def forward(self, x: Tensor, source: Tensor | None = None) -> Tensor:
        """x with the equilibrium added.

        Args:
            x: (B, ..., D), or (B, C, H, W) in the space `pixel`.
            source: what drives the equilibrium, shaped like x; None means x itself.
        """
        injected = self._normalise(x if source is None else source)
        if self.iterations is None:
            return x + self.strength * self.layer(injected)
        z = torch.zeros_like(injected)
        for _ in range(self.iterations):
            z = self.layer.cell(z, injected)
        return x + self.strength * z

    @torch.no_grad()
    def residual_trace(self, source: Tensor) -> Tensor | None:
        """Residual after each step for every row, (B, n); None for explicit layers.

        Args:
            source: what drives the equilibrium in the network, (B, ..., D) or (B, C, H, W).
        """
        if self.iterations is not None:
            return None
        injected = self._normalise(source)
        cell, z0 = self.layer.cell, torch.zeros_like(injected)
        solver = replace(self.layer.solver, record_trace=True)
        return deqcore.fixed_point(cell, z0, injected, solver=solver).trace

    @property
    def matrices(self) -> list[nn.Parameter]:
        """The dense matrices of f, `down` and `up`, which robust training acts on."""
        return [p for p in self.layer.cell.parameters() if p.dim() >= 2]

    def _normalise(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, x.shape[-1:]) if self.space == "token" else F.group_norm(x, 1)
