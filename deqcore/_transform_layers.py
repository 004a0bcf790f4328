"""torch.func's transforms around a solve, one at a time: the layers that a solve sees through.

A solve under vmap is a solve of all mapped rows outside of it, and one under grad or jvp is made
outside of them too, since nothing of it is differentiated: the iteration always runs without any
transform. Only f is called inside. What a layer adds to the solution (a mapped dimension, the node
of a gradient, a tangent) it gets when it is entered again, the outermost first.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from typing import Any, Protocol

import torch
from torch import Tensor
from torch._C import _functorch
from torch._functorch.eager_transforms import _create_differentiable
from torch.autograd import forward_ad

from deqcore._checks import warn_of_forward
from deqcore._loop import Problem, Solved
from deqcore._packing import Packing
from deqcore.ops._rows import Rows
from deqcore.solvers import Solver
from deqcore.solvers.base import StepContext

_Kind = _functorch.TransformType


def are_active() -> bool:
    """Whether a transform of torch.func is."""
    return bool(torch._C._are_functorch_transforms_active())


class Layer:
    """The innermost transform.

    Attributes:
        level: its number; that of a transform that is over may be another's.
        rows: for vmap over a problem, rows of one entry; None: it maps over nothing of it.
    """

    def __init__(self, kind: Any, level: int) -> None:
        self.kind, self.level = kind, level
        self.rows: int | None = None
        self._grad_mode = torch.is_grad_enabled()
        self._layer: Any = None  # while it is left

    @classmethod
    def innermost(cls) -> Layer | None:
        top: Any = _functorch.peek_interpreter_stack()  # None without
        if top is None:
            return None
        layer = cls(top.key(), top.level())
        if layer.kind == _Kind.Vmap:
            layer.size = _functorch.CVmapInterpreterPtr(top).batchSize()
        elif layer.kind == _Kind.Grad:
            layer._grad_mode &= _functorch.CGradInterpreterPtr(top).prevGradMode()
        elif layer.kind != _Kind.Jvp:
            raise RuntimeError(
                f"a solve under {layer.kind} is not supported; expected torch.func's grad, vjp, "
                "jvp, jacrev, jacfwd, hessian or vmap"
            )
        return layer

    size: int  # of vmap

    @property
    def is_gradient(self) -> bool:
        return bool(self.kind == _Kind.Grad)

    @property
    def is_forward_mode(self) -> bool:
        return bool(self.kind == _Kind.Jvp)

    def look(self, problem: Problem, start: Tensor) -> None:
        """Whether vmap maps over ``problem``: one call of it tells."""
        if self.kind != _Kind.Vmap:
            return
        with torch.no_grad():
            if self._is_mapped(start) or self._is_mapped(problem(start)):
                self.rows = start.shape[0]

    def _is_mapped(self, tensor: Tensor) -> bool:
        return _functorch.is_batchedtensor(tensor) and (
            _functorch.maybe_get_level(tensor) == self.level
        )

    @contextlib.contextmanager
    def left(self) -> Iterator[None]:
        self._layer = _functorch.pop_dynamic_layer_stack()
        try:
            with torch.set_grad_enabled(self._grad_mode):
                yield
        finally:
            _functorch.push_dynamic_layer_stack(self._layer)

    @contextlib.contextmanager
    def entered(self) -> Iterator[None]:
        """Within ``left``."""
        _functorch.push_dynamic_layer_stack(self._layer)
        try:
            yield
        finally:
            self._layer = _functorch.pop_dynamic_layer_stack()

    def inside(self, matrix: Tensor) -> Tensor:
        """What a matrix [R, D] from outside is here; [N * R, D] where vmap maps over it."""
        if self.rows is None:
            return matrix
        return self.mapped(matrix.view(self.size, self.rows, -1))

    def mapped(self, tensor: Tensor) -> Tensor:
        if self.rows is None:
            return tensor
        return _functorch._add_batch_dim(tensor, 0, self.level)

    def outside(self, matrix: Tensor) -> Tensor:
        """What a matrix [R, D] from here is outside; where this layer is the innermost."""
        if self.kind != _Kind.Vmap:
            return _functorch._unwrap_for_grad(matrix, self.level)
        if self.rows is None:
            return matrix
        rows = _functorch._remove_batch_dim(matrix, self.level, self.size, 0)
        return rows.reshape(-1, matrix.shape[-1]).contiguous()

    def solved_inside(self, solved: Solved) -> Solved:
        """With the rows of each mapped entry; what is checked has been, outside."""
        if self.rows is None:
            return solved
        status, counters, residuals, remaining = solved.rows
        shape = self.size, self.rows

        def entry(rows: Tensor) -> Tensor:
            return self.mapped(rows.reshape(*shape, *rows.shape[1:]))

        return dataclasses.replace(
            solved,
            value=self.inside(solved.value),
            rows=Rows(entry(status), entry(counters), entry(residuals), remaining),
            trace=None if solved.trace is None else entry(solved.trace),
        )


class Outside(Problem):
    """A problem as it is outside of a layer."""

    def __init__(self, inner: Problem, layer: Layer, like: Tensor) -> None:
        super().__init__(inner.f, inner.args, Packing.of(like), inner.f_dtypes)
        self.inner, self.layer = inner, layer
        self.relative = inner.relative

    def _through(self, function: Callable[[Tensor], Tensor], z: Tensor) -> Tensor:
        self.calls += 1
        with self.layer.entered():
            f = self.layer.outside(function(self.layer.inside(z)))
        self.f_dtypes = self.inner.f_dtypes
        return f

    def __call__(self, z: Tensor) -> Tensor:
        return self._through(self.inner, z)

    evaluate = __call__

    def evaluate_at_solution(self, z: Tensor) -> Tensor:
        return self._through(self.inner.evaluate_at_solution, z)

    def test(self, context: StepContext) -> Any:
        like = self.inner.packing
        with self.layer.entered():
            test = self.inner.test(context)
            if test is None or test.f_scale is None:
                return test
            scale = self.layer.outside(test.f_scale.expand(like.batch, like.dim))
        return dataclasses.replace(test, f_scale=scale)

    @property
    def g(self) -> Tensor:
        """Of ``root``."""
        with self.layer.entered():
            return self.layer.outside(self.inner.g)  # type: ignore[attr-defined]


class Attach(Protocol):
    """Gives a solution what a layer makes of it; called inside of the layer."""

    def __call__(self, layer: Layer, problem: Problem, value: Tensor, start: Tensor) -> Tensor: ...


def through_layers(
    problem: Problem,
    start: Tensor,
    bottom: Callable[[Problem, Tensor], tuple[Tensor, Any]],
    attach: Attach | None = None,
) -> tuple[Tensor, Any]:
    """What ``bottom(problem, start)`` gives without any transform, seen from inside of them all.

    ``start`` is a matrix [R, D], as are the values of ``bottom``, which returns one and a
    ``Solved`` or None.
    """
    layer = Layer.innermost()
    if layer is None:
        return bottom(problem, start)
    layer.look(problem, start)
    start_outside = layer.outside(start)
    with layer.left():
        outer = Outside(problem, layer, start_outside)
        value, solved = through_layers(outer, start_outside, bottom, attach)
    value = layer.inside(value)
    if attach is not None:
        value = attach(layer, problem, value, start)
    return value, None if solved is None else layer.solved_inside(solved)


def told(problem: Problem, solved: Solved, solver: Solver) -> Solved:
    """``solved``, of which all is known that can be: seen from inside, nothing can be looked at."""
    wait = solver.check_every > 0
    warn_of_forward(solved.rows, solved.inconsistent, relative=problem.relative, wait=wait)
    solved.measure = solved.inconsistent = None
    return solved


def look_through(problem: Problem) -> None:
    """Make ``problem.solve`` one without any transform, whose value is a constant to all of them.

    An adjoint then needs to know of none, if all it does is to solve and to evaluate f.
    """

    def solve(
        z0: Tensor, solver: Solver, frozen: Tensor | None = None, *, check: bool = True
    ) -> Solved:
        def bottom(problem: Problem, z0: Tensor) -> tuple[Tensor, Solved]:
            solved = problem.solve(z0, solver)
            return solved.value, told(problem, solved, solver)

        seen: Solved = through_layers(problem, z0, bottom)[1]
        return seen

    problem.solve = solve  # type: ignore[method-assign]


def is_over(leaf: Tensor) -> bool:
    """Whether the layer of this leaf is."""
    return bool(_functorch.is_dead_tensor_wrapper(leaf))  # type: ignore[attr-defined]


def tangent_outside(layer: Layer, image: Tensor) -> Tensor | None:
    tangent = forward_ad.unpack_dual(image).tangent
    return None if tangent is None else layer.outside(tangent)


def wrapped(layer: Layer, value: Tensor) -> Tensor:
    """A constant of the gradient that this layer is."""
    return _functorch._wrap_for_grad(value, layer.level)


def leaf_of(layer: Layer, value: Tensor) -> Tensor:
    """A leaf at this layer, of a tensor from outside or of a new one from here."""
    if (
        not _functorch.is_gradtrackingtensor(value)
        or _functorch.maybe_get_level(value) < layer.level
    ):
        value = wrapped(layer, value)
    leaf: Tensor = _create_differentiable(value, layer.level)
    return leaf
