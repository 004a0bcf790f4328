"""What an adjoint is: the contract between it and ``fixed_point``."""

from __future__ import annotations

import abc

from torch import Tensor

from deqcore._loop import Problem, Solved
from deqcore._solution import BackwardRecord
from deqcore.solvers import Solver


class Adjoint(abc.ABC):
    """Base class of ``Implicit``, ``Phantom``, ``Unrolled`` and of your own adjoints.

    An adjoint solves, and says how the solution gets its gradient. One that sends it through a
    Neumann series is in ``examples/own_solver.py``; the shortest is:

        class NoGradient(deqcore.Adjoint):
            def solve(self, problem, z0, solver, record):
                solved = problem.solve(z0, solver)
                return solved.value, solved
    """

    @abc.abstractmethod
    def solve(
        self, problem: Problem, z0: Tensor, solver: Solver, record: BackwardRecord
    ) -> tuple[Tensor, Solved]:
        """Solve from ``z0``.

        Args:
            problem: f on matrices [B, D]: ``problem.solve(z0, solver)`` gives a solution without a
                graph; ``problem(z)``, in grad mode, a value whose graph reaches z, f's arguments
                and its parameters.
            z0: [B, D].
            solver: the caller's.
            record: ``record.report`` is the ``Solution.backward`` that the caller will see: to be
                set in backward, to a ``SolveReport``, by an adjoint that solves there.

        Returns:
            (value [B, D], what ``problem.solve`` returned). The value is ``solved.value``, in grad
            mode with a graph: ``solved.with_gradient_of(other)`` gives it that of another tensor.
            Without grad mode it must be the same, and have none.
        """
