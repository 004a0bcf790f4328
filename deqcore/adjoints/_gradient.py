"""The node of an implicit gradient, and a solve that gets one of every transform around it."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch._C import _functorch
from torch._functorch.utils import enable_single_level_autograd_function
from torch.autograd import forward_ad
from torch.autograd.function import BackwardCFunction, _SingleLevelFunction

from deqcore import _transform_layers
from deqcore._loop import Problem, Solved
from deqcore._notices import pending
from deqcore._packing import Packing
from deqcore._solution import BackwardRecord
from deqcore._transform_layers import Layer
from deqcore._transforms import refuse_mapped
from deqcore.adjoints._linear import graph_leaves, graph_nodes, vector_jacobian
from deqcore.adjoints._saved import SavedOnce
from deqcore.adjoints._system import LinearSystem, act_on_failure, fall_back
from deqcore.adjoints._twice import THIRD, FGraph, ThroughSolution, not_again
from deqcore.solvers import Broyden, Solver

if TYPE_CHECKING:
    from deqcore.adjoints.implicit import Implicit

BASE = 0  # the level of autograd itself; those of torch.func's transforms begin at 1
SAME_LEVEL = (
    "deqcore.Implicit: torch.autograd.grad twice inside of one transform of torch.func, or under "
    "one, is not supported; nest the transforms (torch.func.grad of torch.func.grad), or solve "
    "with adjoint=deqcore.Unrolled()"
)


def solve_with_gradient(
    adjoint: Implicit, problem: Problem, z0: Tensor, solver: Solver, record: BackwardRecord
) -> tuple[Tensor, Solved]:
    """A solution [B, D] and its gradients and tangents, of any transform that is active."""
    if not _transform_layers.are_active():
        return _solve(adjoint, solver, record, problem, z0)

    def bottom(problem: Problem, z0: Tensor) -> tuple[Tensor, Solved]:
        value, solved = _solve(adjoint, solver, record, problem, z0)
        return value, _transform_layers.told(problem, solved, solver)

    return _transform_layers.through_layers(problem, z0, bottom, _Attach(adjoint, record))


def _solve(
    adjoint: Implicit, solver: Solver, record: BackwardRecord, problem: Problem, z0: Tensor
) -> tuple[Tensor, Solved]:
    """The same without transforms."""
    if not torch.is_grad_enabled():
        solved = problem.solve(z0, solver)
        return solved.value, solved
    solved = problem.solve(z0, solver, check=False)
    guess = None
    if adjoint.reuse_forward and isinstance(solver, Broyden):
        guess = functools.partial(solver.inverse_transpose, solved.state)
    solved.state = None  # the history is not needed any more, and f's graph is yet to come
    z = solved.value.clone().requires_grad_()  # the caller may change the value in place
    saved = SavedOnce()
    first_node = torch._C._autograd._get_sequence_nr()
    with saved.recording():
        f = problem.at_solution(z, solved)
    if not _wants_gradient(f, z):
        return solved.value, solved
    linear = LinearProblem(z, f, saved, problem.f_dtypes, adjoint, guess, record, first_node)
    return apply_gradient(f, [solved.value], linear), solved


@dataclass(eq=False)
class LinearProblem:
    """u = g + (df/dz)^T u, held by the graph node from forward to backward."""

    z: Tensor  # [B, D] leaf at the solution
    f: Tensor  # [B, D] f(z), with its graph
    saved: SavedOnce  # by that graph
    f_dtypes: tuple[torch.dtype, ...]  # the vector-Jacobian products are as coarse as f
    adjoint: Implicit
    guess: Callable[[Tensor], Tensor] | None  # g -> first u
    record: BackwardRecord
    first_node: int | None  # of that graph, by autograd's sequence numbers; None: u has no graph
    level: int = BASE

    def solve(self, grad: Tensor) -> Tensor:
        """u for an incoming gradient [B, D], row by row at unit scale."""
        self.saved.unpack()
        pending.tell()
        vjp = functools.partial(vector_jacobian, self.f, self.z)
        return solve_linear(self.adjoint, self.record, vjp, grad, self.f_dtypes, self.guess)

    def solve_transformed(self, grad: Tensor) -> Tensor:
        """The same under transforms, which differentiate u if they are not this node's own."""
        self.saved.unpack()
        pending.tell()

        def product(u: Tensor) -> Tensor:
            again = torch.is_grad_enabled()
            return _functorch.unwrap_if_dead(vector_jacobian(self.f, self.z, u, create_graph=again))

        problem = Problem(product, (), Packing.of(grad), self.f_dtypes)
        alive = self.level == BASE or not _transform_layers.is_over(self.z)
        attach = _Attach(self.adjoint, self.record, linear=True, closed=self if alive else None)
        return _transform_layers.through_layers(problem, grad, attach.linear_bottom, attach)[0]

    def with_graph(self, u: Tensor, grad: Tensor) -> Tensor:
        """u, once differentiable: du = dg + d(J^T u), with all that J depends on."""
        if self.first_node is None:
            return not_again(THIRD, u, self.f, grad)
        graph = FGraph(self.f, self.z, self.first_node)
        once = replace(self, first_node=None)
        solution = apply_gradient(self.f, [self.z.detach()], once)
        zero, *zeros = ThroughSolution.apply(solution, graph, u)
        graph.add_at_exits(tuple(zeros))
        if zero is None:
            return grad
        leaf = u.clone().requires_grad_()
        product = vector_jacobian(self.f, self.z, leaf, create_graph=True)
        image = grad + product + zero
        once = replace(once, z=leaf, f=image, saved=SavedOnce(), guess=None)
        u_with_graph: Tensor = apply_gradient(image, [u.detach()], once)
        return u_with_graph


def solve_linear(
    adjoint: Implicit,
    record: BackwardRecord,
    product: Callable[[Tensor], Tensor],
    grad: Tensor,
    f_dtypes: tuple[torch.dtype, ...],
    guess: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """u = grad + product(u) [B, D], without a graph; its outcome goes to ``record``."""
    solver, policy = adjoint.solver, adjoint.on_failure
    system = LinearSystem(product, grad, f_dtypes)
    problem = system.problem()
    u0 = system.unit if guess is None else guess(system.unit)
    solved = problem.solve(u0, solver, frozen=system.zero)
    report = solved.report(problem)
    if policy == "fallback":
        u, report = fall_back(system, solver, solved.value, report)
    else:
        u = system.unscaled(solved.value)
    if report.evaluations or record.report is None:  # a zero gradient hides no other
        record.report = report
    act_on_failure(policy, report, wait=solver.check_every > 0)
    return u


class ImplicitGradient(_SingleLevelFunction):
    """The solution in forward; in backward u goes to the graph of f at the solution.

    Of one level: what other transforms make of the solution, they do to its value beforehand.
    """

    @staticmethod
    def forward(ctx: Any, f: Tensor, value: list[Tensor], linear: LinearProblem) -> Tensor:
        ctx.linear = linear
        return value[0]  # not an input, hence no view: it may be changed in place

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        if _transform_layers.are_active():
            return ctx.linear.solve_transformed(grad), None, None
        refuse_mapped(grad)
        u = ctx.linear.solve(grad.detach())
        if torch.is_grad_enabled():
            u = ctx.linear.with_graph(u, grad)
        return u, None, None


# Its stub is that of Function alone.
apply_gradient: Any = ImplicitGradient.apply  # type: ignore[attr-defined]


@dataclass
class _Attach:
    """What each transform makes of a solution of z = f(z), or, if ``linear``, of u = start + A u.

    Attributes:
        closed: the problem of which u is the gradient, where its level is still there: u depends on
            what that level's graph does not show.
    """

    adjoint: Implicit
    record: BackwardRecord
    linear: bool = False
    closed: LinearProblem | None = None

    def __call__(self, layer: Layer, problem: Problem, value: Tensor, start: Tensor) -> Tensor:
        if layer.is_forward_mode:
            return self._with_tangent(layer, problem, value, start)
        if not layer.is_gradient or not torch.is_grad_enabled():
            return value
        leaf = _transform_layers.leaf_of(layer, value)
        here = _transform_layers.wrapped(layer, value)
        return self._with_gradient(problem, leaf, here, start, layer.level)

    def linear_bottom(self, problem: Problem, start: Tensor) -> tuple[Tensor, None]:
        u = solve_linear(
            self.adjoint, self.record, problem, start.detach(), problem.f_dtypes or (start.dtype,)
        )
        if torch.is_grad_enabled():
            u = self._with_gradient(problem, u.clone().requires_grad_(), u, start, BASE)
        return u, None

    def _image(self, problem: Problem, z: Tensor, start: Tensor) -> Tensor:
        return start + problem(z) if self.linear else problem(z)

    def _with_gradient(
        self, problem: Problem, leaf: Tensor, value: Tensor, start: Tensor, level: int
    ) -> Tensor:
        if self.closed is not None and level == self.closed.level:
            return not_again(SAME_LEVEL, value, self.closed.f, start)
        first_node = torch._C._autograd._get_sequence_nr() if level == BASE else None
        image = self._image(problem, leaf, start)
        if not _wants_gradient(image, leaf):
            return value
        linear = LinearProblem(
            leaf, image, SavedOnce(), problem.f_dtypes, self.adjoint, None, self.record,
            first_node, level,
        )  # fmt: skip
        with enable_single_level_autograd_function():
            gradient: Tensor = apply_gradient(image, [value], linear)
        return gradient

    def _with_tangent(self, layer: Layer, problem: Problem, value: Tensor, start: Tensor) -> Tensor:
        """v = df + J v, by the same means as a gradient."""
        tangent = _transform_layers.tangent_outside(layer, self._image(problem, value, start))
        if tangent is None:
            return value
        product = problem if self.linear else _jacobian_vector(layer, problem, value)
        with layer.left():
            product = _transform_layers.Outside(product, layer, value)
            attach = replace(self, linear=True, closed=None)
            v, _ = _transform_layers.through_layers(product, tangent, attach.linear_bottom, attach)
        dual: Tensor = forward_ad.make_dual(value, v)
        return dual


def _jacobian_vector(layer: Layer, problem: Problem, value: Tensor) -> Problem:
    """v -> J v at ``value``: the gradient of u -> J^T u, which is linear, so that any u serves.

    Forward mode cannot be told of v alone: f has tangents of its own.
    """
    with torch.enable_grad():
        z = _transform_layers.leaf_of(layer, value)
        u = _transform_layers.leaf_of(layer, torch.zeros_like(z))
        product = vector_jacobian(problem(z), z, u, create_graph=True)

    def jacobian_vector(v: Tensor) -> Tensor:
        return vector_jacobian(product, u, v, create_graph=torch.is_grad_enabled())

    return Problem(jacobian_vector, (), Packing.of(value), problem.f_dtypes)


def _wants_gradient(f: Tensor, z: Tensor) -> bool:
    return not all(leaf is z for leaf in graph_leaves(f)) or _runs_python(f)


def _runs_python(f: Tensor) -> bool:
    """Whether a node of f's graph is Python's: it may know of parameters that no leaf shows."""
    return any(isinstance(node, BackwardCFunction) for node in graph_nodes(f))
