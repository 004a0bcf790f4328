"""What every method is: a frozen part whose output can be cached, and a tuned part."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lion_models.backbones import FrozenBackbone

__all__ = ["ParameterCount", "TunedClassifier", "count_parameters", "trained_state"]


class TunedClassifier(nn.Module, ABC):
    """Images to logits through a frozen backbone and whatever a method trains.

    Args:
        backbone: frozen; shared by reference, never copied or changed.
        classes: number of outputs of the linear head.

    Attributes:
        replaced: number of the backbone's parameters that a method computes with copies of.
    """

    replaced: int = 0

    def __init__(self, backbone: FrozenBackbone, classes: int) -> None:
        super().__init__()
        self.backbone = backbone
        self.head = nn.Linear(backbone.feature_dim, classes)
        nn.init.trunc_normal_(self.head.weight, std=0.02)
        nn.init.zeros_(self.head.bias)

    @torch.no_grad()
    def frozen(self, images: Tensor) -> Tensor:
        """The part before anything trained: images (B, C, S, S) in [0, 1] -> tokens (B, T, D).

        The trainer caches it; a method that trains nothing inside the backbone overrides it to
        give the backbone's feature.
        """
        return self.backbone.embed(images)

    @abstractmethod
    def tuned(self, fixed: Tensor) -> Tensor:
        """The rest: output of `frozen` -> logits (B, classes)."""

    def forward(self, images: Tensor) -> Tensor:  # (B, C, S, S) in [0, 1] -> (B, classes)
        return self.tuned(self.frozen(images))


@dataclass(frozen=True)
class ParameterCount:
    """Numbers of scalars.

    Attributes:
        trained: everything that the optimizer changes, the head included.
        head: the linear head's share of it.
        frozen: the backbone's, without those that trained copies replace.
    """

    trained: int
    head: int
    frozen: int

    @property
    def without_head(self) -> int:
        return self.trained - self.head


def count_parameters(model: TunedClassifier) -> ParameterCount:
    """Count trained, head and frozen parameters."""
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    head = sum(p.numel() for p in model.head.parameters())
    backbone = sum(p.numel() for p in model.backbone.parameters())
    return ParameterCount(trained, head, backbone - model.replaced)


def trained_state(model: TunedClassifier) -> dict[str, Tensor]:
    """Detached copies of the trained parameters alone, by name."""
    return {
        name: parameter.detach().clone()
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    }
