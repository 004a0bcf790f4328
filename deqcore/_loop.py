"""The only iteration loop: evaluate f, then one fused op, until every row has ended."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils import _pytree as pytree

from deqcore._checks import Measure, RelativeMeasure, check_frozen_rows, frozen_rows_are_alike
from deqcore._forked import go_on_with_one_thread
from deqcore._module_buffers import ModuleBuffers
from deqcore._packing import Packing, check_layout
from deqcore._parametrized import graph_free
from deqcore._randomness import Draws
from deqcore._solution import SolveReport
from deqcore._transforms import refuse_mapped
from deqcore.ops._rows import LATEST, Rows
from deqcore.solvers import Solver
from deqcore.solvers._buffers import counting_changes
from deqcore.solvers.base import StepContext


class Problem:
    """f as solvers and adjoints see it: on matrices [B, D] of one dtype, counting its calls.

    ``problem(z)`` is f(z), with a graph in grad mode; ``solve`` finds z = f(z) without one, and
    ``at_solution`` is the evaluation there. A coupled batch is one row, and what f's modules
    note of their inputs (running statistics) they note of that last evaluation alone.

    Attributes:
        relative: whether a row's residual is compared with the size of f, which may grow.
        calls: evaluations so far.
        aux: what f returned beside the state at the solution, without a graph, with ``has_aux``.
        f_dtypes: whose rounding bounds the residual, known after the first call: those that f
            returned and, under autocast, the one that it computes in, which the sum with a float32
            input hides. ``f_dtypes`` given at the start are kept.
    """

    relative = True

    def __init__(
        self,
        f: Callable[..., Any],
        args: tuple[Any, ...],
        packing: Packing,
        f_dtypes: tuple[torch.dtype, ...] = (),
        has_aux: bool = False,
    ) -> None:
        self.f, self.args, self.packing, self.has_aux = f, args, packing, has_aux
        self.aux: Any = None
        self._latest_aux: Any = None
        self._needs_aux = has_aux
        self.calls = 0
        self.f_dtypes = f_dtypes
        self.buffers = ModuleBuffers() if packing.coupled else None

    def __call__(self, z: Tensor) -> Tensor:  # [B, D] -> [B, D], in the packed dtype
        if self.buffers is None:
            return self.evaluate(z)
        with self.buffers.unchanged():
            return self.evaluate(z)

    def at_solution(self, z: Tensor, solved: Solved) -> Tensor:
        """f(z) for z = ``solved.value``, which shows whether rows are still what they were."""
        f = self.evaluate_at_solution(z)
        with torch.no_grad():
            solved.check(self, z, f)
        return f

    def evaluate_at_solution(self, z: Tensor) -> Tensor:
        """f(z), with what f's modules note of it, and aux."""
        with contextlib.nullcontext() if self.buffers is None else self.buffers.changing():
            f = self.evaluate(z)
        if self.has_aux:
            self.aux, self._needs_aux = pytree.tree_map(_detached, self._latest_aux), False
        return f

    def finish(self, solved: Solved) -> None:
        """Do what is due at the solution, if ``at_solution`` has not been called."""
        if self._needs_aux or (self.buffers is not None and self.buffers.waiting):
            with torch.no_grad():  # of a copy: aux may be a part of it
                self.at_solution(solved.value.detach().clone(), solved)
        self._latest_aux = None

    def test(self, context: StepContext) -> Any:
        """What ends a row instead of the solver's tolerance (a `_root.RootTest`), or None."""
        return None

    def evaluate(self, z: Tensor) -> Tensor:
        """f(z), come what may of the buffers of f's modules."""
        self.calls += 1
        if z.is_inference():  # of a differentiable step, or of leaves of several dtypes
            with counting_changes():
                z = z.clone()
        version = z._version
        packed, value = self._packed_value(z)
        if z._version != version:
            raise RuntimeError(
                "f changed its argument in place, which is the solver's own iterate; return a new "
                "tensor (z * 0.5, not z.mul_(0.5)), or start f with z = z.clone()"
            )
        if self.calls == 1:
            leaves = [value] if isinstance(value, Tensor) else pytree.tree_leaves(value)
            self.f_dtypes += tuple(leaf.dtype for leaf in leaves) + _autocast_dtypes(self.packing)
        return packed

    def rounding(self) -> float:
        """The coarsest machine epsilon of the state and of f."""
        return max(torch.finfo(d).eps for d in (self.packing.dtype, *self.f_dtypes))

    def _packed_value(self, z: Tensor) -> tuple[Tensor, Any]:
        """f(z) as a matrix, and as f returned it."""
        value = self.f(self.packing.unpack(z), *self.args)
        if self.has_aux or self.calls == 1:
            value = self.without_aux(value, "f(z)")
        return self.packing.pack(value), value

    def without_aux(self, value: Any, what: str) -> Any:
        """What f returned, checked, aux put aside; ``what`` as in ``Packing.pack``."""
        if self.has_aux:
            if not isinstance(value, tuple) or len(value) != 2:
                raise ValueError(
                    f"{what}: expected a pair (z, aux), as has_aux=True says, got "
                    f"{type(value).__name__}"
                )
            value, self._latest_aux = value
        for leaf in [value] if isinstance(value, Tensor) else pytree.tree_leaves(value):
            if isinstance(leaf, Tensor):
                check_layout(leaf, what)
        return value

    def solve(
        self, z0: Tensor, solver: Solver, frozen: Tensor | None = None, *, check: bool = True
    ) -> Solved:
        """Iterate from ``z0`` [B, D] without a graph.

        Rows of ``frozen`` (bool [B]) keep their z0 and count as converged in no steps. Without
        ``check``, ``at_solution`` is yet to show whether rows depend on each other.
        """
        with graph_free():
            run = Run(self, z0, solver, frozen)
            watch = _EndWatch(run.rows, solver.check_every)
            draws_from = run.draws_from()
            f = None
            for step in range(1, solver.max_steps + 1):
                if watch.all_ended():
                    break
                if step == draws_from and step > 1:
                    run.draws = Draws(z0.device)
                f = None  # no iterate but the current one is alive while f runs
                f = self(run.z)
                if step == 1:
                    _refuse_forward_mode(f)
                    refuse_mapped(run.x, f)
                    run.begin()
                run.end_rows()
                run.state, run.x, z = solver.take_step(run.state, run.x, f, step, run.context)
                run.seen(z)
                del z
            return run.solved(f if check and not watch.all_were_active else None)


def _detached(leaf: Any) -> Any:
    return leaf.detach() if isinstance(leaf, Tensor) else leaf


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
        measure: what a row's residual is compared with; None where f was not called.
        inconsistent: bool [], whether ``check`` has found such a row; None: not looked for.
        draws_numbers: as in ``deqcore.SolveReport``.
    """

    value: Tensor
    rows: Rows
    trace: Tensor | None
    state: Any
    measure: Measure | None = None
    inconsistent: Tensor | None = None
    draws_numbers: bool = False

    def check(self, problem: Problem, z: Tensor, f: Tensor, evaluations: int | None = None) -> None:
        """Compare f with what it was for rows that had ended; see ``check_frozen_rows``."""
        if self.measure is None or problem.packing.batch < 2:
            return  # no rows, or none to depend on
        if frozen_rows_are_alike(self.rows, z, f, self.measure, evaluations):
            return
        found = check_frozen_rows(self.rows, z, f, self.measure, problem.rounding(), evaluations)
        if found is not None:
            self.inconsistent = found

    def with_gradient_of(self, source: Tensor) -> Tensor:
        """``value``, whose gradient goes to ``source`` [B, D] as it is."""
        if torch._C._are_functorch_transforms_active():
            return self.value + (source - source.detach())
        value: Tensor = _ValueWithGradientOf.apply(source, self)
        return value

    def report(self, problem: Problem) -> SolveReport:
        """The outcome without the value."""
        dtype = problem.packing.compute_dtype
        return SolveReport.of_rows(
            self.rows,
            dtype,
            evaluations=problem.calls,
            trace=None if self.trace is None else self.trace.to(dtype),
            draws_numbers=self.draws_numbers,
        )


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


def _refuse_forward_mode(f: Tensor) -> None:
    if forward_ad._current_level >= 0 and forward_ad.unpack_dual(f).tangent is not None:
        raise RuntimeError(
            "forward-mode differentiation of a solve: expected torch.func.jvp or jacfwd, got "
            "torch.autograd.forward_ad, which only adjoint=deqcore.Unrolled() has"
        )


class Run:
    """The mutable part of one solve."""

    def __init__(
        self,
        problem: Problem,
        z0: Tensor,
        solver: Solver,
        frozen: Tensor | None,
        differentiable: bool = False,
    ) -> None:
        go_on_with_one_thread()
        packing = problem.packing
        self.problem, self.solver, self.packing = problem, solver, packing
        self.differentiable = differentiable
        self.test: Any = None  # in place of the solver's
        self.test_state: Any = None
        self.latest: Tensor | None = None  # f, for a look after the last step
        self.first: Tensor | None = None  # plain step, of a differentiable run
        self.draws: Draws | None = None
        self.taken = 0  # steps
        # The current iterate; a tensor of its own, so that z0's memory is seen to be shared.
        self.x = z0.to(packing.compute_dtype).contiguous().view(z0.shape)
        with counting_changes():
            if self.x.is_inference():
                self.x = self.x.clone()
            self.z = packing.cast(self.x)  # the same as f sees it
        rows = Rows.start(z0.shape[0], z0.device, frozen)
        self.state = solver.initial_state(self.x, rows, differentiable=differentiable)
        self.traces: list[Tensor] = []

    @property
    def rows(self) -> Rows:
        rows: Rows = self.state.rows
        return rows

    def draws_from(self) -> int:
        """The evaluation before which `draws` begins; 0: none, where nothing may be looked at.

        By then what is drawn once in a solve has been drawn, and most solves are over.
        """
        solver = self.solver
        return min(solver.patience, solver.max_steps) if solver.check_every else 0

    def begin(self) -> None:
        """After the first call of f: only then is it known what f returns."""
        if self.taken:
            return
        self.context: StepContext = self.solver.context(
            self.x, self.packing.dtype, self.problem.f_dtypes
        )
        self.test = self.problem.test(self.context)
        if self.test is not None:
            self.test_state = self.test.start(self.x)
            self.context = self.solver.without_tolerance(self.context)

    def end_rows(self) -> None:
        """End the rows that a test other than the solver's finds to be done."""
        if self.test is None:
            return
        before = self.rows
        self.test_state, rows = self.test.end(self.test_state, before, self.x, self.problem)
        if self.differentiable:
            self.state = self.state._replace(rows=rows)
        elif rows is not before:
            for old, new in zip(before, rows, strict=True):
                old.copy_(new)  # the loop watches these tensors

    def seen(self, z: Tensor) -> None:
        """Take over the next iterate as f will see it, and note the residual just measured."""
        self.z = z
        self.taken += 1
        if not self.packing.uniform:
            self.z = self.packing.cast(z)
            self.x = self.z.to(self.packing.compute_dtype)
        if self.test is not None:
            self.test_state = self.test.after_step(self.test_state, self.rows)
        if self.solver.record_trace:
            latest = self.rows.residuals[:, LATEST] if self.test is None else self.test_state.latest
            self.traces.append(latest.clone())

    def tensors(self) -> tuple[Any, ...]:
        """All that changes from step to step, for autograd to follow."""
        return self.x, self.z, self.state, self.traces, self.test_state, self.first

    def take(self, tensors: tuple[Any, ...]) -> None:
        self.x, self.z, self.state, self.traces, self.test_state, self.first = tensors

    def solved(self, f: Tensor | None) -> Solved:
        """The end; ``f`` is its last evaluation, to be compared, or None."""
        value = self.z if self.problem.calls else self.z.clone()  # never an alias of z0
        trace = None
        if self.solver.record_trace:
            empty = self.rows.residuals.new_empty(self.x.shape[0], 0)
            trace = torch.stack(self.traces, 1) if self.traces else empty
        solved = Solved(value, self.rows, trace, self.state)
        if self.draws is not None:
            solved.draws_numbers = self.draws.were_made()
        if not self.taken:
            return solved
        if self.test is None:
            solved.measure = RelativeMeasure(self.context.limits.rtol, self.context.limits.atol)
        else:
            self.test.report(self.test_state, self.rows)
            solved.measure = self.test.measure(self.test_state, self.problem)
        if f is not None:
            solved.check(self.problem, value.detach(), f, self.taken)
        return solved


class _EndWatch:
    """Tells the loop that every row has ended.

    On the CPU at once. On a GPU the count is copied asynchronously every ``check_every`` steps and
    awaited one look later, so that the device never idles; waiting for the event, rather than
    asking whether it has passed, keeps the number of evaluations the same in every run.
    """

    def __init__(self, rows: Rows, check_every: int) -> None:
        self.remaining, self.every, self.rows = rows.remaining, check_every, rows.status.shape[0]
        self.looks = 0
        self.last_count: int | float = 0  # above zero
        self.on_host = self.remaining.device.type == "cpu"
        if not self.on_host and check_every:
            self.copy = torch.empty(2, dtype=torch.int32, pin_memory=True)
            self.events = [torch.cuda.Event(), torch.cuda.Event()]

    @property
    def all_were_active(self) -> bool:
        """Whether it is known that no row had ended before the last evaluation."""
        return self.every == 1 and self.last_count == self.rows

    def all_ended(self) -> bool:
        """Called before every evaluation."""
        look = self.looks
        self.looks += 1
        if not self.every or look % self.every:
            return False
        if self.on_host:
            count = self.remaining.item()
            if count:
                self.last_count = count
            return not count
        index = (look // self.every) % 2
        self.copy[index : index + 1].copy_(self.remaining, non_blocking=True)
        # Of the tensor's device, which need not be the current one.
        self.events[index].record(torch.cuda.current_stream(self.remaining.device))
        if look < self.every:  # nothing was asked before
            return False
        self.events[1 - index].synchronize()
        return not self.copy[1 - index].item()
