"""What LION's implicit layers share: a cell, how its fixed point is found, and explicit steps."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import replace
from typing import TypeAlias

import torch
from torch import Tensor, nn

import deqcore

__all__ = ["SolvedModule", "Solver"]

Solver: TypeAlias = deqcore.Anderson | deqcore.Broyden | deqcore.Picard


class SolvedModule(nn.Module, ABC):
    """A module around one equilibrium z* = cell(z*, u).

    The gradient is that of the equilibrium (implicit function theorem), so memory does not grow
    with the solver's steps [paper].

    Args:
        cell: called as cell(z, u); gives a state like u.
        solver: for z* and for the backward solve; None means Anderson with its defaults.
        iterations: None for the equilibrium; k replaces it by k explicit applications of the cell
            from zero with ordinary backpropagation (an ablation: k layers that share their
            weights).

    Attributes:
        layer: the implicit layer; its `report` tells of the last solve.
    """

    def __init__(self, cell: nn.Module, solver: Solver | None, iterations: int | None) -> None:
        super().__init__()
        solver = deqcore.Anderson() if solver is None else solver
        self.layer = deqcore.ImplicitLayer(
            cell, solver=solver, adjoint=deqcore.Implicit(solver=solver)
        )
        self.iterations = iterations

    def solve(self, injected: Tensor) -> Tensor:
        """z* for u = injected, or what the explicit steps give; shaped like u."""
        if self.iterations is None:
            return self.layer(injected)
        z = torch.zeros_like(injected)
        for _ in range(self.iterations):
            z = self.layer.cell(z, injected)
        return z

    @abstractmethod
    def injected(self, source: Tensor) -> Tensor:
        """What drives the equilibrium, made of what drives the module."""

    @torch.no_grad()
    def residual_trace(self, source: Tensor) -> Tensor | None:
        """Residual after each step for every row, (B, n); None for explicit layers.

        Args:
            source: what drives the module in the network, (B, ...).
        """
        if self.iterations is not None:
            return None
        injected = self.injected(source)
        cell, z0 = self.layer.cell, torch.zeros_like(injected)
        solver = replace(self.layer.solver, record_trace=True)
        return deqcore.fixed_point(cell, z0, injected, solver=solver).trace

    @property
    def matrices(self) -> list[nn.Parameter]:
        """The dense matrices, which robust training acts on."""
        return [p for p in self.parameters() if p.dim() >= 2]
