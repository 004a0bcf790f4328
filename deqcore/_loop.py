"""The only iteration loop: evaluate f, then one fused op, until every row has ended."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils import _pytree as pytree
from torch.utils.checkpoint import checkpoint

from deqcore._packing import Packing
from deqcore._transforms import refuse_mapped
from deqcore.ops._rows import BEST, LATEST, STEPS, Rows
from deqcore.solvers import Solver
from deqcore.solvers._buffers import counting_changes
from deqcore.solvers.base import StepContext


class Problem:
    """f as solvers and adjoints see it: on matrices [B, D] of one dtype, counting its calls.

    ``problem(z)`` is f(z), with a graph in grad mode; :meth:`solve` finds z = f(z) without one.

    Attributes:
        calls: evaluations so far.
        f_dtypes: whose rounding bounds the residual, known after the first call: those that f
            returned and, under autocast, the one that it computes in, which the sum with a float32
            input hides. ``f_dtypes`` given at the start are kept.
    """

    def __init__(
        self,
        f: Callable[..., Any],
        args: tuple[Any, ...],
        packing: Packing,
        f_dtypes: tuple[torch.dtype, ...] = (),
    ) -> None:
        self.f, self.args, self.packing = f, args, packing
        self.calls = 0
        self.f_dtypes = f_dtypes

    def __call__(self, z: Tensor) -> Tensor:  # [B, D] -> [B, D], in the packed dtype
        self.calls += 1
        if z.is_inference():  # of a differentiable step, or of leaves of several dtypes
            with counting_changes():
                z = z.clone()
        version = z._version
        value = self.f(self.packing.unpack(z), *self.args)
        if z._version != version:
            raise RuntimeError(
                "f changed its argument in place, which is the solver's own iterate; return a new "
                "tensor (z * 0.5, not z.mul_(0.5)), or start f with z = z.clone()"
            )
        packed = self.packing.pack(value)
        if self.calls == 1:
            leaves = pytree.tree_leaves(value)
            self.f_dtypes += tuple(leaf.dtype for leaf in leaves) + _autocast_dtypes(self.packing)
        return packed

    def solve(self, z0: Tensor, solver: Solver, frozen: Tensor | None = None) -> Solved:
        """Iterate from ``z0`` [B, D] without a graph.

        Rows of ``frozen`` (bool [B]) keep their z0 and count as converged in no steps.
        """
        with torch.no_grad():
            run = _Run(self, z0, solver, frozen)
            watch = _EndWatch(run.rows, solver.check_every)
            for step in range(1, solver.max_steps + 1):
                if watch.all_ended():
                    break
                f = self(run.z)
                if step == 1:
                    _refuse_forward_mode(f)
                    refuse_mapped(run.x, f)
                    context = run.context()
                run.state, run.x, z = solver.take_step(run.state, run.x, f, step, context)
                run.seen(z)
                del f, z  # no iterate but the current one is alive while f runs
        return run.solved()


def _autocast_dtypes(packing: Packing) -> tuple[torch.dtype, ...]:
    """What autocast turns float32 into where f runs; it leaves float64 as it is."""
    kind = packing.device.type
    if not torch.is_autocast_enabled(kind) or set(packing.dtypes) == {torch.float64}:
        return ()
    return (torch.get_autocast_dtype(kind),)


@dataclass
class Solved:
    """The end of a loop: a value, and how each row got there.

    Attributes:
        value: [B, D] in the state's dtype, without a graph.
        rows: status, counters and residuals.
        trace: [B, n] residuals, or None.
        state: the solver's history; an adjoint that does not need it sets it to None, so that its
            memory is free while f's graph is built.
    """

    value: Tensor
    rows: Rows
    trace: Tensor | None
    state: Any

    def with_gradient_of(self, source: Tensor) -> Tensor:
        """``value``, whose gradient goes to ``source`` [B, D] as it is."""
        value: Tensor = _ValueWithGradientOf.apply(source, self)
        return value

    def report(self, problem: Problem) -> dict[str, Any]:
        """The fields of a :class:`SolveReport`."""
        dtype = problem.packing.compute_dtype
        trace = None if self.trace is None else self.trace.to(dtype)
        return report_fields(self.rows, dtype, problem.calls, trace)


def report_fields(
    rows: Rows, dtype: torch.dtype, evaluations: int | Tensor, trace: Tensor | None
) -> dict[str, Any]:
    """Those of a :class:`SolveReport`; some share memory with ``rows``."""
    return {
        "status": rows.status,
        "residual": rows.residuals[:, BEST].to(dtype),
        "steps": rows.counters[:, STEPS].clone(),
        "evaluations": evaluations,
        "trace": trace,
    }


class _ValueWithGradientOf(torch.autograd.Function):
    """``solved.value`` in forward; in backward the gradient goes to ``source`` instead.

    The value is not an input, so that what is returned is no view and may be changed in place.
    """

    @staticmethod
    def forward(ctx: Any, source: Tensor, solved: Solved) -> Tensor:
        return solved.value

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


def differentiable_solve(
    problem: Problem, z0: Tensor, solver: Solver, checkpoint_every: int | None
) -> Solved:
    """The same iteration out of functional steps, so that autograd can follow it.

    ``checkpoint_every`` steps at a time are recomputed in backward instead of stored.
    """
    run = _Run(problem, z0, solver, None, differentiable=True)
    for first in range(1, solver.max_steps + 1, checkpoint_every or solver.max_steps):
        last = min(first + (checkpoint_every or solver.max_steps), solver.max_steps + 1)
        if checkpoint_every and torch.is_grad_enabled():
            _checkpointed_steps(run, range(first, last))
        else:
            _differentiable_steps(run, range(first, last))
    return run.solved()


def _differentiable_steps(run: _Run, steps: range) -> None:
    for step in steps:
        # The first step of an empty batch gives its value a graph, as other adjoints do.
        needed = step == 1 and torch.is_grad_enabled()
        if run.solver.check_every and not needed and not run.rows.remaining.item():
            return
        f = run.problem(run.z)
        refuse_mapped(run.x, f)
        context = run.context()
        run.state, run.x = run.solver.differentiable_step(run.state, run.x, f, step, context)
        run.seen(run.x.to(run.packing.dtype))


def _checkpointed_steps(run: _Run, steps: range) -> None:
    """Take the steps as a function of tensors, which autograd may call again in backward."""

    def segment(*leaves: Tensor) -> tuple[Tensor, ...]:
        part = copy.copy(run)
        part.x, part.z, part.state, part.traces = pytree.tree_unflatten(list(leaves), spec)
        _differentiable_steps(part, steps)
        out, out_specs[0] = pytree.tree_flatten((part.x, part.z, part.state, part.traces))
        return tuple(out)

    out_specs: list[pytree.TreeSpec | None] = [None]
    leaves, spec = pytree.tree_flatten((run.x, run.z, run.state, run.traces))
    out = checkpoint(segment, *leaves, use_reentrant=False)
    assert out_specs[0] is not None
    run.x, run.z, run.state, run.traces = pytree.tree_unflatten(list(out), out_specs[0])


def _refuse_forward_mode(f: Tensor) -> None:
    if forward_ad._current_level >= 0 and forward_ad.unpack_dual(f).tangent is not None:
        raise RuntimeError(
            "forward-mode differentiation (jvp) of a solve: only adjoint=deqcore.Unrolled() has it"
        )


class _Run:
    """The mutable part of one solve."""

    def __init__(
        self,
        problem: Problem,
        z0: Tensor,
        solver: Solver,
        frozen: Tensor | None,
        differentiable: bool = False,
    ) -> None:
        packing = problem.packing
        self.problem, self.solver, self.packing = problem, solver, packing
        # The current iterate; a tensor of its own, so that z0's memory is seen to be shared.
        self.x = z0.to(packing.compute_dtype).contiguous().view(z0.shape)
        with counting_changes():
            if self.x.is_inference():
                self.x = self.x.clone()
            self.z = packing.cast(self.x)  # the same as f sees it
        rows = Rows.start(len(z0), z0.device, frozen)
        self.state = solver.initial_state(self.x, rows, differentiable=differentiable)
        self.traces: list[Tensor] = []

    @property
    def rows(self) -> Rows:
        rows: Rows = self.state.rows
        return rows

    def context(self) -> StepContext:
        """After the first call of f: only then is it known what f returns."""
        return self.solver.context(self.x, self.packing.dtype, self.problem.f_dtypes)

    def seen(self, z: Tensor) -> None:
        """Take over the next iterate as f will see it, and note the residual just measured."""
        self.z = z
        if not self.packing.uniform:
            self.z = self.packing.cast(z)
            self.x = self.z.to(self.packing.compute_dtype)
        if self.solver.record_trace:
            self.traces.append(self.rows.residuals[:, LATEST].clone())

    def solved(self) -> Solved:
        value = self.z if self.problem.calls else self.z.clone()  # never an alias of z0
        trace = None
        if self.solver.record_trace:
            empty = self.rows.residuals.new_empty(len(self.x), 0)
            trace = torch.stack(self.traces, 1) if self.traces else empty
        return Solved(value, self.rows, trace, self.state)


class _EndWatch:
    """Tells the loop that every row has ended.

    On the CPU at once. On a GPU the count is copied asynchronously every ``check_every`` steps and
    awaited one look later, so that the device never idles; waiting for the event, rather than
    asking whether it has passed, keeps the number of evaluations the same in every run.
    """

    def __init__(self, rows: Rows, check_every: int) -> None:
        self.remaining, self.every = rows.remaining, check_every
        self.looks = 0
        self.on_host = self.remaining.device.type == "cpu"
        if not self.on_host and check_every:
            self.copy = torch.empty(2, dtype=torch.int32, pin_memory=True)
            self.events = [torch.cuda.Event(), torch.cuda.Event()]

    def all_ended(self) -> bool:
        """Called before every evaluation."""
        look = self.looks
        self.looks += 1
        if not self.every or look % self.every:
            return False
        if self.on_host:
            return not self.remaining.item()
        index = (look // self.every) % 2
        self.copy[index : index + 1].copy_(self.remaining, non_blocking=True)
        # Of the tensor's device, which need not be the current one.
        self.events[index].record(torch.cuda.current_stream(self.remaining.device))
        if look < self.every:  # nothing was asked before
            return False
        self.events[1 - index].synchronize()
        return not self.copy[1 - index].item()
