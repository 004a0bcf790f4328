"""``capture``: a whole solve, early exit included, as one CUDA graph.

The solve consists of three parts, each captured by torch: one that resets the state, one step, and,
where gradients are wanted, an evaluation of f that keeps its graph. They are joined into one graph
in which a conditional node repeats the step while a row is active, so that the host queues a solve
with a single call. The adjoint's linear solve becomes a second graph of the same form.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils import _pytree as pytree

from deqcore._checks import RelativeMeasure, check_frozen_rows, warn_of_forward
from deqcore._graphs import CudaGraphs, Parts
from deqcore._loop import Problem, report_fields
from deqcore._notices import pending
from deqcore._packing import Packing
from deqcore._solution import BackwardRecord, Solution, SolveReport
from deqcore.adjoints import Adjoint, Implicit
from deqcore.adjoints._linear import UnitGradient, graph_leaves, scaled_back, vector_jacobian
from deqcore.adjoints._system import act_on_failure, row_bits
from deqcore.ops._rows import STEPS, Rows
from deqcore.solvers import Anderson, Solver

WARM_UP_STEPS = 2  # the first one writes what later ones read


def capture(
    f: Callable[..., Any],
    z0: Any,
    *args: Any,
    solver: Solver = Anderson(),  # noqa: B008  (frozen)
    adjoint: Adjoint = Implicit(),  # noqa: B008  (frozen)
    batch: Literal["rows", "coupled"] = "rows",
) -> CapturedSolver:
    """Record ``fixed_point(f, z0, *args)`` as a CUDA graph, to be replayed with new inputs.

    A replay costs the host one call, whatever the number of steps, and ends when the last row does.
    Its results are those of :func:`fixed_point`, bit for bit where f runs the same kernels when it
    is captured.

    Args:
        f: as in :func:`fixed_point`, and capturable: no copies to the host, no shapes that depend
            on data. Randomness in f repeats itself in every evaluation and replay. Parameters of f
            may be changed in place between replays (an optimiser does), but not replaced.
        z0, *args: examples of the inputs, on one GPU. Later inputs must have their structure,
            shapes and dtypes; what is not a tensor is part of f. In grad mode, gradients reach the
            tensors of ``args`` that require grad here, and the parameters of f.
        solver: as in :func:`fixed_point`; ``check_every`` has no effect, and ``record_trace`` is
            refused.
        adjoint: ``Implicit`` without ``reuse_forward``, where gradients are wanted; its
            ``on_failure`` may not be ``"fallback"``, and ``"raise"`` waits for the GPU.
        batch: as in :func:`fixed_point`.

    Returns:
        A :class:`CapturedSolver`. Memory for all steps is held as long as it lives.

    Raises:
        ValueError: z0 is not on a GPU, or an option cannot be captured.
        RuntimeError: the CUDA kernels are missing, or f cannot be captured.

    What :func:`fixed_point` checks with ``batch="rows"`` is checked here too, on the device, at the
    cost of a copy of f(z) for each step of a batch, and of two products with signs for each step in
    backward; warnings come with a later call.

    Without CUDA 12.4 the graph takes ``max_steps`` steps each time, and a warning says so.
    """
    return _capture(f, z0, args, solver, adjoint, CudaGraphs(), batch)


def _capture(
    f: Callable[..., Any],
    z0: Any,
    args: tuple[Any, ...],
    solver: Solver,
    adjoint: Adjoint,
    recorder: Any,
    batch: str = "rows",
) -> CapturedSolver:
    packing = Packing.of(z0, batch)
    recorder.check(packing.device)
    if solver.record_trace:
        raise ValueError("capture: record_trace=True needs a solve that is not captured")
    cached = torch.is_autocast_cache_enabled()
    torch.set_autocast_cache_enabled(False)  # it would outlive the graph's memory
    try:
        return CapturedSolver(f, z0, args, packing, solver, adjoint, recorder)
    finally:
        torch.set_autocast_cache_enabled(cached)


class CapturedSolution(Solution):
    """A :class:`Solution` whose ``evaluations`` is read from the device when it is asked for."""

    @property
    def evaluations(self) -> int:
        """Calls of f in all."""
        return int(self._evaluations)

    @evaluations.setter
    def evaluations(self, value: int | Tensor) -> None:
        self._evaluations = value


class CapturedSolver:
    """A recorded solve; made by :func:`capture`.

    ``solver(z0, *args)`` copies the inputs in, replays, and returns a new :class:`Solution`. The
    buffers exist once: run backward before the next call (else backward raises), and make all calls
    on one stream.

    Attributes:
        exits_early: whether the device ends a solve with its last row, or always takes all steps.
    """

    exits_early: bool

    def __init__(
        self,
        f: Callable[..., Any],
        z0: Any,
        args: tuple[Any, ...],
        packing: Packing,
        solver: Solver,
        adjoint: Adjoint,
        recorder: Any,
    ) -> None:
        self._packing, self._device = packing, packing.device
        leaves, self._args_spec = pytree.tree_flatten(args)
        self._call = 0  # which call the buffers hold
        with _on(self._device), recorder.set_up():
            self._args = [_static_copy(leaf) for leaf in leaves]
            problem = Problem(f, pytree.tree_unflatten(self._args, self._args_spec), packing)
            if problem.buffers is not None:
                problem.buffers.remember()
            self._forward = _StaticSolve(problem, solver)
            self._forward.z0.copy_(packing.pack(z0, "z0").detach())
            self._backward: _StaticBackward | None = None
            if torch.is_grad_enabled():
                self._backward = self._make_backward(problem, adjoint)
            self._record(recorder)
            if problem.buffers is not None:
                problem.buffers.recall()
        self.exits_early = recorder.exits_early

    def _make_backward(self, problem: Problem, adjoint: Adjoint) -> _StaticBackward | None:
        backward = _StaticBackward(problem, self._forward)
        self._forward.begin()
        backward.evaluate()
        leaves = {id(leaf): leaf for leaf in graph_leaves(backward.f) if leaf is not backward.z}
        backward.inputs = list(leaves.values())
        if not backward.inputs:
            return None
        if not isinstance(adjoint, Implicit) or adjoint.reuse_forward:
            raise ValueError(
                "capture: gradients need adjoint=deqcore.Implicit() without reuse_forward, got "
                f"{adjoint!r}; without gradients, capture under torch.no_grad()"
            )
        if adjoint.on_failure == "fallback":
            raise ValueError(
                "capture: on_failure='fallback' would wait for the GPU in each backward, to choose "
                "other means; use 'warn', 'raise' or 'ignore', or a solver that converges"
            )
        self._on_failure = adjoint.on_failure
        backward.make_linear(adjoint.solver)
        return backward

    def _record(self, recorder: Any) -> None:
        forward, backward = self._forward, self._backward
        last = forward.finish if backward is None else backward.evaluate
        parts = [forward.parts(last)]
        if backward is not None:
            parts.append(backward.linear.parts(backward.finish, first=backward.begin))
        recorder.warm_up(lambda: _run_a_few_steps(parts))
        self._launch = recorder.record(parts[0])
        self._launch_backward = recorder.record(parts[1]) if backward is not None else None
        if backward is not None and recorder.replays_alone:
            backward.forget()

    def __call__(self, z0: Any, *args: Any) -> Solution:
        """Solve from ``z0`` with these arguments.

        Raises:
            ValueError: other structure, shapes or dtypes than those captured.
        """
        packing = self._packing
        given = Packing.of(z0, "coupled" if packing.coupled else "rows")
        if given != packing:
            raise ValueError(f"z0: expected what was captured, {packing}, got {given}")
        pending.tell()
        leaves, spec = pytree.tree_flatten(args)
        if spec != self._args_spec:
            raise ValueError(f"args: expected the structure {self._args_spec}, got {spec}")
        with torch.no_grad(), _on(self._device):
            self._forward.z0.copy_(packing.pack(z0, "z0"))
            for index, (static, leaf) in enumerate(zip(self._args, leaves, strict=True)):
                _copy_in(static, leaf, index)
        backward, record = self._backward, BackwardRecord()
        self._call += 1
        if backward is None or not torch.is_grad_enabled():
            with torch.no_grad():
                value = self._replay()
        else:
            inputs = self._current_inputs(leaves, backward.inputs)
            value = _Replay.apply(self, record, *inputs)
        fields = self._report(self._forward, extra=backward is not None or self._forward.extra)
        warn_of_forward(self._forward.rows, self._forward.inconsistent, relative=True, wait=True)
        return CapturedSolution(**fields, record=record, value=packing.unpack(value))

    def _current_inputs(self, leaves: list[Any], inputs: Sequence[Tensor]) -> list[Tensor]:
        """What gradients go to: this call's arguments in place of the static ones."""
        mine = {id(static): leaf for static, leaf in zip(self._args, leaves, strict=True)}
        return [mine.get(id(tensor), tensor) for tensor in inputs]

    def _replay(self) -> Tensor:
        with _on(self._device):
            self._launch()
            return self._forward.z.clone()

    def _replay_backward(self, record: BackwardRecord, grad: Tensor) -> list[Tensor | None]:
        backward, launch = self._backward, self._launch_backward
        assert backward is not None
        assert launch is not None
        with _on(self._device):
            backward.grad.copy_(grad)
            launch()
            record.report = SolveReport(**self._report(backward.linear, extra=False))
            act_on_failure(self._on_failure, record.report, wait=True)
            return [None if g is None else g.clone() for g in backward.grads]

    def _report(self, solve: _StaticSolve, *, extra: bool) -> dict[str, Any]:
        rows = Rows(*(tensor.clone() for tensor in solve.rows))  # the next replay's own
        fields = report_fields(rows, solve.x.dtype, solve.solver.max_steps, None)
        if self.exits_early:
            fields["evaluations"] = fields["steps"].amax() if len(rows.status) else 1
        fields["evaluations"] += int(extra)
        return fields


class _StaticSolve:
    """The buffers of a solve, and its parts as functions that change them."""

    def __init__(self, problem: Problem, solver: Solver, frozen: Tensor | None = None):
        packing = problem.packing
        self.problem, self.solver, self.packing, self.frozen = problem, solver, packing, frozen
        size, device = (packing.batch, packing.dim), packing.device
        self.z0 = torch.zeros(size, dtype=packing.dtype, device=device)
        self.x = torch.zeros(size, dtype=packing.compute_dtype, device=device)
        self.same = packing.dtype == packing.compute_dtype
        self.z = self.x if self.same else torch.zeros_like(self.z0)  # the iterate as f sees it
        rows = Rows.start(size[0], device)
        self.state = solver.with_all_room(solver.initial_state(self.x, rows))
        self.context: Any = None
        self.extra = False  # whether `finish` evaluates f
        # f, for a look after the last step at rows that had ended before.
        self.latest = torch.zeros_like(self.z0) if size[0] > 1 else None
        self.inconsistent: Tensor | None = None

    @property
    def rows(self) -> Rows:
        rows: Rows = self.state.rows
        return rows

    def parts(
        self, last: Callable[[], None] | None, first: Callable[[], None] | None = None
    ) -> Parts:
        first = first or self.begin
        taken = torch.zeros_like(self.rows.remaining)
        return Parts(first, self.step, last, self.rows.remaining, self.solver.max_steps, taken)

    @torch.no_grad()
    def begin(self) -> None:
        self.x.copy_(self.z0)
        if not self.same or not self.packing.uniform:
            self._see(self.packing.cast(self.x))
        if self.problem.buffers is not None:
            self.problem.buffers.take()
        self.rows.restart(self.frozen)
        self.solver.reset(self.state, self.x)

    @torch.no_grad()
    def step(self) -> None:
        f = self.problem(self.z)
        if self.context is None:  # while warming up
            dtypes = self.problem.f_dtypes
            self.context = self.solver.context(self.x, self.packing.dtype, dtypes)
        if self.latest is not None:
            self.latest.copy_(f)
        z_next = self.context.nothing if self.same else self.z
        self.solver.advance(self.state, self.x, f, self.context, self.x, z_next)
        if not self.packing.uniform:
            self._see(self.packing.cast(self.z))
            self.x.copy_(self.z)

    @torch.no_grad()
    def finish(self) -> None:
        """After the last step: compare rows, and let modules note the solution."""
        buffers = self.problem.buffers
        if self.latest is not None:
            self.check(self.latest, self.rows.counters[:, STEPS].amax())
        if buffers is not None and buffers.waiting:
            self.extra = True
            with buffers.changing():
                self.problem.evaluate(self.z)

    def check(self, f: Tensor, evaluations: Tensor | None) -> None:
        """See :func:`check_frozen_rows`."""
        if self.latest is None or self.context is None:  # not before the first step
            return
        found = check_frozen_rows(
            self.rows,
            self.z,
            f,
            RelativeMeasure(self.context.limits.rtol, self.context.limits.atol),
            self.problem.rounding(),
            evaluations,
        )
        if self.inconsistent is None:
            self.inconsistent = torch.zeros((), dtype=torch.bool, device=f.device)
        self.inconsistent.fill_(False) if found is None else self.inconsistent.copy_(found)

    def _see(self, z: Tensor) -> None:
        self.z.copy_(z)


class _StaticBackward:
    """The evaluation at the solution, and the linear problem u = g + (df/dz)^T u there."""

    linear: _StaticSolve

    def __init__(self, problem: Problem, forward: _StaticSolve) -> None:
        self.problem, self.forward = problem, forward
        self.inputs: list[Tensor] = []  # leaves that f reaches: parameters and arguments
        self.grads: tuple[Tensor | None, ...] = ()
        self.grad = torch.zeros_like(forward.z0)  # the incoming one
        self.unit = torch.zeros_like(forward.z0)  # each row of it at unit size
        self.exponent = torch.zeros(len(self.grad), 1, device=self.grad.device)

    def make_linear(self, solver: Solver) -> None:
        zero = torch.zeros(len(self.unit), dtype=torch.bool, device=self.unit.device)
        packing, dtypes = Packing.of(self.unit), self.problem.f_dtypes
        # As in LinearSystem.problem; which product has signs must be known to the device alone.
        self.signs = torch.ones(len(self.unit), 1, dtype=self.unit.dtype, device=self.unit.device)
        self.flip = (1 - 2 * row_bits(self.unit)).prod(0)
        problem = Problem(self._image, (), packing, dtypes)
        self.linear = _StaticSolve(problem, solver, frozen=zero)

    def _image(self, u: Tensor) -> Tensor:
        if len(u) < 2:
            return self.unit + vector_jacobian(self.f, self.z, u)
        product = vector_jacobian(self.f, self.z, u * self.signs)
        image = torch.addcmul(self.unit, self.signs, product)
        self.signs.mul_(self.flip)
        return image

    @torch.enable_grad()
    def evaluate(self) -> None:
        """f at the solution, with its graph."""
        self.z = self.forward.z.clone().requires_grad_()
        buffers = self.problem.buffers
        with contextlib.nullcontext() if buffers is None else buffers.changing():
            self.f = self.problem.evaluate(self.z)
        with torch.no_grad():
            self.forward.check(self.f.detach(), None)

    @torch.no_grad()
    def begin(self) -> None:
        unit, self.exponent, zero = UnitGradient.of(self.grad)
        self.unit.copy_(unit)
        assert self.linear.frozen is not None
        self.linear.frozen.copy_(zero)
        self.signs.fill_(1)
        self.linear.z0.copy_(self.unit)
        self.linear.begin()

    def finish(self) -> None:
        self.linear.finish()
        u = scaled_back(self.linear.z, self.exponent)
        self.grads = torch.autograd.grad(
            self.f, self.inputs, u, retain_graph=True, allow_unused=True
        )

    def forget(self) -> None:
        """Let go of the graph of f, which no replay needs.

        It would keep the parameters' AccumulateGrad nodes alive, and with them the stream of this
        capture: every later backward would accumulate there, and none could be captured.
        """
        del self.f, self.z


class _Replay(torch.autograd.Function):
    """Forward and backward replay their graphs."""

    @staticmethod
    def forward(ctx: Any, captured: CapturedSolver, record: BackwardRecord, *inputs: Any) -> Tensor:
        ctx.captured, ctx.record, ctx.call = captured, record, captured._call
        ctx.versions = _versions(captured)
        return captured._replay()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        captured: CapturedSolver = ctx.captured
        if ctx.call != captured._call:
            raise RuntimeError(
                "deqcore.capture: the solver was called again before backward, and its buffers "
                "hold the later solve; run backward first, or capture a second solver"
            )
        if ctx.versions != _versions(captured):
            raise RuntimeError(
                "deqcore.capture: a parameter of f was changed in place between forward and "
                "backward; change parameters after backward"
            )
        return None, None, *captured._replay_backward(ctx.record, grad)


def _versions(captured: CapturedSolver) -> list[int]:
    assert captured._backward is not None
    static = {id(arg) for arg in captured._args}
    return [t._version for t in captured._backward.inputs if id(t) not in static]


def _static_copy(leaf: Any) -> Any:
    if not isinstance(leaf, Tensor):
        return leaf
    copy = torch.empty_like(leaf, requires_grad=leaf.requires_grad)
    with torch.no_grad():
        copy.copy_(leaf)
    return copy


def _copy_in(static: Any, leaf: Any, index: int) -> None:
    if not isinstance(static, Tensor):
        if static is not leaf and static != leaf:
            raise ValueError(f"args: leaf {index}: expected {static!r}, as captured, got {leaf!r}")
        return
    expected = (static.shape, static.dtype, static.device)
    if not isinstance(leaf, Tensor) or (leaf.shape, leaf.dtype, leaf.device) != expected:
        raise ValueError(f"args: leaf {index}: expected a tensor of {expected}, as captured")
    static.detach().copy_(leaf)


def _run_a_few_steps(solves: list[Parts]) -> None:
    for parts in solves:
        parts.first()
        for _ in range(WARM_UP_STEPS):
            parts.body()
        if parts.last is not None:
            parts.last()


def _on(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """Makes a GPU current; there is nothing to do for the CPU."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()
