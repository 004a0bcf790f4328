"""The one place that sets a seed."""

from __future__ import annotations

import torch

__all__ = ["seed_all"]


def seed_all(seed: int, epoch: int = 0) -> None:
    """Seed torch for one epoch of one run (epoch 0 is the model's initialisation).

    An epoch's random numbers depend on (seed, epoch) alone, so a resumed run draws what an
    uninterrupted one would, without storing the generator's state.
    """
    torch.manual_seed(seed * 1_000_003 + epoch)
