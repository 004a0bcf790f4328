"""MNIST-5000 and digits, as tables inside Python packages."""

from __future__ import annotations

import gzip
from pathlib import Path

import numpy as np
import torch

from lion_models.data.base import ArraySource
from lion_models.data.transforms import Geometry

__all__ = ["open_table"]

# The largest pixel value of each table.
SCALE = {"mnist5k": 255, "digits": 16}
_CLASSES = tuple(str(digit) for digit in range(10))


def open_table(name: str, path: Path, geometry: Geometry) -> ArraySource:
    """Read rows of pixels with the label last, the layout of both packaged sets."""
    with gzip.open(path, "rt") as file:
        table = np.loadtxt(file, delimiter=",", dtype=np.float32)
    labels = torch.from_numpy(table[:, -1]).long()
    side = round((table.shape[1] - 1) ** 0.5)
    images = torch.from_numpy(table[:, :-1]).reshape(-1, 1, side, side) * (255 / SCALE[name])
    return ArraySource(name, _CLASSES, labels, images, geometry)
