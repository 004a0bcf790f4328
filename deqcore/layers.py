"""Implicit layers as modules."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from deqcore._packing import Packing, is_coupled
from deqcore._solution import SolveReport
from deqcore.adjoints import Adjoint, Implicit
from deqcore.fixed_point import fixed_point
from deqcore.solvers import Anderson, Solver


class ImplicitLayer(nn.Module):
    """z* with z* = cell(z*, x, *args), as a module.

    Grad mode decides whether gradients flow, not ``training``: the layer trains in ``eval()`` mode
    and inside a frozen model, may be used several times in one model, be copied and be pickled.

    Args:
        cell: module called as ``cell(z, x, *args)``; returns a state like z.
        solver: ``Picard``, ``Anderson`` or ``Broyden``.
        adjoint: ``Implicit``, ``Phantom`` or ``Unrolled``.
        batch: ``"rows"``, or ``"coupled"`` where the cell lets rows depend on each other, as batch
            norm in training mode does: see :func:`deqcore.fixed_point`.

    Attributes:
        report: outcome of the last forward solve (status, residual, steps, evaluations, trace),
            with ``report.backward`` for its backward solve; None before the first. It holds no
            graph.
    """

    def __init__(
        self,
        cell: nn.Module,
        solver: Solver = Anderson(),  # noqa: B008  (frozen)
        adjoint: Adjoint = Implicit(),  # noqa: B008  (frozen)
        batch: Literal["rows", "coupled"] = "rows",
    ) -> None:
        super().__init__()
        if not callable(cell):
            raise TypeError(f"cell: expected a module or callable, got {type(cell).__name__}")
        if not isinstance(solver, Solver):
            raise TypeError(f"solver: expected e.g. deqcore.Anderson(), got {solver!r}")
        if not isinstance(adjoint, Adjoint):
            raise TypeError(f"adjoint: expected e.g. deqcore.Implicit(), got {adjoint!r}")
        is_coupled(batch)  # or an error
        self.cell = cell
        self.solver = solver
        self.adjoint = adjoint
        self.batch = batch
        self.report: SolveReport | None = None

    def forward(self, x: Any, *args: Any, z0: Any = None) -> Any:
        """The solution, shaped like ``z0``; from zeros shaped like ``x`` unless ``z0`` is given."""
        if z0 is None:
            z0 = _zeros_like(x)
        solution = fixed_point(
            self.cell, z0, x, *args, solver=self.solver, adjoint=self.adjoint, batch=self.batch
        )
        self.report = solution.report()
        return solution.value

    def extra_repr(self) -> str:
        return f"solver={self.solver}, adjoint={self.adjoint}, batch={self.batch!r}"


def _zeros_like(x: Any) -> Any:
    z0 = pytree.tree_map(_zeros, x)
    if isinstance(x, Tensor) and x.is_floating_point():
        return z0
    try:
        Packing.of(z0)
    except (TypeError, ValueError) as error:
        raise type(error)(
            "x: no state can be shaped like it; pass z0= to say where to start. Of zeros like x: "
            f"{error}"
        ) from None
    return z0


def _zeros(x: Any) -> Any:
    if not isinstance(x, Tensor):
        return x
    return torch.zeros_like(x, memory_format=torch.contiguous_format, requires_grad=False)
