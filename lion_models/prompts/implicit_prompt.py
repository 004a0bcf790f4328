"""LION's implicit layer: a small equilibrium network added to a representation."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lion_models.backbones.frozen import SPACES
from lion_models.base.errors import UserError, choose
from lion_models.prompts.solved import SolvedModule, Solver

__all__ = ["BottleneckCell", "ConvCell", "ImplicitPrompt"]

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


class ImplicitPrompt(SolvedModule):
    """x -> x + strength * z*, where z* = f(z*, normalised x) [fusion and f: ours].

    Args:
        dim: D, width of x; C in the space `pixel`.
        hidden: h, width of the bottleneck; D (2h + 1) + 2h + 1 parameters in all, in the space
            `pixel` C (18h + 1) + 2h + 1.
        strength: initial value of the learned scalar lambda.
        solver, iterations: see `SolvedModule`.
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
        choose("space", space, SPACES)
        if hidden < 1:
            raise UserError(f"`hidden`: expected 1 or more, got {hidden}")
        cell = (BottleneckCell if space == "token" else ConvCell)(dim, hidden)
        super().__init__(cell, solver, iterations)
        self.space = space
        self.strength = nn.Parameter(torch.tensor(float(strength)))

    def forward(self, x: Tensor, source: Tensor | None = None) -> Tensor:
        """x with the equilibrium added.

        Args:
            x: (B, ..., D), or (B, C, H, W) in the space `pixel`.
            source: what drives the equilibrium, shaped like x; None means x itself.
        """
        return x + self.strength * self.solve(self.injected(x if source is None else source))

    def injected(self, source: Tensor) -> Tensor:
        """The normalised source, like it in shape."""
        if self.space == "token":
            return F.layer_norm(source, source.shape[-1:])
        return F.group_norm(source, 1)
