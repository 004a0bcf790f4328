"""Implicit gradient: one linear fixed-point problem at the solution."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd.function import BackwardCFunction

from deqcore._loop import Problem, Solved
from deqcore._notices import pending
from deqcore._solution import BackwardRecord
from deqcore._transforms import refuse_mapped, refuse_transforms
from deqcore.adjoints._linear import graph_leaves, graph_nodes, vector_jacobian
from deqcore.adjoints._saved import SavedOnce
from deqcore.adjoints._system import POLICIES, LinearSystem, act_on_failure, fall_back
from deqcore.adjoints._twice import THIRD, FGraph, ThroughSolution, not_again
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
        if torch.is_grad_enabled():
            refuse_transforms(self)
        if not torch.is_grad_enabled():
            solved = problem.solve(z0, solver)
            return solved.value, solved
        solved = problem.solve(z0, solver, check=False)
        guess = None
        if self.reuse_forward and isinstance(solver, Broyden):
            guess = functools.partial(solver.inverse_transpose, solved.state)
        solved.state = None  # the history is not needed any more, and f's graph is yet to come
        z = solved.value.clone().requires_grad_()  # the caller may change the value in place
        saved = SavedOnce()
        first_node = torch._C._autograd._get_sequence_nr()
        with saved.recording():
            f = problem.at_solution(z, solved)
        if all(leaf is z for leaf in graph_leaves(f)) and not _runs_python(f):
            return solved.value, solved
        linear = _LinearProblem(z, f, saved, problem.f_dtypes, self, guess, record, first_node)
        return _ImplicitGradient.apply(f, [solved.value], linear), solved


@dataclass(eq=False)
class _LinearProblem:
    """u = g + (df/dz)^T u, held by the graph node from forward to backward."""

    z: Tensor  # [B, D] leaf at the solution
    f: Tensor  # [B, D] f(z), with its graph
    saved: SavedOnce  # by that graph
    f_dtypes: tuple[torch.dtype, ...]  # the vector-Jacobian products are as coarse as f
    adjoint: Implicit
    guess: Callable[[Tensor], Tensor] | None  # g -> first u
    record: BackwardRecord
    first_node: int | None  # of that graph, by autograd's sequence numbers; None: u has no graph

    def solve(self, grad: Tensor) -> Tensor:
        """u for an incoming gradient [B, D], row by row at unit scale."""
        self.saved.unpack()
        pending.tell()
        solver, policy = self.adjoint.solver, self.adjoint.on_failure
        vjp = functools.partial(vector_jacobian, self.f, self.z)
        system = LinearSystem(vjp, grad, self.f_dtypes)
        problem = system.problem()
        u0 = system.unit if self.guess is None else self.guess(system.unit)
        solved = problem.solve(u0, solver, frozen=system.zero)
        report = solved.report(problem)
        if policy == "fallback":
            u, report = fall_back(system, solver, solved.value, report)
        else:
            u = system.unscaled(solved.value)
        if report.evaluations or self.record.report is None:  # a zero gradient hides no other
            self.record.report = report
        act_on_failure(policy, report, wait=solver.check_every > 0)
        return u

    def with_graph(self, u: Tensor, grad: Tensor) -> Tensor:
        """u, once differentiable: du = dg + d(J^T u), with all that J depends on."""
        if self.first_node is None:
            return not_again(THIRD, u, self.f, grad)
        graph = FGraph(self.f, self.z, self.first_node)
        once = replace(self, first_node=None)
        solution = _ImplicitGradient.apply(self.f, [self.z.detach()], once)
        zero, *zeros = ThroughSolution.apply(solution, graph, u)
        graph.add_at_exits(tuple(zeros))
        if zero is None:
            return grad
        leaf = u.clone().requires_grad_()
        product = vector_jacobian(self.f, self.z, leaf, create_graph=True)
        image = grad + product + zero
        once = replace(once, z=leaf, f=image, saved=SavedOnce(), guess=None)
        u_with_graph: Tensor = _ImplicitGradient.apply(image, [u.detach()], once)
        return u_with_graph


class _ImplicitGradient(torch.autograd.Function):
    """The solution in forward; in backward u goes to the graph of f at the solution."""

    @staticmethod
    def forward(ctx: Any, f: Tensor, value: list[Tensor], linear: _LinearProblem) -> Tensor:
        ctx.linear = linear
        return value[0]  # not an input, hence no view: it may be changed in place

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        refuse_mapped(grad)
        u = ctx.linear.solve(grad.detach())
        if torch.is_grad_enabled():
            u = ctx.linear.with_graph(u, grad)
        return u, None, None


def _runs_python(f: Tensor) -> bool:
    """Whether a node of f's graph is Python's: it may know of parameters that no leaf shows."""
    return any(isinstance(node, BackwardCFunction) for node in graph_nodes(f))
