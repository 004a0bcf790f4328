"""A backbone that is small enough to train around in milliseconds."""

from __future__ import annotations

import torch

from lion_models.backbones.vit import VisionTransformer, ViTConfig

SMALL = ViTConfig(image_size=12, patch_size=6, dim=8, depth=2, heads=2, classes=3)


def small_vit(seed: int = 0) -> VisionTransformer:
    torch.manual_seed(seed)
    model = VisionTransformer(SMALL)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.3)
    return model
