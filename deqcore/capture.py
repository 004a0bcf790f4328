"""``capture``: a whole solve, early exit included, as one CUDA graph.

The solve consists of three parts, each captured by torch: one that resets the state, one step, and,
where gradients are wanted, an evaluation of f that keeps its graph. They are joined into one graph
in which a conditional node repeats the step while a row is active, so that the host queues a solve
with a single call. The adjoint's linear solve becomes a second graph of the same form.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from deqcore._graphs import CudaGraphs, Parts
from deqcore._loop import Problem
from deqcore._notices import pending, warn_where
from deqcore._outcome import CapturedReport, CapturedSolution
from deqcore._packing import Packing
from deqcore._solution import BackwardRecord, Solution
from deqcore._static_solve import StaticBackward, StaticSolve
from deqcore._transforms import refuse_mapped
from deqcore.adjoints import Adjoint, Implicit
from deqcore.adjoints._linear import graph_leaves
from deqcore.adjoints._system import failure_messages, raise_in_backward
from deqcore.adjoints._twice import not_again
from deqcore.dropout import solve_of
from deqcore.solvers import Anderson, Solver
from deqcore.sparse.dense_weights import SolveWeights

WARM_UP_STEPS = 2  # the first one writes what later ones read
_TWICE = (
    "deqcore.capture: the gradient of a gradient is not supported; use deqcore.fixed_point, or "
    "ImplicitLayer(capture=False), where you need second derivatives"
)
LOOK_EVERY = 16  # replays between two looks at what is to be warned of, and at each of the first


def capture(
    f: Callable[..., Any],
    z0: Any,
    *args: Any,
    solver: Solver = Anderson(),
    adjoint: Adjoint = Implicit(),
    batch: Literal["rows", "coupled"] = "rows",
) -> CapturedSolver:
    """Record ``fixed_point(f, z0, *args)`` as a CUDA graph, to be replayed with new inputs.

    A replay costs the host one call, whatever the number of steps, and ends when the last row does.
    Its results are those of ``fixed_point``, bit for bit where f runs the same kernels when it
    is captured.

    Args:
        f: as in ``fixed_point``, and capturable: no copies to the host, no shapes that depend
            on data. Randomness in f repeats itself in every evaluation and replay, and so does the
            mask of ``deqcore.FixedDropout``. Parameters of f may be changed in place between
            replays (an optimiser does), but not replaced.
        z0, *args: examples of the inputs, on one GPU. Later inputs must have their structure,
            shapes and dtypes; what is not a tensor is part of f. In grad mode, gradients reach the
            tensors of ``args`` that require grad here, and the parameters of f.
        solver: as in ``fixed_point``; ``check_every`` does not matter to the steps, and
            ``record_trace`` is refused.
        adjoint: ``Implicit`` without ``reuse_forward``, where gradients are wanted; its
            ``on_failure`` may not be ``"fallback"``, and ``"raise"`` waits for the GPU.
        batch: as in ``fixed_point``.

    Returns:
        A ``CapturedSolver``. Memory for all steps is held as long as it lives.

    Raises:
        ValueError: z0 is not on a GPU, or an option cannot be captured.
        RuntimeError: the CUDA kernels are missing, or f cannot be captured.

    What ``fixed_point`` checks with ``batch="rows"`` is checked here too, on the device, at the
    cost of a copy of f(z) for each step of a batch, and of two products with signs for each step in
    backward; warnings come with one of the next 16 calls (never with ``check_every=0``, as there).

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
    stand_ins: Mapping[Tensor, Tensor] | None = None,
    check: Callable[[], None] = lambda: None,
) -> CapturedSolver:
    """``stand_ins``: tensors that f uses in place of its parameters, each with the parameter.

    ``check`` is called between the evaluations that warm up and those that are recorded.
    """
    packing = Packing.of(z0, batch)
    recorder.check(packing.device)
    if solver.record_trace:
        raise ValueError("capture: record_trace=True needs a solve that is not captured")
    cached = torch.is_autocast_cache_enabled()
    torch.set_autocast_cache_enabled(False)  # it would outlive the graph's memory
    try:
        return CapturedSolver(f, z0, args, packing, solver, adjoint, recorder, stand_ins, check)
    finally:
        torch.set_autocast_cache_enabled(cached)


class CapturedSolver:
    """A recorded solve; made by ``capture``.

    ``solver(z0, *args)`` copies the inputs in, replays, and returns a new ``Solution``. The
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
        stand_ins: Mapping[Tensor, Tensor] | None = None,
        check: Callable[[], None] = lambda: None,
    ) -> None:
        self._packing, self._device = packing, packing.device
        leaves, self._args_spec = pytree.tree_flatten(args)
        self._calls = 0  # the buffers hold the last
        self._pending: weakref.ref[Tensor] | None = None  # what the last call's node has saved
        # Masks of its own: that they are drawn shows that f is random.
        with _on(self._device), recorder.set_up(), solve_of({}):
            self._args = [_static_copy(leaf) for leaf in leaves]
            problem = Problem(f, pytree.tree_unflatten(self._args, self._args_spec), packing)
            if problem.buffers is not None:
                problem.buffers.remember()
            self._forward = StaticSolve(problem, solver, weights=SolveWeights())
            self._forward.z0.copy_(packing.pack(z0, "z0").detach())
            self._backward: StaticBackward | None = None
            if torch.is_grad_enabled():
                self._backward = StaticBackward(problem, self._forward)
            self._has_gradient = self._backward is not None and self._make_backward(
                self._backward, adjoint, stand_ins
            )
            self._record(recorder, check)
            if problem.buffers is not None:
                problem.buffers.recall()
        self.exits_early = recorder.exits_early

    def _make_backward(
        self, backward: StaticBackward, adjoint: Adjoint, stand_ins: Mapping[Tensor, Tensor] | None
    ) -> bool:
        """Whether f reaches anything that wants a gradient."""
        self._forward.begin()
        backward.evaluate()
        leaves = {id(leaf): leaf for leaf in graph_leaves(backward.f) if leaf is not backward.z}
        backward.inputs = list(leaves.values())
        if not backward.inputs:
            return False
        own: dict[int, int | Tensor] = {id(tensor): i for i, tensor in enumerate(self._args)}
        if stand_ins is not None:
            own |= {id(tensor): parameter for tensor, parameter in stand_ins.items()}
            if any(id(leaf) not in own for leaf in backward.inputs):
                raise ValueError(
                    "f reaches tensors that want gradients and are neither its parameters nor its "
                    "arguments"
                )
        self._originals = [own.get(id(leaf), leaf) for leaf in backward.inputs]
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
        return True

    def _record(self, recorder: Any, check: Callable[[], None]) -> None:
        forward, backward = self._forward, self._backward
        last = forward.finish if backward is None else backward.evaluate
        parts = [forward.parts(last)]
        if backward is not None and self._has_gradient:
            end = _without_autocast(self._device, backward.finish)
            linear = backward.linear.parts(end, first=backward.begin)
            parts.append(linear._replace(body=_without_autocast(self._device, linear.body)))
        recorder.warm_up(lambda: _run_a_few_steps(parts))
        check()
        self._launch = recorder.record(parts[0])
        self._launch_backward = recorder.record(parts[1]) if len(parts) > 1 else None
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
        leaves, spec = pytree.tree_flatten(args)
        if spec != self._args_spec:
            raise ValueError(f"args: expected the structure {self._args_spec}, got {spec}")
        for index, (static, leaf) in enumerate(zip(self._args, leaves, strict=True)):
            _check_like(static, leaf, index)
        return self.replay(z0, leaves)

    def replay(self, z0: Any, leaves: Sequence[Any]) -> CapturedSolution:
        """Solve from ``z0`` (None: the one before) with these leaves of the arguments."""
        pending.tell()
        with torch.no_grad(), _on(self._device):
            if z0 is not None:
                self._forward.z0.copy_(self._packing.pack(z0, "z0"))
            for static, leaf in zip(self._args, leaves, strict=True):
                if isinstance(static, Tensor):
                    static.copy_(leaf)
        record = BackwardRecord()
        self._calls += 1
        self._pending = None
        if self._has_gradient and torch.is_grad_enabled():
            value = _Replay.apply(self, record, *self._current_inputs(leaves))
        else:
            with torch.no_grad():
                value = self._replay()
        self._tell(self._forward, self._forward.messages)
        report = self._report(self._forward, record)
        return CapturedSolution(self._packing.unpack(value, apart=True), report)

    @property
    def history_bytes(self) -> int:
        """Of what the solvers remember of earlier steps, forward and backward."""
        solves = [self._forward]
        if self._backward is not None and self._has_gradient:
            solves.append(self._backward.linear)
        return sum(t.nbytes for solve in solves for t in pytree.tree_leaves(solve.state))

    @property
    def awaits_backward(self) -> bool:
        """Whether a backward pass may still want what the buffers hold.

        Autograd frees what a node has saved when no other pass through it is to come.
        """
        return self._pending is not None and self._pending() is not None

    def _current_inputs(self, leaves: Sequence[Any]) -> list[Tensor]:
        """What gradients go to: this call's arguments and f's parameters, not what stands in."""
        return [leaves[own] if isinstance(own, int) else own for own in self._originals]

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
            record.report = self._report(backward.linear, BackwardRecord())
            if self._on_failure == "raise":
                raise_in_backward(record.report)
            elif self._on_failure == "warn":
                self._tell(backward.linear, failure_messages("warn"))
            there = [g for g in backward.grads if g is not None]
            copies = [torch.empty_like(g) for g in there]
            if there:
                torch._foreach_copy_(copies, there)
            made = iter(copies)
            return [None if g is None else next(made) for g in backward.grads]

    def _tell(self, solve: StaticSolve, messages: tuple[str, ...]) -> None:
        """Warn of what has come up since the last look; on a GPU not each time, and later."""
        if self._device.type == "cuda":
            late = self._calls > 4 and self._calls % LOOK_EVERY
            if late or not solve.solver.check_every:
                return
        warn_where(solve.flags, messages)
        solve.flags.zero_()

    def _report(self, solve: StaticSolve, record: BackwardRecord) -> CapturedReport:
        more = 0
        if solve is self._forward:
            more = int(self._backward is not None or solve.extra)
        fixed = None if self.exits_early else solve.solver.max_steps
        return CapturedReport(solve.outcome.clone(), solve.layout, record, more, fixed)


class _Replay(torch.autograd.Function):
    """Forward and backward replay their graphs."""

    @staticmethod
    def forward(ctx: Any, captured: CapturedSolver, record: BackwardRecord, *inputs: Any) -> Tensor:
        ctx.captured, ctx.record, ctx.call = captured, record, captured._calls
        ctx.versions = _versions(captured)
        token = torch.empty(0)
        ctx.save_for_backward(token)
        captured._pending = weakref.ref(token)
        return captured._replay()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        ctx.saved_tensors  # noqa: B018  (raises if the graph was freed)
        refuse_mapped(grad)
        captured: CapturedSolver = ctx.captured
        if ctx.call != captured._calls:
            raise RuntimeError(
                "deqcore.capture: the solver was called again before backward, and its buffers "
                "hold the later solve; run backward first, or capture a second solver"
            )
        if ctx.versions != _versions(captured):
            raise RuntimeError(
                "deqcore.capture: a parameter of f was changed in place between forward and "
                "backward; change parameters after backward"
            )
        with torch.no_grad():
            grads = captured._replay_backward(ctx.record, grad.detach())
        if torch.is_grad_enabled():
            grads = [g if g is None else not_again(_TWICE, g, grad) for g in grads]
        return None, None, *grads


def _versions(captured: CapturedSolver) -> list[int]:
    return [own._version for own in captured._originals if isinstance(own, Tensor)]


def _static_copy(leaf: Any) -> Any:
    if not isinstance(leaf, Tensor):
        return leaf
    copy = torch.empty_like(leaf, requires_grad=leaf.requires_grad)
    with torch.no_grad():
        copy.copy_(leaf)
    return copy


def _check_like(static: Any, leaf: Any, index: int) -> None:
    if not isinstance(static, Tensor):
        if static is not leaf and static != leaf:
            raise ValueError(f"args: leaf {index}: expected {static!r}, as captured, got {leaf!r}")
        return
    expected = (static.shape, static.dtype, static.device)
    if not isinstance(leaf, Tensor) or (leaf.shape, leaf.dtype, leaf.device) != expected:
        raise ValueError(f"args: leaf {index}: expected a tensor of {expected}, as captured")


def _without_autocast(device: torch.device, part: Callable[[], None]) -> Callable[[], None]:
    """Backward passes run outside of it, whatever the forward pass did."""

    def run() -> None:
        with torch.autocast(device.type, enabled=False):
            part()

    return run


def _run_a_few_steps(solves: list[Parts]) -> None:
    for parts in solves:
        parts.first()
        for _ in range(WARM_UP_STEPS):
            parts.body()
        if parts.last is not None:
            parts.last()


def _on(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """Makes a GPU current, if it is not."""
    if device.type != "cuda" or device.index == torch.cuda.current_device():
        return _NOTHING
    return torch.cuda.device(device)


_NOTHING = contextlib.nullcontext()
