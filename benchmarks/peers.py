"""The peers: torchdeq's solvers, and the leanest Anderson step in plain PyTorch."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import torch
from torch import Tensor


def torchdeq_anderson(f: Callable[[Tensor], Tensor], z0: Tensor, steps: int, memory: int) -> Tensor:
    """torchdeq 0.1.0 for a fixed number of calls of f (its tolerance is never met)."""
    from torchdeq.solver.anderson import anderson_solver

    value: Tensor = anderson_solver(f, z0, max_iter=steps, tol=-1.0, m=memory)[0]
    return value


def torchdeq_broyden(f: Callable[[Tensor], Tensor], z0: Tensor, steps: int) -> Tensor:
    """torchdeq 0.1.0 for a fixed number of steps, all of them stored, as its default is."""
    from torchdeq.solver.broyden import broyden_solver

    value: Tensor = broyden_solver(f, z0, max_iter=steps, tol=-1.0)[0]
    return value


def torchdeq_step(
    cell: Callable[[Tensor, Tensor], Tensor], x: Tensor, evaluations: int
) -> Callable[[], None]:
    """A training step with torchdeq 0.1.0's implicit gradient, as its users write it."""
    from torchdeq import get_deq

    solve = get_deq(
        f_solver="anderson", b_solver="anderson", f_max_iter=evaluations, b_max_iter=evaluations,
        f_tol=0.0, b_tol=0.0, ift=True,
    )  # fmt: skip

    def step() -> None:
        values, _ = solve(lambda z: cell(z, x), torch.zeros_like(x))
        values[-1].square().mean().backward()

    return step


class LeanAnderson:
    """Incremental Gram row, one batched solve, no statistics, no safety: an honest lower bound."""

    def __init__(self, z0: Tensor, memory: int, ridge: float = 1e-8) -> None:
        batch, dim = z0.shape
        self.g_ring = z0.new_zeros(batch, memory, dim)
        self.h_ring = z0.new_zeros(batch, memory, dim)
        self.gram = z0.new_zeros(batch, memory, memory)
        self.ones = z0.new_ones(batch, memory, 1)
        self.ridge = ridge * torch.eye(memory, device=z0.device)
        self.slots = itertools.cycle(torch.arange(memory, device=z0.device).split(1))

    def step(self, x: Tensor, f: Tensor) -> Tensor:
        return lean_step(
            x, f, next(self.slots), self.g_ring, self.h_ring, self.gram, self.ones, self.ridge
        )


def lean_step(
    x: Tensor,
    f: Tensor,
    slot: Tensor,  # int64 [1]
    g_ring: Tensor,  # (B, M, D)
    h_ring: Tensor,
    gram: Tensor,  # (B, M, M)
    ones: Tensor,
    ridge: Tensor,
) -> Tensor:
    """One undamped Anderson step with a full history."""
    g = f - x
    g_ring.index_copy_(1, slot, g[:, None])
    h_ring.index_copy_(1, slot, f[:, None])
    row = torch.bmm(g_ring, g[:, :, None])
    gram.index_copy_(2, slot, row)
    gram.index_copy_(1, slot, row.mT)
    scale = gram.diagonal(dim1=1, dim2=2).mean(1)[:, None, None]
    alpha = torch.linalg.solve_ex(gram + scale * ridge, ones)[0]
    alpha = alpha / alpha.sum(1, keepdim=True)
    return torch.bmm(alpha.mT, h_ring)[:, 0]
