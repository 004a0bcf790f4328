"""Folders of pictures."""

from __future__ import annotations

from pathlib import Path

import torch
from PIL import Image


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
