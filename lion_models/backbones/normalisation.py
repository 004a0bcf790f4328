"""Another normalisation of the pixels than the one that a backbone was trained with."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from torch import Tensor

from lion_models.backbones.frozen import FrozenBackbone, Normalisation
from lion_models.base.errors import choose

__all__ = ["NORMALISATIONS", "named_normalisation", "with_normalisation"]

NORMALISATIONS = ("backbone", "imagenet", "half")
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


def with_normalisation(backbone: FrozenBackbone, name: str) -> FrozenBackbone:
    """The same frozen weights behind another normalisation.

    A backbone normalises pixels itself, so they are mapped beforehand such that its own mean and
    deviation turn them into what the other ones would give.

    Args:
        backbone: left as it is; the result shares its weights.
        name: `backbone` (its own), `imagenet` (mean and deviation of each channel; their averages
            for grey) or `half` (mean and deviation 0.5, as Inception).
    """
    choose("normalisation", name, NORMALISATIONS)
    if name == "backbone":
        return backbone
    mean, std = named_normalisation(name, backbone.channels)
    own_mean, own_std = (_per_channel(value) for value in backbone.normalisation)
    scale = own_std / _per_channel(std)
    shift = own_mean - _per_channel(mean) * scale
    embed = backbone.embed

    def normalised(images: Tensor) -> Tensor:
        return embed(images * scale.to(images) + shift.to(images))

    other = copy.copy(backbone)
    other.embed = normalised
    other.normalisation = (mean, std)
    return other


def named_normalisation(name: str, channels: int) -> Normalisation:
    """Mean and deviation of `imagenet` or `half`; see `with_normalisation`."""
    if name == "half":
        return 0.5, 0.5
    if channels == 3:
        return IMAGENET_MEAN, IMAGENET_STD
    return sum(IMAGENET_MEAN) / 3, sum(IMAGENET_STD) / 3


def _per_channel(value: float | Sequence[float]) -> Tensor:
    """(C, 1, 1), or (1, 1, 1) for one number."""
    return torch.tensor(value, dtype=torch.float32).reshape(-1, 1, 1)
