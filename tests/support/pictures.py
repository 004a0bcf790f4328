"""Folders of pictures, and pictures as the record of an exported file has them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps


def apples(folder: Path, side: int = 20) -> Path:
    """Red and green squares, of any brightness."""
    generator = torch.Generator().manual_seed(0)
    for channel, name in enumerate(("red", "green")):
        (folder / name).mkdir(parents=True)
        for index in range(20):
            value = 90 + int(torch.randint(0, 4, (), generator=generator)) + 4 * index
            colour = tuple(value if c == channel else value // 4 for c in range(3))
            Image.new("RGB", (side, side), colour).save(folder / name / f"{index}.jpg")
    return folder


def followed(path: Path, how: dict[str, Any]) -> np.ndarray:
    """What the words of a record come to, by who knows nothing else."""
    image: Image.Image = Image.open(path)
    if how["draft"]:
        image.draft(None, how["draft"])
    assert how["orientation"] == "exif"
    image = ImageOps.exif_transpose(image).convert("RGB")
    if how["grey_weights"]:
        values = np.asarray(image, np.float64) @ np.array(how["grey_weights"])
        image = Image.fromarray(np.floor(values + 0.5).astype(np.uint8))
    assert how["resize"]["kernel"] == "bilinear"
    assert how["resize"]["antialias"]  # as Pillow's
    size = how["resize"]["width"], how["resize"]["height"]
    image = image.resize(size, Image.Resampling.BILINEAR)
    assert how["layout"] == "batch, channel, height, width"
    pixels = np.asarray(image).reshape(*size[::-1], -1).transpose(2, 0, 1)[None]
    assert how["normalisation"]["inside"]
    return (pixels * how["scale"]).astype(how["dtype"])
