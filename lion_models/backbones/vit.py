"""A vision transformer in one file, with the parameter names of timm's `VisionTransformer`.

Dosovitskiy et al., "An image is worth 16x16 words" (ICLR 2021); the pre-norm block, LayerNorm
eps 1e-6 and exact GELU are the ones of the released weights. The names (`cls_token`, `pos_embed`,
`patch_embed.proj`, `blocks.N.norm1`, `attn.qkv`, `attn.proj`, `norm2`, `mlp.fc1`, `mlp.fc2`,
`norm`, `head`) are timm's, so that a timm state dict loads unchanged. With `layer_scale` (Touvron
et al., ICCV 2021; `ls1.gamma`, `ls2.gamma`) it is the network of DINOv2 (Oquab et al., 2023).
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lion_models.backbones.frozen import FrozenBackbone, normalise

__all__ = ["ViTConfig", "VisionTransformer", "freeze_vit", "resize_positions"]

LAYER_NORM_EPS = 1e-6
LAYER_SCALE_START = 1e-5


@dataclass(frozen=True)
class ViTConfig:
    """Shape of a vision transformer.

    Args:
        image_size: height and width of the input in pixels.
        patch_size: height and width of a patch in pixels; must divide `image_size`.
        channels: 1 for grey, 3 for colour.
        dim: width D of a token.
        depth: number of blocks.
        heads: attention heads; must divide `dim`.
        mlp_ratio: hidden width of the MLP as a multiple of `dim`.
        classes: outputs of the head; 0 leaves the head out.
        layer_scale: multiply what each half of a block adds by a learned vector, as DINOv2 does.
        pixel_mean, pixel_std: the normalisation the weights were trained with, on pixels in [0, 1];
            a number, or one for each channel.
    """

    image_size: int = 28
    patch_size: int = 7
    channels: int = 1
    dim: int = 96
    depth: int = 4
    heads: int = 6
    mlp_ratio: float = 2.0
    classes: int = 0
    layer_scale: bool = False
    pixel_mean: float | tuple[float, ...] = 0.0
    pixel_std: float | tuple[float, ...] = 1.0

    def __post_init__(self) -> None:
        if self.image_size % self.patch_size:
            raise ValueError(
                f"patch_size: {self.patch_size} does not divide image_size {self.image_size}"
            )
        if self.dim % self.heads:
            raise ValueError(f"heads: {self.heads} does not divide dim {self.dim}")

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


class PatchEmbed(nn.Module):
    def __init__(self, config: ViTConfig) -> None:
        super().__init__()
        size = config.patch_size
        self.proj = nn.Conv2d(config.channels, config.dim, kernel_size=size, stride=size)

    def forward(self, images: Tensor) -> Tensor:  # (B, C, H, W) -> (B, N, D)
        return self.proj(images).flatten(2).transpose(1, 2)


class Attention(nn.Module):
    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:  # (B, T, D) -> (B, T, D)
        batch, tokens, dim = x.shape
        qkv = self.qkv(x).view(batch, tokens, 3, self.heads, dim // self.heads)
        query, key, value = qkv.permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(query, key, value)
        return self.proj(mixed.transpose(1, 2).reshape(batch, tokens, dim))


class Mlp(nn.Module):
    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class LayerScale(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.full((dim,), LAYER_SCALE_START))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gamma


class Block(nn.Module):
    def __init__(self, dim: int, heads: int, hidden: int, layer_scale: bool = False) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=LAYER_NORM_EPS)
        self.attn = Attention(dim, heads)
        self.ls1 = LayerScale(dim) if layer_scale else nn.Identity()
        self.norm2 = nn.LayerNorm(dim, eps=LAYER_NORM_EPS)
        self.mlp = Mlp(dim, hidden)
        self.ls2 = LayerScale(dim) if layer_scale else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.ls1(self.attn(self.norm1(x)))
        return x + self.ls2(self.mlp(self.norm2(x)))


class VisionTransformer(nn.Module):
    """ViT with a class token: images (B, C, S, S) in [0, 1] -> features (B, D) -> logits.

    `embed` normalises the pixels itself. `embed` then `encode` is what the prompt tuners use;
    `forward` adds the head and is for pretraining.
    """

    def __init__(self, config: ViTConfig) -> None:
        super().__init__()
        self.config = config
        patches = (config.image_size // config.patch_size) ** 2
        self.patch_embed = PatchEmbed(config)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, config.dim))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + patches, config.dim))
        hidden = int(config.mlp_ratio * config.dim)
        self.blocks = nn.ModuleList(
            Block(config.dim, config.heads, hidden, config.layer_scale) for _ in range(config.depth)
        )
        self.norm = nn.LayerNorm(config.dim, eps=LAYER_NORM_EPS)
        self.head: nn.Module = (
            nn.Linear(config.dim, config.classes) if config.classes else nn.Identity()
        )
        self.apply(_init_weights)
        nn.init.trunc_normal_(self.pos_embed, std=0.02)
        nn.init.normal_(self.cls_token, std=1e-6)

    def embed(self, images: Tensor) -> Tensor:
        """Tokens that enter the first block: (B, C, S, S) -> (B, 1 + N, D), class token first."""
        expected = (self.config.channels, self.config.image_size, self.config.image_size)
        if images.dim() != 4 or tuple(images.shape[1:]) != expected:
            raise ValueError(
                f"images: expected (batch, {', '.join(map(str, expected))}), "
                f"got {tuple(images.shape)}; resize to the backbone's input first"
            )
        normalised = normalise(images, (self.config.pixel_mean, self.config.pixel_std))
        patches = self.patch_embed(normalised)
        cls_token = self.cls_token.expand(len(images), -1, -1)
        return torch.cat([cls_token, patches], dim=1) + self.pos_embed

    def pool(self, tokens: Tensor) -> Tensor:
        """The class token after the last norm: (B, T, D) -> (B, D)."""
        # LayerNorm acts on each token alone, so normalising one token gives timm's value.
        return self.norm(tokens[:, 0])

    def encode(self, tokens: Tensor) -> Tensor:
        """All blocks, then `pool`: (B, T, D) -> (B, D)."""
        for block in self.blocks:
            tokens = block(tokens)
        return self.pool(tokens)

    def forward(self, images: Tensor) -> Tensor:  # (B, C, S, S) -> (B, classes) or (B, D)
        return self.head(self.encode(self.embed(images)))


def resize_positions(pos_embed: Tensor, grid: int) -> Tensor:
    """Position embeddings for another number of patches: (1, 1 + N, D) -> (1, 1 + grid^2, D).

    Bicubic (a = -0.75, half-pixel centres) without antialiasing, as DINOv2 does it; the class
    token's is kept.
    """
    cls_position, patches = pos_embed[:, :1], pos_embed[:, 1:]
    side = round(patches.shape[1] ** 0.5)
    if side == grid:
        return pos_embed
    square = patches.unflatten(1, (side, side)).permute(0, 3, 1, 2)
    resized = F.interpolate(square, (grid, grid), mode="bicubic", align_corners=False)
    return torch.cat([cls_position, resized.flatten(2).transpose(1, 2)], dim=1)


def freeze_vit(
    model: VisionTransformer, name: str, licence: str = "unknown", source: str = "unknown"
) -> FrozenBackbone:
    """Take the head off a ViT and freeze the rest; see `FrozenBackbone` for the arguments."""
    config = model.config
    model.head = nn.Identity()
    return FrozenBackbone(
        model,
        embed=model.embed,
        encode=model.encode,
        name=name,
        channels=config.channels,
        image_size=config.image_size,
        token_dim=config.dim,
        feature_dim=config.dim,
        blocks=list(model.blocks),
        pool=model.pool,
        normalisation=(config.pixel_mean, config.pixel_std),
        licence=licence,
        source=source,
    )


def _init_weights(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
