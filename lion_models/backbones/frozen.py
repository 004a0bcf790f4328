"""The small protocol between a frozen backbone and the methods that tune around it."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

__all__ = ["SPACES", "FrozenBackbone", "Normalisation", "fingerprint", "normalise"]

SPACES = ("token", "pixel")

Normalisation: TypeAlias = tuple[float | tuple[float, ...], float | tuple[float, ...]]


def fingerprint(state: Mapping[str, Tensor]) -> str:
    """SHA-256 over the names, types, shapes and bytes of a state dict, in sorted order."""
    digest = hashlib.sha256()
    for name, value in sorted(state.items()):
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}\n".encode())
        digest.update(value.detach().cpu().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def normalise(images: Tensor, normalisation: Normalisation) -> Tensor:
    """(images - mean) / std for (B, C, S, S), with numbers or one value for each channel."""
    mean, std = (
        images.new_tensor(value).view(-1, 1, 1) if isinstance(value, tuple) else value
        for value in normalisation
    )
    return (images - mean) / std


class FrozenBackbone(nn.Module):
    """Any network as two functions: `embed` gives what a method may tune, `encode` the feature.

    In the space `token` (transformers) `embed` gives tokens (B, T, D). In the space `pixel`
    (networks without tokens) it gives the normalised image (B, C, S, S), D being C.

    Its parameters get `requires_grad=False` and it stays in eval mode whatever `train()` says, so
    that neither a weight nor a running statistic of it changes.

    Args:
        module: the network; holds the weights.
        embed: images (B, C, S, S), pixels in [0, 1], to tokens (B, T, D) or to normalised images
            (B, C, S, S); normalises the pixels.
        encode: what `embed` gives to features (B, F), without a head.
        name: how the user calls it; `load_backbone(name)` gives it again.
        channels: C, 1 or 3.
        image_size: S in pixels.
        token_dim: D; C in the space `pixel`.
        feature_dim: F.
        space: `token` or `pixel`.
        blocks: the transformer blocks, (B, T, D) to (B, T, D) each; what deep prompts need, with
            `pool`. Left out where there are none.
        pool: what follows the blocks, (B, T, D) to (B, F).
        normalisation: (mean, std) that `embed` applies, a number or one for each channel; for the
            checkpoint's metadata.
        licence: of the weights, where it is known.
        source: where the weights came from.

    Raises:
        ValueError: the space is unknown, or does not go with `token_dim` or `blocks`.
    """

    def __init__(
        self,
        module: nn.Module,
        *,
        embed: Callable[[Tensor], Tensor],
        encode: Callable[[Tensor], Tensor],
        name: str,
        channels: int,
        image_size: int,
        token_dim: int,
        feature_dim: int,
        space: str = "token",
        blocks: Sequence[nn.Module] = (),
        pool: Callable[[Tensor], Tensor] | None = None,
        normalisation: Normalisation = (0.0, 1.0),
        licence: str = "unknown",
        source: str = "unknown",
    ) -> None:
        super().__init__()
        if space not in SPACES:
            raise ValueError(f"space: expected one of {', '.join(SPACES)}, got '{space}'")
        if space == "pixel" and (token_dim != channels or blocks):
            raise ValueError(
                f"space 'pixel': expected token_dim = channels = {channels} and no blocks, got "
                f"token_dim {token_dim} and {len(blocks)} blocks; use space 'token' for tokens"
            )
        self.module = module.requires_grad_(False).eval()
        self.embed = embed
        self.encode = encode
        self.name = name
        self.channels = channels
        self.image_size = image_size
        self.token_dim = token_dim
        self.feature_dim = feature_dim
        self.space = space
        self.blocks = tuple(blocks)
        self.pool = pool
        self.normalisation = normalisation
        self.licence = licence
        self.source = source
        self.fingerprint = fingerprint(module.state_dict())

    @property
    def evaluation_batch(self) -> int:
        """Images to encode at once without gradients: 500 small ones, 83 of 224 x 224."""
        return max(1, min(500, 2**22 // self.image_size**2))

    def describe(self) -> dict[str, Any]:
        """What it is, for people: name, size, fingerprint, licence and source of the weights."""
        side = self.image_size
        tuned = "tokens" if self.space == "token" else "the normalised image"
        return {
            "backbone": self.name,
            "parameters": sum(parameter.numel() for parameter in self.parameters()),
            "sha256": self.fingerprint,
            "licence": self.licence,
            "source": self.source,
            "input": f"{side}x{side} {'grey' if self.channels == 1 else 'colour'}",
            "tuned on": f"{tuned}, width {self.token_dim}",
            "blocks": len(self.blocks),
            "feature": self.feature_dim,
        }

    def train(self, mode: bool = True) -> FrozenBackbone:
        """Stay in eval mode; see the class."""
        return super().train(False)

    def forward(self, images: Tensor) -> Tensor:  # (B, C, S, S) -> (B, F)
        return self.encode(self.embed(images))
