"""What an adjoint is, and how a value gets a gradient that was computed elsewhere."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from deqcore._loop import Problem, Solved
from deqcore._solution import BackwardRecord
from deqcore.solvers import SolverOptions


class Adjoint:
    """Base class of ``Implicit``, ``Phantom`` and ``Unrolled``."""

    def solve(
        self, problem: Problem, z0: Tensor, solver: SolverOptions, record: BackwardRecord
    ) -> tuple[Tensor, Solved]:
        """Solve from the packed ``z0`` [B, D]; the packed value carries the graph, if any."""
        raise TypeError("expected deqcore.Implicit(), Phantom() or Unrolled()")


class ValueWithGradientOf(torch.autograd.Function):
    """``solved.value`` in forward; in backward the gradient goes to ``source`` instead.

    The value is not an input, so that what is returned is no view and may be changed in place.
    """

    @staticmethod
    def forward(ctx: Any, source: Tensor, solved: Solved) -> Tensor:
        return solved.value

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None
