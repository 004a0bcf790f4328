"""Visual prompt tuning, deep (Jia et al., ECCV 2022, arXiv 2203.12119)."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from lion_models.backbones import FrozenBackbone
from lion_models.classifier import TunedClassifier
from lion_models.errors import UserError

__all__ = ["VPTDeep"]


class VPTDeep(TunedClassifier):
    """Learned prompt tokens after the class token of every block; the head reads the class token.

    Each block's prompts replace what the block before made of its own. depth * prompts * D
    parameters beside the head.

    Args:
        backbone: frozen; must have blocks.
        classes: outputs of the head.
        prompts: tokens per block.
        dropout: on the prompts; 0.1 is the paper's for deep prompts.
        patch_pixels: values in one patch, for the paper's uniform(+-sqrt(6 / (3 P^2 + D))), with
            channels in place of the 3; None takes them from the backbone's input and token count.
    """

    def __init__(
        self,
        backbone: FrozenBackbone,
        classes: int,
        prompts: int = 10,
        dropout: float = 0.1,
        patch_pixels: int | None = None,
    ) -> None:
        super().__init__(backbone, classes)
        if not backbone.blocks or backbone.pool is None:
            raise UserError(
                f"--method vpt-deep: needs a backbone made of transformer blocks; "
                f"'{backbone.name}' has none; use lion or linear"
            )
        self._pool = backbone.pool
        dim = backbone.token_dim
        if patch_pixels is None:
            pixels = torch.zeros(1, backbone.channels, backbone.image_size, backbone.image_size)
            patch_pixels = pixels.numel() // (backbone.embed(pixels).shape[1] - 1)
        bound = math.sqrt(6 / (patch_pixels + dim))
        self.prompts = nn.Parameter(torch.empty(len(backbone.blocks), prompts, dim))
        nn.init.uniform_(self.prompts, -bound, bound)
        self.dropout = nn.Dropout(dropout)

    def tuned(self, fixed: Tensor) -> Tensor:  # (B, T, D) -> (B, classes)
        cls_token, patches = fixed[:, :1], fixed[:, 1:]
        count = self.prompts.shape[1]
        for block, prompts in zip(self.backbone.blocks, self.prompts, strict=True):
            # One mask for the whole batch: the dropout is on the parameter.
            inserted = self.dropout(prompts).expand(len(fixed), -1, -1)
            tokens = block(torch.cat([cls_token, inserted, patches], dim=1))
            cls_token, patches = tokens[:, :1], tokens[:, 1 + count :]
        feature = self._pool(torch.cat([cls_token, patches], dim=1))
        return self.head(feature)
