"""LION's ladder: one equilibrium over what a frozen backbone's blocks make of an image."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from lion_models.base.errors import UserError
from lion_models.prompts.solved import SolvedModule, Solver

__all__ = ["ImplicitLadder", "LadderCell"]


class LadderCell(nn.Module):
    """f(z, u) = u + up(gelu(norm(down(z + mean z)))), the mean over the image's places [ours].

    Each place is a token of one block. By the mean all of them, of early and of late blocks, know
    of each other. `up` starts at zero, so at the start z* = u; the norm bounds what is added to u,
    so no weights can make the iteration run off to infinity.

    Args:
        hidden: h, width of z and u.
    """

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.down = nn.Linear(hidden, hidden, bias=False)
        self.norm = nn.LayerNorm(hidden)
        self.up = nn.Linear(hidden, hidden)
        nn.init.orthogonal_(self.down.weight)
        nn.init.zeros_(self.up.weight)
        nn.init.zeros_(self.up.bias)

    def forward(self, z: Tensor, u: Tensor) -> Tensor:  # (B, N, h), (B, N, h) -> (B, N, h)
        seen = z + z.mean(1, keepdim=True)
        return u + self.up(F.gelu(self.norm(self.down(seen))))


class ImplicitLadder(SolvedModule):
    """x -> what the equilibrium of its places adds to the logits, zero at the start [ours].

    u takes h numbers of the token at each place, by one matrix for all places; z* solves
    z = f(z, u); `out` reads the whole of z*. Reading all blocks of a frozen network by a small one
    beside it is Ladder Side-Tuning (Sung et al., NeurIPS 2022, arXiv 2206.06522) and Head2Toe
    (Evci et al., ICML 2022, arXiv 2201.03529); that the small one is an equilibrium is ours.

    Args:
        dim: D, width of a token.
        places: N, tokens of all blocks together.
        classes: C.
        hidden: h; h (D + 2h + 3 + N C) parameters.
        strength: what the result is multiplied by. Below 1 it slows what reads z* beside the head,
            of which it has several times the weights.
        dropout: share of the places of z* that training does not read, drawn for each image and
            step; the others count for more by as much.
        solver, iterations: see `SolvedModule`. With one explicit application u is read, and a
            constant: a linear probe of rank h of every place.
    """

    def __init__(
        self,
        dim: int,
        places: int,
        classes: int,
        hidden: int,
        solver: Solver | None = None,
        iterations: int | None = None,
        *,
        strength: float = 1.0,
        dropout: float = 0.0,
    ) -> None:
        if hidden < 1:
            raise UserError(f"`hidden`: expected 1 or more, got {hidden}")
        super().__init__(LadderCell(hidden), solver, iterations)
        self.strength, self.dropout = strength, dropout
        self.take = nn.Linear(dim, hidden, bias=False)
        self.out = nn.Linear(places * hidden, classes, bias=False)
        nn.init.orthogonal_(self.take.weight)
        nn.init.zeros_(self.out.weight)

    def forward(self, x: Tensor) -> Tensor:  # (B, N, D) -> (B, C)
        z = self.solve(self.injected(x))
        if self.training and self.dropout:
            z = z * F.dropout(z.new_ones(*z.shape[:2], 1), self.dropout)
        return self.strength * self.out(z.flatten(1))

    def injected(self, source: Tensor) -> Tensor:  # (B, N, D) -> (B, N, h)
        return self.take(source)
