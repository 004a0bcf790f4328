"""Accuracy where classes are of unequal size: the mean of the classes' own is shown beside it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

__all__ = ["UNEQUAL", "accuracy_text", "are_unequal", "balanced_accuracy", "balanced_figure"]

UNEQUAL = 1.5  # times the images of the smallest class


def are_unequal(labels: Tensor) -> bool:
    """Whether the largest class that is there has more than 1.5 times the smallest one's images."""
    _, counts = labels.unique(return_counts=True)
    return len(counts) > 1 and bool(counts.max() > UNEQUAL * counts.min())


def balanced_accuracy(truth: Tensor, predicted: Tensor) -> float:
    """The mean over the classes that are there of the share that is recognised."""
    hits = (truth == predicted).double()
    return torch.stack([hits[truth == label].mean() for label in truth.unique()]).mean().item()


def balanced_figure(truth: Tensor, predicted: Tensor, prefix: str = "") -> dict[str, float]:
    """`balanced_accuracy`, its name behind a prefix, where classes are unequal; else nothing."""
    if not are_unequal(truth):
        return {}
    return {f"{prefix}balanced_accuracy": balanced_accuracy(truth, predicted)}


def accuracy_text(figures: Mapping[str, Any], prefix: str = "", digits: int = 1) -> str:
    """`81.0%`, or `81.0% (balanced 33.3%)` where classes are unequal.

    Args:
        figures: `accuracy`, and `balanced_accuracy` where there is one.
        prefix: before both names.
        digits: after the point.
    """
    text = f"{100 * figures[f'{prefix}accuracy']:.{digits}f}%"
    balanced = figures.get(f"{prefix}balanced_accuracy")
    return text if balanced is None else f"{text} (balanced {100 * balanced:.{digits}f}%)"
