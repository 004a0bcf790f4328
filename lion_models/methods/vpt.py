"""Visual prompt tuning (Jia et al., ECCV 2022, arXiv 2203.12119): deep, shallow, and in pixels."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lion_models.backbones import FrozenBackbone
from lion_models.backbones.blocks import transformer_parts
from lion_models.base.errors import UserError
from lion_models.base.options import option
from lion_models.methods.base import TunedClassifier
from lion_models.methods.blocks import through
from lion_models.methods.registry import MethodConfig, Recipe, register

__all__ = [
    "VPTDeep",
    "VPTDeepConfig",
    "VPTPad",
    "VPTPadConfig",
    "VPTShallow",
    "VPTShallowConfig",
]


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

    Raises:
        UserError: a backbone without blocks.
    """

    method = "vpt-deep"

    def __init__(
        self,
        backbone: FrozenBackbone,
        classes: int,
        prompts: int = 10,
        dropout: float = 0.1,
        patch_pixels: int | None = None,
    ) -> None:
        super().__init__(backbone, classes)
        blocks, self._pool = transformer_parts(
            backbone, "`method` vpt-deep", "use vpt-pad, lion or linear"
        )
        shape = (len(blocks), prompts, backbone.token_dim)
        self.prompts = nn.Parameter(_draw_prompts(backbone, shape, patch_pixels))
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


class VPTShallow(TunedClassifier):
    """Learned prompt tokens after the class token of the first block, carried through all blocks.

    prompts * D parameters beside the head.

    Args:
        backbone: frozen; must have blocks.
        classes: outputs of the head.
        prompts: tokens.
        patch_pixels: see `VPTDeep`.

    Raises:
        UserError: a backbone without blocks.
    """

    method = "vpt-shallow"

    def __init__(
        self,
        backbone: FrozenBackbone,
        classes: int,
        prompts: int = 10,
        patch_pixels: int | None = None,
    ) -> None:
        super().__init__(backbone, classes)
        _, self._pool = transformer_parts(
            backbone, "`method` vpt-shallow", "use vpt-pad, lion or linear"
        )
        shape = (prompts, backbone.token_dim)
        self.prompts = nn.Parameter(_draw_prompts(backbone, shape, patch_pixels))

    def tuned(self, fixed: Tensor) -> Tensor:  # (B, T, D) -> (B, classes)
        inserted = self.prompts.expand(len(fixed), -1, -1)
        tokens = torch.cat([fixed[:, :1], inserted, fixed[:, 1:]], dim=1)
        tokens = through(self.backbone.blocks, tokens)
        # The pooling sees what it would without prompts: it may average over patches.
        kept = torch.cat([tokens[:, :1], tokens[:, 1 + len(self.prompts) :]], dim=1)
        return self.head(self._pool(kept))


class VPTPad(TunedClassifier):
    """A learned frame of pixels around the image; for backbones without tokens, too.

    The paper pads the image, which a convolutional network of any input size takes. Here the image
    is scaled down to make room, so that the input keeps the backbone's size [ours]. The frame
    starts at the mean that the backbone subtracts, as padding with zeros behind the normalisation
    would. C (S^2 - (S - 2 p)^2) parameters beside the head.

    Args:
        backbone: frozen.
        classes: outputs of the head.
        pad: p, width of the frame in pixels.

    Raises:
        UserError: a frame that leaves no image.
    """

    method = "vpt-pad"
    place: Tensor  # of the frame's pixels, in a flattened image

    def __init__(self, backbone: FrozenBackbone, classes: int, pad: int = 2) -> None:
        super().__init__(backbone, classes)
        size = backbone.image_size
        if 2 * pad >= size:
            raise UserError(
                f"`pad`: expected less than half of the backbone's {size} pixels, got {pad}"
            )
        self.pad = pad
        inside = F.pad(torch.ones(size - 2 * pad, size - 2 * pad, dtype=torch.bool), [pad] * 4)
        place = (~inside).flatten().nonzero().squeeze(1)
        self.register_buffer("place", place, persistent=False)
        start = torch.as_tensor(backbone.normalisation[0], dtype=torch.float32).reshape(-1, 1)
        self.frame = nn.Parameter(start.expand(backbone.channels, len(place)).clone())

    @torch.no_grad()
    def frozen(self, images: Tensor) -> Tensor:
        """Images (B, C, S, S), made smaller and with zeros where the frame will be."""
        inner = self.backbone.image_size - 2 * self.pad
        small = F.interpolate(images, (inner, inner), mode="bilinear", antialias=True)
        return F.pad(small, [self.pad] * 4)

    def tuned(self, fixed: Tensor) -> Tensor:  # (B, C, S, S) -> (B, classes)
        canvas = torch.zeros_like(fixed[0]).flatten(1)
        framed = canvas.index_copy(1, self.place, self.frame.to(canvas.dtype))
        return self.head(self.backbone(fixed + framed.view_as(fixed[0])))


def _draw_prompts(
    backbone: FrozenBackbone, shape: tuple[int, ...], patch_pixels: int | None
) -> Tensor:
    if patch_pixels is None:
        pixels = torch.zeros(1, backbone.channels, backbone.image_size, backbone.image_size)
        device = next(backbone.parameters()).device
        patch_pixels = pixels.numel() // (backbone.embed(pixels.to(device)).shape[1] - 1)
    bound = math.sqrt(6 / (patch_pixels + backbone.token_dim))
    return torch.empty(shape).uniform_(-bound, bound)


@dataclass(frozen=True)
class _PromptConfig(MethodConfig):
    """What both kinds of tokens share."""

    prompts: int = option(10, "Tokens; of vpt-deep in each block.", low=1)


@register("vpt-shallow", VPTShallow, Recipe(augment="affine"), colour="#56B4E9")
class VPTShallowConfig(_PromptConfig):
    """How many tokens there are."""


@register("vpt-deep", VPTDeep, colour="#0072B2")
@dataclass(frozen=True)
class VPTDeepConfig(_PromptConfig):
    """How many tokens there are, and their dropout."""

    prompt_dropout: float = option(
        0.1, "Dropout on the prompts.", low=0, below=1, expected="0 <= p < 1"
    )


@register("vpt-pad", VPTPad, colour="#E69F00")
@dataclass(frozen=True)
class VPTPadConfig(MethodConfig):
    """How wide the frame is."""

    pad: int = option(2, "Width of the learned frame in pixels.", low=1)
