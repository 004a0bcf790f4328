"""Unrolled gradient: differentiate every step of the solver."""

from __future__ import annotations

from torch import Tensor

from deqcore._differentiable import differentiable_solve
from deqcore._loop import Problem, Solved
from deqcore._solution import BackwardRecord
from deqcore.adjoints.base import Adjoint
from deqcore.solvers import Solver
from deqcore.solvers._options import options, require_int


@options
class Unrolled(Adjoint):
    """The exact gradient of the iterates as computed, mixing weights included.

    Differentiable to any order; memory grows with the number of steps. It always runs the
    pure-PyTorch steps, so that the value is the same with and without grad mode. Where f runs in
    half precision (autocast), mixing weights are fitted to its rounding and their gradient is
    noise: prefer ``Implicit`` there.

    A row whose value is z0 itself, because that is within the tolerance or no step improved on it,
    depends on no step. It keeps this value and gets the gradient of one plain step from z0, as by
    ``Phantom``: what was computed would have none for f's parameters.

    Args:
        checkpoint_every: keep the graph of only this many steps at a time and recompute them in
            backward (f is then called again there); None: keep everything.
    """

    checkpoint_every: int | None = None

    def __post_init__(self) -> None:
        if self.checkpoint_every is not None:
            require_int(self, "checkpoint_every", 1)

    def solve(
        self, problem: Problem, z0: Tensor, solver: Solver, record: BackwardRecord
    ) -> tuple[Tensor, Solved]:
        solved = differentiable_solve(problem, z0, solver, self.checkpoint_every)
        return solved.value, solved
