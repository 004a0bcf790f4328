"""How far the probabilities of a test set can be trusted, and where it goes wrong most."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from typing import Any

from PIL import Image
from torch import Tensor

__all__ = ["calibration", "confused_pairs", "surest_mistakes", "thumbnail", "top_accuracy"]

BINS = 10


def top_accuracy(truth: Tensor, chances: Tensor, count: int = 5) -> float:
    """The share of images whose class is among the `count` most probable ones.

    Args:
        truth: int64 (n,).
        chances: (n, C).
        count: at most C.
    """
    best = chances.topk(min(count, chances.shape[1]), dim=1).indices
    return (best == truth[:, None]).any(1).double().mean().item()


def calibration(truth: Tensor, chances: Tensor) -> dict[str, Any]:
    """Accuracy against confidence in ten bins of equal width (Guo et al., ICML 2017).

    Args:
        truth: int64 (n,).
        chances: (n, C), rows that sum to one.

    Returns:
        `ece`, the mean over the images of their bin's |accuracy - confidence|, and `bins`: `low`,
        `high`, `images`, `confidence` and `accuracy`, those without images left out.
    """
    confidence, predicted = chances.double().max(1)
    hits = (predicted == truth).double()
    index = (confidence * BINS).long().clamp(max=BINS - 1)
    bins = []
    for at in index.unique().tolist():
        inside = index == at
        bins.append(
            {
                "low": at / BINS,
                "high": (at + 1) / BINS,
                "images": int(inside.sum()),
                "confidence": confidence[inside].mean().item(),
                "accuracy": hits[inside].mean().item(),
            }
        )
    gaps = (one["images"] * abs(one["accuracy"] - one["confidence"]) for one in bins)
    return {"ece": sum(gaps) / max(1, len(truth)), "bins": bins}


def confused_pairs(
    classes: Sequence[str], confusion: Sequence[Sequence[int]], most: int = 10
) -> list[dict[str, Any]]:
    """The pairs of classes that are most often taken for each other.

    Returns:
        A row each: `true`, `predicted`, `images`, and `share` of the true class.
    """
    found = [
        (count, truth, answer)
        for truth, row in enumerate(confusion)
        for answer, count in enumerate(row)
        if count and truth != answer
    ]
    found.sort(key=lambda one: (-one[0], one[1:]))
    return [
        {
            "true": classes[truth],
            "predicted": classes[answer],
            "images": count,
            "share": count / sum(confusion[truth]),
        }
        for count, truth, answer in found[:most]
    ]


def surest_mistakes(truth: Tensor, chances: Tensor, most: int = 12) -> list[int]:
    """The wrongly answered images with the highest confidence, surest first."""
    confidence, predicted = chances.max(1)
    wrong = (predicted != truth).nonzero().squeeze(1)
    order = confidence[wrong].argsort(descending=True, stable=True)
    return wrong[order][:most].tolist()


def thumbnail(pixels: Tensor) -> str:
    """uint8 (1 or 3, H, W), as a backbone sees it, as the address of a PNG for a page."""
    array = pixels.squeeze(0) if pixels.shape[0] == 1 else pixels.permute(1, 2, 0)
    buffer = io.BytesIO()
    image = Image.fromarray(array.contiguous().numpy())
    image.thumbnail((128, 128))
    image.save(buffer, "PNG", optimize=True)
    return address(buffer.getvalue())


def address(png: bytes) -> str:
    """A PNG as an address that needs no file."""
    return f"data:image/png;base64,{base64.b64encode(png).decode()}"
