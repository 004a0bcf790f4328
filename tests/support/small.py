"""A backbone and pictures that are small enough to train around in milliseconds."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from lion_models.backbones.vit import VisionTransformer, ViTConfig
from lion_models.data import Task
from lion_models.methods.base import TunedClassifier
from lion_models.run import FitState, RunConfig, fit
from lion_models.run.optimizer import make_optimizer

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


def fit_run(
    model: TunedClassifier, task: Task, config: RunConfig, *more: Any, **options: Any
) -> FitState:
    """`fit` as a run's configuration says."""
    return fit(model, task, config.training, *more, robust=config.robust, pruning=config.pruning,
               transform=config.data.transform, **options)  # fmt: skip


def optimizer_of(model: TunedClassifier, config: RunConfig, steps: int) -> torch.optim.Optimizer:
    """`make_optimizer` as a run's configuration says."""
    return make_optimizer(model, config.training, config.recipe, steps, config.robust)
