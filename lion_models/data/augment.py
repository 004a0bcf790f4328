"""Small random affine maps of training images."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["AUGMENTATIONS", "jitter"]

AUGMENTATIONS = ("none", "affine")
ANGLE = math.radians(10)
SHIFT = 0.1
SCALE = 0.1


def jitter(images: Tensor) -> Tensor:
    """Rotate, scale and shift each image a little, at random: float (B, C, S, S) -> the same.

    Up to 10 degrees, 10% of the size and 10% of the side either way, each uniform and drawn from
    torch's global generator. What moves in from outside repeats the border.
    """

    def uniform(bound: float) -> Tensor:
        return (2 * torch.rand(len(images), device=images.device) - 1) * bound

    angle, scale = uniform(ANGLE), 1 + uniform(SCALE)
    cos, sin = scale * angle.cos(), scale * angle.sin()
    # The grid runs from -1 to 1, so a shift of one side is 2.
    rows = [
        torch.stack([cos, -sin, 2 * uniform(SHIFT)], dim=1),
        torch.stack([sin, cos, 2 * uniform(SHIFT)], dim=1),
    ]
    grid = F.affine_grid(torch.stack(rows, dim=1), list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, padding_mode="border", align_corners=False)
