"""``fixed_point`` and ``root``: the entry points."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

from torch import Tensor

from deqcore import _transform_layers
from deqcore._checks import warn_of_forward
from deqcore._compile import never_traced
from deqcore._loop import Problem, Solved
from deqcore._notices import pending
from deqcore._packing import Packing
from deqcore._root import NORMS, RootProblem, packed_scale
from deqcore._solution import BackwardRecord, Solution
from deqcore._transforms import refuse_steps_by_values, values_are_unknown
from deqcore.adjoints import Adjoint, Implicit, Unrolled
from deqcore.dropout import masks_of_solve, solving
from deqcore.solvers import Anderson, Solver


# A solve takes as many steps as its values need: there is nothing to trace. Without this the tracer
# would find that out call by call, in some twenty graphs that together are slower than none.
@never_traced(
    reason="a solve takes as many steps as values need; compile f itself, or make "
    "it the cell of a deqcore.ImplicitLayer, which is compiled as one op. For torch.export "
    "pass strict=False and a solver with check_every=0"
)
def fixed_point(
    f: Callable[..., Any],
    z0: Any,
    *args: Any,
    solver: Solver = Anderson(),
    adjoint: Adjoint = Implicit(),
    batch: Literal["rows", "coupled"] = "rows",
    has_aux: bool = False,
) -> Solution:
    """Solve z = f(z, *args) for each row of a batch, with gradients.

    Rows are independent: each has its own history, stops by itself and is then frozen bit for bit,
    whatever its batch-mates do. Where f lets rows depend on each other (batch norm in training
    mode, a graph with its nodes in dim 0, attention over the batch) say ``batch="coupled"``: the
    whole state is then one problem, with one history, one norm and one status.

    Args:
        f: any callable that maps a state to a state of the same structure and shapes. It always
            gets all rows, also those that have ended. It may close over parameters and modules.
        z0: where to start: a floating-point tensor [B, ...], or a pytree of such tensors that share
            dim 0. Any strides; float64, float32, bfloat16 or float16. It is not changed. A 0-dim
            tensor is one row.
        *args: passed on to f; gradients reach them.
        solver: ``Picard``, ``Anderson``, ``Broyden`` or a ``deqcore.Solver`` of your own.
        adjoint: how gradients are computed, when grad mode is on: ``Implicit`` (default),
            ``Phantom`` or ``Unrolled``.
        batch: ``"rows"``: each row of dim 0 is a problem of its own. ``"coupled"``: the state as a
            whole is one. Leaves of a pytree then need not share dim 0, and status, residual and
            steps have shape [1]. Modules in training mode that f calls update their buffers
            (running statistics) once, from the solution, instead of in each evaluation.
        has_aux: f returns ``(state, aux)``, as functions of JAX with this option do; aux is any
            pytree, and ``Solution.aux`` is that of the evaluation at the solution, without a graph:
            what a loss needs of it belongs in the state, or is computed from the value.

    Returns:
        A ``Solution``. Nothing is raised when rows do not converge; look at
        ``solution.converged`` or call ``solution.raise_for_status()``.

    Raises:
        TypeError: ``solver``, ``adjoint`` or ``z0`` of a wrong kind; z0 or f(z) is sparse.
        ValueError: f returned another structure (the keys of a dict may come in any order), shape
            or device; z0 is on the meta device; another ``batch``.
        RuntimeError: f changed its argument in place; under ``torch.export`` or ``FakeTensorMode``,
            a solver that looks whether rows are done.

    Warns:
        ConvergenceWarning: once in a process for each cause; on a GPU in a later call, since
            nothing waits for it (never with ``check_every=0``; the statuses tell there, too).

    What "converged" means: rms(f(z) - z) <= atol + rtol * rms(f(z)), relative to f(z) as it is now.
    Iterates that grow without bound therefore meet any ``rtol`` in the end, as those of z + 1 do. A
    row that has converged at a residual above its first is warned of: there may be no fixed point.
    ``root`` measures against the first residual instead.

    What is checked with ``batch="rows"``: rows that have converged must still be what they were in
    the last evaluation. In grad mode (``Implicit``, ``Phantom``) that is the one at the solution,
    and covers all rows. Without grad mode, and with ``Unrolled``, it is the last of the iteration:
    it covers the rows that had converged before, and measured those that converged in it. A row
    that is not what it was becomes INCONSISTENT, and its residual that of the value returned. What
    is not seen without grad mode: a row that did not converge has the residual that it had beside
    the values that its batch-mates had then. In backward, rows are in addition multiplied by signs
    and powers of two that a row-wise Jacobian lets pass bit for bit, so that the solve for a
    coupled one does not converge.

    ``torch.compile`` leaves a solve as it is, at the cost of one graph break: compile f instead.
    ``torch.export`` (``strict=False``), and FakeTensorMode, want a solver that looks at no value,
    such as ``Anderson(check_every=0, max_steps=12)``. All its steps are then in the program, as
    operations of PyTorch alone; rows stop where they would, and sizes may be dynamic.

    f must return the same for the same state. Where it draws random numbers (dropout in training
    mode) no row converges, and ``raise_for_status`` says why: ``deqcore.FixedDropout`` draws
    once in a solve.

    At most ``solver.max_steps`` calls of f are made to find the solution. In grad mode ``Implicit``
    makes one more to build the graph, and ``Phantom`` its ``steps``; with ``has_aux``, or with
    ``batch="coupled"`` where modules have buffers to update, one more is made if no other was made
    at the solution.
    """
    if not callable(f):
        raise TypeError(f"f: expected a callable, got {type(f).__name__}")
    problem = Problem(f, args, _checked(z0, batch, solver, adjoint), has_aux=has_aux)
    start = problem.packing.pack(z0, "z0")
    solved, value, record = _solve(problem, start, solver, adjoint)
    value = problem.packing.unpack(value, apart=True)
    return Solution.of(solved.report(problem), record, value, problem.aux)


@never_traced(
    reason="a solve takes as many steps as values need; compile g itself, or make "
    "z + g(z) the cell of a deqcore.ImplicitLayer, which is compiled as one op. For torch.export "
    "pass strict=False and a solver with check_every=0"
)
def root(
    g: Callable[..., Any],
    z0: Any,
    *args: Any,
    solver: Solver = Anderson(),
    adjoint: Adjoint = Implicit(),
    batch: Literal["rows", "coupled"] = "rows",
    has_aux: bool = False,
    norm: Literal["rms", "max"] = "rms",
    u_scale: Any = None,
    f_scale: Any = None,
) -> Solution:
    """Solve g(z, *args) = 0, by the fixed-point iteration of z + g(z).

    Arguments, result and errors are those of ``fixed_point``: g too must return the structure
    and shapes of z0, nothing is broadcast. Where g is steep, pass ``damping`` or use ``Broyden``.

    A row has converged when, first, norm(f_scale * g(z)) <= atol + rtol * norm(f_scale * g(z0)):
    how large z is plays no part, and ``atol`` is in the units of g. Second, the secant through the
    last two evaluations must place the root within a thousandth of rms(z), or of the way from z0;
    else g may just fade away, as exp(-z) does. A start that meets ``atol`` alone is a root.

    Args:
        norm: over the elements of a row: ``"rms"``, or ``"max"`` for the largest absolute value.
            ``Solution.residual`` and ``trace`` are in this norm, of f_scale * g(z).
        u_scale: positive numbers that broadcast to z0 (a tensor, a number or a pytree like z0), 1 /
            the usual size of each component of z. Steps and mixing weights are computed for
            u_scale * z, so that components in other units count alike.
        f_scale: the same for g; it decides about convergence alone.

    Both scales are what KINSOL calls so (Hindmarsh et al., ACM TOMS 31, 2005), whose stopping test
    has the max norm; there u_scale enters the test for small steps and not the steps.
    """
    if not callable(g):
        raise TypeError(f"g: expected a callable, got {type(g).__name__}")
    if norm not in NORMS:
        raise ValueError(f"norm: expected 'rms' or 'max', got {norm!r}")
    packing = _checked(z0, batch, solver, adjoint)
    u_scale = packed_scale(u_scale, packing, z0, "u_scale")
    f_scale = packed_scale(f_scale, packing, z0, "f_scale")
    problem = RootProblem(g, args, packing, norm, u_scale, f_scale, has_aux)
    solved, value, record = _solve(problem, problem.pack(z0), solver, adjoint)
    value = problem.unpack(value)
    return Solution.of(solved.report(problem), record, value, problem.aux)


def _checked(z0: Any, batch: str, solver: Solver, adjoint: Adjoint) -> Packing:
    if not isinstance(solver, Solver):
        raise TypeError(f"solver: expected e.g. deqcore.Anderson(), got {solver!r}")
    if not isinstance(adjoint, Adjoint):
        raise TypeError(f"adjoint: expected e.g. deqcore.Implicit(), got {adjoint!r}")
    packing = Packing.of(z0, batch)
    if packing.device.type == "meta":
        raise ValueError(
            "z0: expected data on a CPU or a GPU, got a meta tensor: how many steps a solve takes "
            "depends on values; move the model and z0 with to_empty(device=...) first"
        )
    return packing


def _solve(
    problem: Problem, z0: Tensor, solver: Solver, adjoint: Adjoint
) -> tuple[Solved, Tensor, BackwardRecord]:
    pending.tell()
    record = BackwardRecord()
    unknown = values_are_unknown(z0)
    if unknown:
        refuse_steps_by_values(solver.check_every)
        adjoint = Unrolled()  # whose steps are PyTorch's own operations
    if _transform_layers.are_active():
        _transform_layers.look_through(problem)
    outer = solving.masks
    solving.masks = masks_of_solve()
    try:
        value, solved = adjoint.solve(problem, z0, solver, record)
        problem.finish(solved)
    finally:
        solving.masks = outer
    if not unknown and solved.measure is not None:
        wait = solver.check_every > 0
        warn_of_forward(solved.rows, solved.inconsistent, relative=problem.relative, wait=wait)
    return solved, value, record
