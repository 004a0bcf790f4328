"""Low-rank adaptation of attention (Hu et al., ICLR 2022, arXiv 2106.09685)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lion_models.backbones import FrozenBackbone
from lion_models.backbones.blocks import transformer_parts, with_modules
from lion_models.base.errors import UserError
from lion_models.base.options import option
from lion_models.methods.base import TunedClassifier
from lion_models.methods.blocks import through, timm_linear
from lion_models.methods.registry import MethodConfig, Recipe, register

__all__ = ["LoRA", "LoRAConfig", "QueryValueDelta"]


class QueryValueDelta(nn.Module):
    """(alpha / r) B A x for the query and the value part of a fused projection, zero for the key.

    A starts Gaussian and B at zero, so the sum is zero at the start.

    Args:
        dim_in: width of x.
        dim_out: width of each of query, key and value.
        rank: r; 2 r (dim_in + dim_out) parameters.
        alpha: the scale is alpha / r.
    """

    def __init__(self, dim_in: int, dim_out: int, rank: int, alpha: float) -> None:
        super().__init__()
        self.a = nn.Parameter(torch.randn(2, rank, dim_in) / dim_in**0.5)
        self.b = nn.Parameter(torch.zeros(2, dim_out, rank))
        self.scale = alpha / rank

    @property
    def weight(self) -> Tensor:
        """The same as a matrix, (3 dim_out, dim_in)."""
        query, value = self.scale * (self.b @ self.a)
        return torch.cat([query, torch.zeros_like(query), value])

    def forward(self, x: Tensor) -> Tensor:  # (..., dim_in) -> (..., 3 dim_out)
        query, value = (x @ a.T @ b.T * self.scale for a, b in zip(self.a, self.b, strict=True))
        return torch.cat([query, torch.zeros_like(query), value], dim=-1)


class _Sum(nn.Module):
    """A linear layer with a delta; for blocks that read its weight instead of calling it, too."""

    def __init__(self, linear: nn.Linear, delta: QueryValueDelta) -> None:
        super().__init__()
        self.linear = linear
        self.delta = delta

    @property
    def weight(self) -> Tensor:
        return self.linear.weight + self.delta.weight

    @property
    def bias(self) -> Tensor | None:
        return self.linear.bias

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) + self.delta(x)


class LoRA(TunedClassifier):
    """Rank-r additions to the query and value projections of every block (the paper's choice).

    The sum is computed, not merged, and there is no dropout.

    Args:
        backbone: frozen; its blocks need timm's `attn.qkv`.
        classes: outputs of the head.
        rank: r; depth * 4 r D parameters beside the head.
        alpha: the scale is alpha / r; None means r, a scale of one.

    Raises:
        UserError: a backbone without such blocks.
    """

    method = "lora"

    def __init__(
        self, backbone: FrozenBackbone, classes: int, rank: int = 2, alpha: float | None = None
    ) -> None:
        super().__init__(backbone, classes)
        blocks, self._pool = transformer_parts(
            backbone, "`method` lora", "use lion, linear, full or vpt-pad"
        )
        self.deltas = nn.ModuleList()
        twins = []
        for block in blocks:
            linear = timm_linear(block, "attn.qkv", "lora", backbone.name)
            if linear.out_features % 3:
                raise UserError(
                    f"`method` lora: expected 'attn.qkv' of '{backbone.name}' to hold query, key "
                    f"and value of equal width, got {linear.out_features} outputs; use adapter"
                )
            scale = float(rank if alpha is None else alpha)
            delta = QueryValueDelta(linear.in_features, linear.out_features // 3, rank, scale)
            self.deltas.append(delta)
            twins.append(with_modules(block, {"attn.qkv": _Sum(linear, delta)}))
        self._blocks = tuple(twins)

    def tuned(self, fixed: Tensor) -> Tensor:  # (B, T, D) -> (B, classes)
        return self.head(self._pool(through(self._blocks, fixed)))


@register("lora", LoRA, Recipe(augment="affine"), colour="#CC79A7")
@dataclass(frozen=True)
class LoRAConfig(MethodConfig):
    """Rank and scale of the additions."""

    lora_rank: int = option(2, "Rank.", low=1)
    lora_alpha: float | None = option(
        None, "The scale is alpha / rank.", above=0, below=1000, unset="the rank"
    )
