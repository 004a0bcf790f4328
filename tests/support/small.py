"""A backbone and pictures that are small enough to train around in milliseconds."""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from lion_models.backbones.vit import VisionTransformer, ViTConfig

SMALL = ViTConfig(image_size=12, patch_size=6, dim=8, depth=2, heads=2, classes=3)


def small_vit(seed: int = 0) -> VisionTransformer:
    torch.manual_seed(seed)
    model = VisionTransformer(SMALL)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.3)
    return model


def noise(path: Path, side: int = 24, seed: int = 0) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 255, (side, side, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    return path


def cats_and_dogs(folder: Path, images: int, suffix: str) -> Path:
    """Two classes of noise, no picture twice."""
    for seed, name in enumerate(("cat", "dog")):
        for index in range(images):
            noise(folder / name / f"{index}{suffix}", seed=10 * seed + index)
    return folder


def idx_bytes(values: np.ndarray) -> bytes:
    """A file of Yann LeCun's IDX format, of unsigned bytes."""
    header = struct.pack(f">HBB{values.ndim}I", 0, 8, values.ndim, *values.shape)
    return header + values.astype(np.uint8).tobytes()
