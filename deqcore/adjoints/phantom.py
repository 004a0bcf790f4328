"""Phantom gradient: differentiate a few steps taken from the solution."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd import forward_ad

from deqcore._loop import Problem, Solved
from deqcore._solution import BackwardRecord
from deqcore.adjoints.base import Adjoint
from deqcore.solvers import Solver
from deqcore.solvers._options import options, require_int, require_number


@options
class Phantom(Adjoint):
    """The gradient of ``steps`` damped fixed-point steps from the solution, an approximation.

    One undamped step is Jacobian-free backpropagation. The value is the solver's; the steps only
    carry gradients. Memory grows with ``steps``.

    Args:
        steps: at least 1.
        damping: in (0, 1].

    Sources: Geng et al., NeurIPS 2021, arXiv 2111.05177; one step: Fung et al., AAAI 2022,
    arXiv 2103.12803.
    """

    steps: int = 1
    damping: float = 1.0

    def __post_init__(self) -> None:
        require_int(self, "steps", 1)
        require_number(self, "damping", 0.0, 1.0, above=True)

    def solve(
        self, problem: Problem, z0: Tensor, solver: Solver, record: BackwardRecord
    ) -> tuple[Tensor, Solved]:
        if not torch.is_grad_enabled() and forward_ad._current_level < 0:
            solved = problem.solve(z0, solver)
            return solved.value, solved
        solved = problem.solve(z0, solver, check=False)
        z = solved.value.clone()  # the caller may change the value in place
        for step in range(self.steps):
            f = problem(z) if step else problem.at_solution(z, solved)
            z = torch.lerp(z, f, self.damping) if self.damping < 1 else f
        return solved.with_gradient_of(z), solved
