"""The training loss, weighted for long-tailed data where asked."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from lion_models.base.errors import choose
from lion_models.run.training import CLASS_WEIGHTS

__all__ = ["TrainingLoss"]


class TrainingLoss:
    """Cross-entropy as a sum, with what to divide it by for a batch's mean.

    The sum of the parts of a batch, divided by `denominator` of the whole, is the loss of the
    whole; so parts may be computed one after the other, or by several processes.

    Args:
        kind: `none`; `balanced`: each image weighs n / (classes * n_c), scikit-learn's rule;
            `balanced-softmax`: log(n_c / n) is added to the logits while training (Ren et al.,
            NeurIPS 2020, arXiv 2007.10740, eq. 3; the additive logit adjustment of Menon et al.,
            ICLR 2021, with tau = 1).
        labels: int64 (n,), of all training images.
        classes: number of classes. A class without an image counts as if it had one.
    """

    def __init__(self, kind: str, labels: Tensor, classes: int) -> None:
        choose("class_weights", kind, CLASS_WEIGHTS)
        counts = torch.bincount(labels, minlength=classes).clamp(min=1).float()
        self._weight = len(labels) / (classes * counts) if kind == "balanced" else None
        self._shift = (counts / len(labels)).log() if kind == "balanced-softmax" else None

    def sum(self, logits: Tensor, labels: Tensor) -> Tensor:  # (B, classes), (B,) -> ()
        logits = logits.float()
        if self._shift is not None:
            logits = logits + self._shift
        return F.cross_entropy(logits, labels, weight=self._weight, reduction="sum")

    def denominator(self, labels: Tensor) -> float:
        """Sum of the weights of a whole batch's images."""
        return float(len(labels) if self._weight is None else self._weight[labels].sum())
