"""``fixed_point`` and ``root``: the entry points."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.utils import _pytree as pytree

from deqcore._compile import never_traced
from deqcore._loop import Problem
from deqcore._packing import Packing
from deqcore._solution import BackwardRecord, Solution
from deqcore.adjoints import Adjoint, Implicit
from deqcore.solvers import Anderson, Solver


# A solve takes as many steps as its values need: there is nothing to trace. Without this the tracer
# would find that out call by call, in some twenty graphs that together are slower than none.
@never_traced(reason="a solve takes as many steps as values need; compile f instead")
def fixed_point(
    f: Callable[..., Any],
    z0: Any,
    *args: Any,
    solver: Solver = Anderson(),  # noqa: B008  (frozen)
    adjoint: Adjoint = Implicit(),  # noqa: B008  (frozen)
) -> Solution:
    """Solve z = f(z, *args) for each row of a batch, with gradients.

    Rows are independent: each has its own history, stops by itself and is then frozen bit for bit,
    whatever its batch-mates do.

    Args:
        f: any callable that maps a state to a state of the same structure and shapes. It always
            gets all rows, also those that have ended. It may close over parameters and modules.
        z0: where to start: a floating-point tensor [B, ...], or a pytree of such tensors that share
            dim 0. Any strides; float64, float32, bfloat16 or float16. It is not changed. A 0-dim
            tensor is one row.
        *args: passed on to f; gradients reach them.
        solver: ``Picard``, ``Anderson``, ``Broyden`` or a :class:`deqcore.Solver` of your own.
        adjoint: how gradients are computed, when grad mode is on: ``Implicit`` (default),
            ``Phantom`` or ``Unrolled``.

    Returns:
        A :class:`Solution`; nothing is raised when rows do not converge: look at
        ``solution.converged`` or call ``solution.raise_for_status()``.

    Raises:
        TypeError: ``solver``, ``adjoint`` or ``z0`` of a wrong kind.
        ValueError: f returned another structure, shape or device; z0 is on the meta device.

    ``torch.compile`` leaves a solve as it is, at the cost of one graph break: compile f instead.

    At most ``solver.max_steps`` calls of f are made to find the solution. In grad mode ``Implicit``
    makes one more to build the graph, and ``Phantom`` its ``steps``.
    """
    if not callable(f):
        raise TypeError(f"f: expected a callable, got {type(f).__name__}")
    if not isinstance(solver, Solver):
        raise TypeError(f"solver: expected e.g. deqcore.Anderson(), got {solver!r}")
    if not isinstance(adjoint, Adjoint):
        raise TypeError(f"adjoint: expected e.g. deqcore.Implicit(), got {adjoint!r}")
    packing = Packing.of(z0)
    if packing.device.type == "meta":
        raise ValueError(
            "z0: expected data on a CPU or a GPU, got a meta tensor: how many steps a solve takes "
            "depends on values; move the model and z0 with to_empty(device=...) first"
        )
    problem = Problem(f, args, packing)
    record = BackwardRecord()
    value, solved = adjoint.solve(problem, packing.pack(z0, "z0"), solver, record)
    return Solution(
        **solved.report(problem), record=record, value=packing.unpack(value, apart=True)
    )


def root(
    g: Callable[..., Any],
    z0: Any,
    *args: Any,
    solver: Solver = Anderson(),  # noqa: B008  (frozen)
    adjoint: Adjoint = Implicit(),  # noqa: B008  (frozen)
) -> Solution:
    """Solve g(z, *args) = 0, as the fixed point of f(z) = z + g(z).

    Arguments, result and errors are those of :func:`fixed_point`: g too must return the structure
    and shapes of z0, nothing is broadcast. The residual is rms(g(z)), and a
    row has converged when rms(g(z)) <= atol + rtol * rms(z + g(z)). Where g is steep, pass
    ``damping`` or use ``Broyden``.
    """

    if not callable(g):
        raise TypeError(f"g: expected a callable, got {type(g).__name__}")
    packing = Packing.of(z0)

    def shifted(z: Any, *rest: Any) -> Any:
        value = g(z, *rest)
        packing.check(value, "g(z)")  # the sum would broadcast a smaller one
        return pytree.tree_map(torch.add, z, value)

    return fixed_point(shifted, z0, *args, solver=solver, adjoint=adjoint)
