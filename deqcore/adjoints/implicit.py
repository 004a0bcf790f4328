"""Implicit gradient: one linear fixed-point problem at the solution."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from deqcore._loop import Problem, Solved, solve
from deqcore._packing import Packing
from deqcore._solution import BackwardRecord, SolveReport
from deqcore.adjoints._base import Adjoint
from deqcore.ops import _rows
from deqcore.solvers import Anderson, Broyden, SolverOptions
from deqcore.solvers._options import options, require_bool


@options
class Implicit(Adjoint):
    """The gradient by the implicit function theorem; memory does not grow with solver steps.

    Backward solves u = g + J^T u for the incoming gradient g and J = df/dz at the solution, by
    vector-Jacobian products. Each row of g is first scaled to unit size, by a power of two, so that
    the tolerances mean the same whatever the scale of the loss. The outcome of that solve is in
    ``Solution.backward``. Not differentiable a second time: that raises; use ``Unrolled``.

    Args:
        solver: for the linear problem; its tolerances are relative to each row's gradient.
        reuse_forward: start the linear solve from the inverse Jacobian that a ``Broyden`` forward
            solve has built (SHINE, Ramzi et al., arXiv 2106.00553); its history stays allocated
            until backward.

    Raises:
        RuntimeError: in backward, when f's parameters or inputs were changed in place after forward.
    """

    solver: SolverOptions = Anderson()  # noqa: RUF009  (frozen)
    reuse_forward: bool = False

    def __post_init__(self) -> None:
        if not isinstance(self.solver, SolverOptions):
            raise ValueError(
                f"Implicit: solver must be a solver such as deqcore.Anderson(), got {self.solver!r}"
            )
        require_bool(self, "reuse_forward")

    def solve(
        self, problem: Problem, z0: Tensor, solver: SolverOptions, record: BackwardRecord
    ) -> tuple[Tensor, Solved]:
        if self.reuse_forward and not isinstance(solver, Broyden):
            raise ValueError(
                "Implicit: reuse_forward=True needs the inverse that deqcore.Broyden builds, got a "
                f"forward solver {type(solver).__name__}; pass solver=deqcore.Broyden()"
            )
        solved = solve(problem, z0, solver)
        if not torch.is_grad_enabled():
            return solved.value, solved
        guess = None
        if self.reuse_forward and isinstance(solver, Broyden):
            guess = functools.partial(solver.inverse_transpose, solved.state)
        solved.state = None  # the history is not needed any more, and f's graph is yet to come
        z = solved.value.detach().requires_grad_()
        f = problem(z)
        if not f.requires_grad:
            return solved.value, solved
        linear = _LinearProblem(z, f, problem.packing, self.solver, guess, record)
        return _ImplicitGradient.apply(f, solved.value, linear), solved


@dataclass(eq=False)
class _LinearProblem:
    """u = g + (df/dz)^T u, held by the graph node from forward to backward."""

    z: Tensor  # [B, D] leaf at the solution
    f: Tensor  # [B, D] f(z), with its graph
    packing: Packing
    solver: SolverOptions
    guess: Callable[[Tensor], Tensor] | None  # g -> first u
    record: BackwardRecord

    def solve(self, grad: Tensor) -> Tensor:
        """u for an incoming gradient [B, D], row by row at unit scale."""
        scale = _power_of_two_near_rms(grad)
        unit = (grad / scale).to(grad.dtype)
        zero = (grad == 0).all(1)
        problem = Problem(lambda u: unit + self._vjp(u), (), Packing.of(unit))
        u0 = unit if self.guess is None else self.guess(unit)
        solved = solve(problem, u0, self.solver, frozen=zero)
        self.record.report = SolveReport(**solved.report(problem))
        return (solved.value * scale).to(grad.dtype)

    def _vjp(self, u: Tensor) -> Tensor:
        (product,) = torch.autograd.grad(
            self.f, self.z, u, retain_graph=True, allow_unused=True, materialize_grads=True
        )
        return product


class _ImplicitGradient(torch.autograd.Function):
    """The solution in forward; in backward u goes to the graph of f at the solution."""

    @staticmethod
    def forward(ctx: Any, f: Tensor, value: Tensor, linear: _LinearProblem) -> Tensor:
        ctx.linear = linear
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        u = ctx.linear.solve(grad.detach())
        if torch.is_grad_enabled():
            u = _NotTwice.apply(u, ctx.linear.f, grad)
        return u, None, None


class _NotTwice(torch.autograd.Function):
    """Identity whose backward raises, reached from whatever the first gradient depends on."""

    @staticmethod
    def forward(ctx: Any, u: Tensor, *sources: Tensor) -> Tensor:
        return u.view_as(u)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:  # type: ignore[override]
        raise RuntimeError(
            "deqcore.Implicit: the gradient of a gradient is not supported; solve with "
            "adjoint=deqcore.Unrolled() where you need second derivatives"
        )


def _power_of_two_near_rms(grad: Tensor) -> Tensor:
    """[B, 1] in the compute dtype; 1 for rows that are zero or not finite."""
    wide = grad.double()
    size = _rows.rms(_rows.row_dot(wide, wide), grad.shape[1])
    exponent = size.log2().round()
    usable = exponent.isfinite()
    scale = torch.where(usable, exponent, 0).exp2()
    return scale[:, None].to(torch.float64 if grad.dtype == torch.float64 else torch.float32)
