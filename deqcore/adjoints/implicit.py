"""Implicit gradient: one linear fixed-point problem at the solution."""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from deqcore._loop import Problem, Solved
from deqcore._solution import BackwardRecord
from deqcore.adjoints._gradient import solve_with_gradient
from deqcore.adjoints._system import POLICIES
from deqcore.adjoints.base import Adjoint
from deqcore.solvers import Anderson, Broyden, Solver
from deqcore.solvers._options import options, require_bool


@options
class Implicit(Adjoint):
    """The gradient by the implicit function theorem; memory does not grow with solver steps.

    Backward solves u = g + J^T u for the incoming gradient g and J = df/dz at the solution, by
    vector-Jacobian products. Each row of g is first scaled to unit size, by a power of two, so that
    the tolerances mean the same whatever the scale of the loss. The outcome of that solve is in
    ``Solution.backward``. Differentiated once more (``create_graph=True``), that solve is itself a
    fixed point: two more linear problems, with J and with J^T, whose outcome is there next. A third
    derivative raises; use ``Unrolled``.

    Args:
        solver: for the linear problem; its tolerances are relative to each row's gradient.
        reuse_forward: start the linear solve from the inverse Jacobian that a ``Broyden`` forward
            solve has built (SHINE, Ramzi et al., arXiv 2106.00553); its history stays allocated
            until backward.
        on_failure: what to do where rows of that solve do not converge. ``"warn"``: warn, once in a
            process for each status, with advice; on a GPU in a later call, since nothing waits for
            it. ``"raise"``: a ``ConvergenceError`` in backward. ``"fallback"``: solve these
            rows by other means: directly, by each row's own matrix, up to 256 elements (as many
            products), else by Anderson with a memory of 64 in up to 300 steps; rows that depend on
            each other all as one; then warn if that fails too. ``"ignore"``: for a backward that is
            cut short on purpose. ``"raise"`` and ``"fallback"`` wait for a GPU once in backward.

    Raises:
        ConvergenceError: in backward, with ``on_failure="raise"``. Other ranks of a distributed
            run then wait for this one, as with any error.
        RuntimeError: in backward, if f's parameters or inputs were changed in place since forward.
    """

    solver: Solver = Anderson()
    reuse_forward: bool = False
    on_failure: Literal["warn", "raise", "fallback", "ignore"] = "warn"

    def __post_init__(self) -> None:
        if not isinstance(self.solver, Solver):
            raise ValueError(
                f"Implicit: solver must be a solver such as deqcore.Anderson(), got {self.solver!r}"
            )
        require_bool(self, "reuse_forward")
        if self.on_failure not in POLICIES:
            raise ValueError(
                "Implicit: on_failure must be 'warn', 'raise', 'fallback' or 'ignore', got "
                f"{self.on_failure!r}"
            )

    def solve(
        self, problem: Problem, z0: Tensor, solver: Solver, record: BackwardRecord
    ) -> tuple[Tensor, Solved]:
        if self.reuse_forward and not isinstance(solver, Broyden):
            raise ValueError(
                "Implicit: reuse_forward=True needs the inverse that deqcore.Broyden builds, got a "
                f"forward solver {type(solver).__name__}; pass solver=deqcore.Broyden()"
            )
        return solve_with_gradient(self, problem, z0, solver, record)
