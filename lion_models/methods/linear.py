"""Linear probe: a linear classifier on the frozen backbone's feature."""

from __future__ import annotations

import torch
from torch import Tensor

from lion_models.methods.base import TunedClassifier
from lion_models.methods.registry import MethodConfig, register

__all__ = ["LinearConfig", "LinearProbe"]


class LinearProbe(TunedClassifier):
    """Only the head trains.

    Args:
        backbone: frozen.
        classes: outputs of the head.
    """

    method = "linear"

    @torch.no_grad()
    def frozen(self, images: Tensor) -> Tensor:  # (B, C, S, S) -> (B, F)
        return self.backbone(images)

    def tuned(self, fixed: Tensor) -> Tensor:  # (B, F) -> (B, classes)
        return self.head(fixed)


@register("linear", LinearProbe, colour="#999999")
class LinearConfig(MethodConfig):
    """There is nothing to choose."""

    goes_back = False
