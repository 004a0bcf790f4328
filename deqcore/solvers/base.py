"""What a solver is: its options, and the contract between it and the loop."""

from __future__ import annotations

import abc
from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from deqcore.ops import _rows
from deqcore.ops._library import constant, pack_numbers
from deqcore.ops._rows import Limits, Rows
from deqcore.solvers import _stepwise
from deqcore.solvers._direct import DirectSteps
from deqcore.solvers._options import Damping, options, require_bool, require_int, require_number

MOST_STEPS = 2**31 - 1  # what an op counts up to; a larger option means the same as this one


def countable(steps: int) -> int:
    """As many of them as an op counts."""
    return min(steps, MOST_STEPS)


class StepContext(NamedTuple):
    """What all steps of a solve share, made once f has been called for the first time.

    Attributes:
        damping: float64 [T] on the state's device; the last entry holds for all later steps.
        limits: tolerances and limits.
        numbers: these and the solver's own options, as its op's oracle takes them.
        options: the same as the op takes them, float64 on the CPU.
        dtype: of the state as f sees it.
        nothing: an empty tensor, for an op's output that is not wanted.
        direct: takes steps of a solver that has an op without the dispatcher, where it can.
    """

    damping: Tensor
    limits: Limits
    numbers: Any
    options: Tensor
    dtype: torch.dtype
    nothing: Tensor
    direct: DirectSteps | None = None


class StepInfo(NamedTuple):
    """What ``Solver.step`` is told of each row; a column [B, 1] each, to multiply [B, D] with.

    Attributes:
        steps: int64, evaluations of f so far: 1 at a row's first step.
        damping: the solver's option ``damping`` at this step, in the iterate's dtype; 1 without.
        residual: float64, rms(f(z) - z) of this evaluation.
        improved: bool, whether that is the row's smallest so far.
        context: to be handed on, by a solver that is made of another one.
    """

    steps: Tensor
    damping: Tensor
    residual: Tensor
    improved: Tensor
    context: StepContext

    @staticmethod
    def dot(a: Tensor, b: Tensor) -> Tensor:
        """Inner product of each row of a and b [B, D]: float64 [B, 1].

        Summed in an order that depends on D alone. ``Tensor.sum`` may take another one when the
        batch is smaller, and a row would then depend on its batch-mates.
        """
        return _rows.row_dot(a, b)[:, None]


@options
class Solver(abc.ABC):
    """Base class of ``Picard``, ``Anderson``, ``Broyden`` and of your own solvers.

    A solver gives its options, ``begin`` and ``step``; ``examples/own_solver.py`` is one.
    Its options are the fields of a frozen dataclass that inherits those below, checked in
    ``__post_init__`` (which calls this one's):

        @dataclass(frozen=True, kw_only=True)
        class Momentum(deqcore.Solver):
            momentum: float = 0.5

            def begin(self, x):
                return x

            def step(self, before, x, f, info):
                return x, x + info.damping * (f - x) + self.momentum * (x - before)

    The loop owns all else: it calls f, measures the residual, compares it with the tolerances,
    counts, ends each row by itself with a status, freezes what has ended, and returns the iterate
    with the smallest residual that was measured. A field ``damping``, a number or a function of the
    step, reaches ``step`` as a number for each row.

    Norms are roots of sums of squares in float64. Of a float64 state they are meant for values
    between about 1e-150 and 1e150: a row whose sum of squares exceeds 1.8e308 ends as NONFINITE,
    and a residual below 1e-162 counts as 0, which meets any tolerance. Scale such a problem. States
    in other dtypes cannot get there.

    Args:
        rtol: relative tolerance; a row has converged when
            ``rms(f(z) - z) <= atol + rtol * rms(f(z))``. None: 1e-4, or the machine epsilon of the
            state's dtype, of what f returns or of autocast where that is larger: no bfloat16 state
            reaches 1e-4. Where f leaves autocast for float32, pass what it can reach.
        atol: absolute tolerance, in the units of the state.
        max_steps: the most calls of f.
        patience: a row has stalled when its best residual is this many steps old. ``Anderson`` and
            ``Broyden`` first go back to their best iterate and take as many plain steps from there.
        check_every: steps between two looks at whether all rows have ended; on a GPU the answer is
            awaited one look late. 0: never look, run ``max_steps``.
        record_trace: keep the residual after every step in ``Solution.trace``.
    """

    rtol: float | None = None
    atol: float = 1e-6
    max_steps: int = 50
    patience: int = 25
    check_every: int = 1
    record_trace: bool = False

    def __post_init__(self) -> None:
        if self.rtol is not None:
            require_number(self, "rtol", 0.0)
        require_number(self, "atol", 0.0)
        require_int(self, "max_steps", 1)
        require_int(self, "patience", 1)
        require_int(self, "check_every", 0)
        require_bool(self, "record_trace")

    @abc.abstractmethod
    def begin(self, x: Tensor) -> Any:
        """What the solver remembers before the first step.

        Args:
            x: the first iterate, [B, D] in float32 or float64 (half-precision states are iterated
                in float32).

        Returns:
            A tensor or a pytree of tensors with rows in dim 0, of sizes that no step changes.
        """

    @abc.abstractmethod
    def step(self, history: Any, x: Tensor, f: Tensor, info: StepInfo) -> tuple[Any, Tensor]:
        """Where to go from ``x``.

        It must change nothing in place, treat every row by itself, be differentiable where
        ``Unrolled`` is wanted, and wait for no value (``.item()``, ``if tensor``) where the solve
        is captured as a CUDA graph. It sees zeros in place of rows that have ended.

        Args:
            history: what ``begin``, or the step before, has returned.
            x: iterate [B, D].
            f: f(x), [B, D] in x's dtype.
            info: count, damping and residual of each row.

        Returns:
            (history, next iterate [B, D] in x's dtype).
        """

    def relative_tolerance(self, *dtypes: torch.dtype) -> float:
        """``rtol``, or its default for a state and an f of these dtypes."""
        if self.rtol is not None:
            return self.rtol
        return max([1e-4, *(torch.finfo(dtype).eps for dtype in dtypes)])

    def damping_table(self, device: torch.device) -> Tensor:
        """float64 [T]: one entry for a constant, ``max_steps`` for a function of the step."""
        damping: Damping = getattr(self, "damping", 1.0)
        if not callable(damping):
            if device.type == "cpu":
                return constant((damping,))
            # Filled there: a copy from the host would wait for a GPU.
            return torch.full((1,), damping, dtype=torch.float64, device=device)
        values = [float(damping(step)) for step in range(1, self.max_steps + 1)]
        for step, value in enumerate(values, start=1):
            if not 0 < value <= 2:
                raise ValueError(
                    f"{type(self).__name__}: damping({step}) must be above 0 and at most 2, "
                    f"got {value!r}"
                )
        table = torch.tensor(values, dtype=torch.float64)
        if device.type == "cuda":
            table = table.pin_memory()
        return table.to(device, non_blocking=True)

    def context(
        self, x: Tensor, dtype: torch.dtype, f_dtypes: Iterable[torch.dtype]
    ) -> StepContext:
        """For iterates like ``x``, which f sees as ``dtype`` and computes in ``f_dtypes``."""
        rtol = self.relative_tolerance(dtype, *f_dtypes)
        limits = Limits(rtol, self.atol, countable(self.patience), countable(self.max_steps))
        numbers = self.numbers(limits)
        return StepContext(
            damping=self.damping_table(x.device),
            limits=limits,
            numbers=numbers,
            options=pack_numbers(numbers),
            dtype=dtype,
            nothing=x.new_empty(0),
            direct=self.direct_steps(x, dtype),
        )

    def without_tolerance(self, context: StepContext) -> StepContext:
        """``context`` with which a step ends no row as converged, not even at a residual of 0."""
        limits = context.limits._replace(rtol=0.0, atol=-1.0)
        numbers = self.numbers(limits)
        return context._replace(limits=limits, numbers=numbers, options=pack_numbers(numbers))

    def direct_steps(self, x: Tensor, dtype: torch.dtype) -> DirectSteps | None:
        """For iterates like ``x``, which f sees as ``dtype``; None where there are none."""
        return None

    # What the loop calls, made of `begin` and `step`. A solver whose op does the loop's part too
    # (`_fused.FusedSolver`) has its own. `state` is a NamedTuple of tensors with a field `rows`.

    def numbers(self, limits: Limits) -> Any:
        """The numbers of a step, a NamedTuple: its op's, if it has one."""
        return limits

    def initial_state(self, x: Tensor, rows: Rows, *, differentiable: bool = False) -> Any:
        """State for iterates like ``x`` [B, D]; for ``differentiable_step`` with finite memory."""
        return _stepwise.initial_state(self, x, rows)

    def reset(self, state: Any, x: Tensor) -> None:
        """Make ``state`` one that starts from ``x``, in place; the loop has reset its rows."""
        _stepwise.copy_into(state.history, self.begin(x))

    def take_step(
        self, state: Any, x: Tensor, f: Tensor, step: int, context: StepContext
    ) -> tuple[Any, Tensor, Tensor]:
        """(state, next iterate, next iterate in f's dtype); the rows are changed in place.

        ``step`` is 1 for the first evaluation.
        """
        rows = state.rows
        new, x_next = self.differentiable_step(state, x, f, step, context)
        _stepwise.copy_into(rows, new.rows)  # the loop watches these tensors
        return new._replace(rows=rows), x_next, x_next.to(context.dtype)

    def with_all_room(self, state: Any) -> Any:
        """``state`` with all the memory that ``max_steps`` steps could need."""
        return state

    def advance(
        self, state: Any, x: Tensor, f: Tensor, context: StepContext, x_next: Tensor, z_next: Tensor
    ) -> None:
        """A step whose state has room, into the caller's buffers; ``x_next`` may be ``x``."""
        new, x_new = self.differentiable_step(state, x, f, 0, context)
        _stepwise.copy_into(state, new)
        x_next.copy_(x_new)
        if z_next.shape == x_next.shape:
            z_next.copy_(x_new)

    def differentiable_step(
        self, state: Any, x: Tensor, f: Tensor, step: int, context: StepContext
    ) -> tuple[Any, Tensor]:
        """(new state, next iterate) without mutation, by differentiable PyTorch operations."""
        return _stepwise.step(self, state, x, f, context)
