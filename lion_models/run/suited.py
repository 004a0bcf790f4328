"""Whether a backbone sees what tells classes apart: colour, and details of large pictures."""

from __future__ import annotations

import statistics
import warnings
from dataclasses import replace

import torch
from torch import Tensor

from lion_models.backbones import FrozenBackbone
from lion_models.backbones.registry import PACKAGED
from lion_models.data import ArraySource, FolderSource, Geometry, Source
from lion_models.data.base import DecodingSource
from lion_models.data.images import glance
from lion_models.data.transforms import LUMINANCE

__all__ = ["BackboneWarning", "separated", "suited_here", "unseen", "warn_unsuited"]

CLASSES, IMAGES = 20, 6  # of each class; looked at
COLOUR_TELLS = 0.25  # how much more often than brightness
LEAST = 0.6
FEWEST = 10  # images, from which colour is judged
SMALL, TIMES = 64, 8  # pixels of a backbone's side, and of the pictures' in such sides
# What is taken where it is on the machine, best first; the first is fetched where none is.
INSTEAD = ("efficientnet-lite0,image_size=112", "vit-s14-focus,image_size=112,readout=11")


class BackboneWarning(UserWarning):
    """A backbone that does not see what the data's classes may differ in."""


def warn_unsuited(source: Source, rows: Tensor, backbone: FrozenBackbone) -> None:
    """Look at a few training images, and warn where the backbone sees too little of them.

    Args:
        source: of the images.
        rows: int64 (n,), of the training images.
        backbone: what will see them.
    """
    reasons = unseen(source, rows, backbone)
    if reasons:
        here = suited_here()
        how = (
            "on this machine" if here else f"'lion backbone prepare {_bare(INSTEAD[0])}' fetches it"
        )
        shape = f"{backbone.image_size} x {backbone.image_size}"
        colour = " grey" if backbone.channels == 1 else ""
        warnings.warn(
            f"`backbone` {backbone.name}: sees {shape}{colour} pixels, and "
            f"{' and '.join(reasons)}; `backbone` {[*here, *INSTEAD][0]} sees more ({how}), and "
            "so do timm:NAME and torchvision:NAME",
            BackboneWarning,
            stacklevel=3,
        )


def suited_here() -> list[str]:
    """Backbones for colour and detail whose weights are on this machine, best first."""
    return [name for name in INSTEAD if PACKAGED[_bare(name)].find() is not None]


def _bare(name: str) -> str:
    return name.partition(",")[0]


def unseen(source: Source, rows: Tensor, backbone: FrozenBackbone) -> list[str]:
    """What a backbone does not see of the training images, by a few of them; see above."""
    if backbone.channels == 3 and backbone.image_size >= SMALL:
        return []
    rows = _few_of_each(source.labels, rows)
    colours, sides = _look(source, rows)
    reasons = []
    if backbone.channels == 1 and len(colours) >= FEWEST:
        labels = source.labels[rows]
        by_colour = separated(colours, labels)
        by_brightness = separated(colours @ torch.tensor(LUMINANCE)[:, None], labels)
        # Few images: what chance does not reach, two deviations above what brightness does.
        margin = max(COLOUR_TELLS, 2 * (0.25 / len(rows)) ** 0.5)
        if by_colour - by_brightness >= margin and by_colour >= LEAST:
            reasons.append(
                f"colour tells these classes apart (the mean colour of a picture names "
                f"{by_colour:.0%} of {len(rows)}, its brightness {by_brightness:.0%})"
            )
    side = statistics.median(sides) if sides else 0
    if backbone.image_size < SMALL and side >= TIMES * backbone.image_size:
        reasons.append(f"the pictures are large (shorter side {side:.0f} pixels)")
    return reasons


def separated(features: Tensor, labels: Tensor) -> float:
    """How many are nearest to the mean of their own class, which is taken without them.

    Distances are those of the spread within classes (linear discriminant analysis).

    Args:
        features: (n, D).
        labels: int64 (n,).
    """
    _, labels = labels.unique(return_inverse=True)
    values = features.double()
    one_hot = torch.nn.functional.one_hot(labels).double()
    counts, sums = one_hot.sum(0), one_hot.T @ values
    within = values - (sums / counts[:, None])[labels]
    spread = within.T @ within / max(1, len(values) - len(counts))
    spread += (1e-6 + 1e-6 * spread.trace()) * torch.eye(spread.shape[0], dtype=spread.dtype)
    root = torch.linalg.cholesky(spread)
    values, sums = (
        torch.linalg.solve_triangular(root, part.T, upper=False).T for part in (values, sums)
    )
    means = (sums / counts[:, None]).expand(len(values), -1, -1).clone()
    own = torch.arange(len(values)), labels
    means[own] = (sums[labels] - values) / (counts[labels] - 1).clamp(min=1)[:, None]
    nearest = (values[:, None] - means).square().sum(2).argmin(1)
    return float((nearest == labels).double().mean())


def _few_of_each(labels: Tensor, rows: Tensor) -> Tensor:
    few = [rows[labels[rows] == label][:IMAGES] for label in labels.unique()[:CLASSES]]
    return torch.cat([some for some in few if len(some) > 1] or [rows[:0]])


def _look(source: Source, rows: Tensor) -> tuple[Tensor, list[int]]:
    """Mean colours (n, 3), none where there is no colour, and shorter sides of the pictures."""
    if isinstance(source, FolderSource):
        looks = [glance(source.paths[row]) for row in rows.tolist()]
        return torch.tensor([colour for colour, _ in looks]), [side for _, side in looks]
    if isinstance(source, ArraySource):
        images = source.images[rows]
        sides = [min(images.shape[2:])] * len(rows)
        return (images.float().mean((2, 3)) if images.shape[1] == 3 else torch.empty(0, 3)), sides
    if isinstance(source, DecodingSource):
        small = replace(source, geometry=Geometry(3, 8))
        return small.load(rows).float().mean((2, 3)), []
    return torch.empty(0, 3), []
