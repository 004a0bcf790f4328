"""LION as a ladder: an equilibrium beside the frozen backbone, which reads all of its blocks."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from lion_models.backbones import FrozenBackbone
from lion_models.backbones.blocks import transformer_parts
from lion_models.methods.base import Recipe, TunedClassifier
from lion_models.prompts.ladder import ImplicitLadder
from lion_models.prompts.solved import Solver

__all__ = ["LADDER_RECIPE", "LADDER_STRENGTH", "PLACE_DROPOUT", "LionLadder"]

LADDER_RECIPE = Recipe(lr=0.003)
LADDER_STRENGTH = 0.1
PLACE_DROPOUT = 0.7


class LionLadder(TunedClassifier):
    """The linear head on the backbone's feature, and an `ImplicitLadder` on its blocks' tokens.

    Nothing in front of the backbone or inside of it trains, so what its blocks make of an image is
    computed once, and no gradient goes through them. At the start the logits are the linear
    probe's [ours].

    Args:
        backbone: frozen; must have blocks.
        classes: outputs of the head.
        hidden: h, numbers that are taken of each token; see `ImplicitLadder` for the count.
        grid: patches are averaged to at most this many rows and columns before that.
        solver, iterations: see `SolvedModule`.
        strength, dropout: see `ImplicitLadder`.

    Raises:
        UserError: a backbone without blocks.
    """

    method = "lion"
    recipe = LADDER_RECIPE

    def __init__(
        self,
        backbone: FrozenBackbone,
        classes: int,
        hidden: int = 8,
        grid: int = 4,
        solver: Solver | None = None,
        iterations: int | None = None,
        *,
        strength: float = LADDER_STRENGTH,
        dropout: float = PLACE_DROPOUT,
    ) -> None:
        super().__init__(backbone, classes)
        self._blocks, self._pool = transformer_parts(
            backbone, "`form` ladder", "use `form` ends or linear"
        )
        self.grid = grid
        device = next(backbone.parameters()).device
        shape = (1, backbone.channels, backbone.image_size, backbone.image_size)
        with torch.no_grad():
            tokens = backbone.embed(torch.zeros(shape, device=device))
            places = len(self._blocks) * rungs(tokens, grid).shape[1]
        self.ladder = ImplicitLadder(
            backbone.token_dim,
            places,
            classes,
            hidden,
            solver,
            iterations,
            strength=strength,
            dropout=dropout,
        )

    @torch.no_grad()
    def frozen(self, images: Tensor) -> Tensor:
        """The feature and the tokens that the ladder reads: (B, C, S, S) -> (B, F + N D)."""
        tokens = self.backbone.embed(images)
        read = []
        for block in self._blocks:
            tokens = block(tokens)
            read.append(rungs(tokens, self.grid))
        return torch.cat([self._pool(tokens), torch.cat(read, dim=1).flatten(1)], dim=1)

    def tuned(self, fixed: Tensor) -> Tensor:  # (B, F + N D) -> (B, classes)
        return self.head(fixed[:, : self.backbone.feature_dim]) + self.ladder(self._read(fixed))

    @property
    def implicit_layers(self) -> dict[str, ImplicitLadder]:
        return {"output": self.ladder}

    def residual_traces(self, fixed: Tensor) -> dict[str, Tensor]:
        trace = self.ladder.residual_trace(self._read(fixed))
        return {} if trace is None else {"output": trace}

    def _read(self, fixed: Tensor) -> Tensor:  # (B, F + N D) -> (B, N, D)
        return fixed[:, self.backbone.feature_dim :].unflatten(1, (-1, self.backbone.token_dim))


def rungs(tokens: Tensor, grid: int) -> Tensor:
    """The tokens of one block that a ladder reads, layer-normalised: (B, T, D) -> (B, R, D).

    The largest square number of tokens at the end are the patches; a grid of more than `grid` rows
    is averaged to that many. Of the tokens in front of them the first, the class token, is read,
    and registers are not; where there is none, the mean of the patches is.

    Args:
        tokens: of one block.
        grid: most rows and columns.

    Returns:
        The class token, then the grid, row by row.
    """
    side = math.isqrt(tokens.shape[1])
    patches = tokens[:, -(side**2) :]
    first = tokens[:, :1] if tokens.shape[1] > side**2 else tokens.mean(1, keepdim=True)
    if side > grid:
        square = patches.unflatten(1, (side, side)).permute(0, 3, 1, 2)
        patches = F.adaptive_avg_pool2d(square, grid).flatten(2).transpose(1, 2)
    return F.layer_norm(torch.cat([first, patches], dim=1), tokens.shape[-1:])
