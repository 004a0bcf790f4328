"""What the solvers are given: an f that costs nothing, and a real one to check answers with."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import torch
from torch import Tensor


def free_function(batch: int, dim: int, device: str = "cpu") -> Callable[[Tensor], Tensor]:
    """An f that returns prepared tensors in turn, so that only the solver's own work is timed.

    The residuals never fall, so that no solver stops early.
    """
    generator = torch.Generator().manual_seed(0)
    prepared = itertools.cycle(
        [
            torch.randn(batch, dim, generator=generator).to(device)
            for _ in range(3 if dim > 10**5 else 7)
        ]
    )
    return lambda z: next(prepared)


def contraction(batch: int, dim: int, device: str = "cpu") -> Callable[[Tensor], Tensor]:
    """z -> scale * z + shift, scales up to 0.9 in size; it makes no temporaries of its own."""
    generator = torch.Generator().manual_seed(1)
    scale = ((2 * torch.rand(dim, generator=generator) - 1) * 0.9).to(device)
    shift = torch.randn(batch, dim, generator=generator).to(device)
    return lambda z: torch.addcmul(shift, z, scale)


def agree(value: Tensor, other: Tensor, f: Callable[[Tensor], Tensor], tolerance: float) -> None:
    """Raise unless both solve z = f(z) and are the same to `tolerance`, relative."""
    for name, z in (("ours", value), ("the peer's", other)):
        residual = ((f(z) - z).norm() / z.norm()).item()
        if not residual <= tolerance:
            raise RuntimeError(f"{name} answer is wrong: relative residual {residual:.2e}")
    difference = ((value - other).norm() / other.norm()).item()
    if not difference <= 20 * tolerance:
        raise RuntimeError(f"the answers differ by {difference:.2e}, relative")
