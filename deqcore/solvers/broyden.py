"""Broyden's method with limited memory and restarts."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from deqcore.ops import broyden_step as op
from deqcore.ops._rows import HISTORY, STEPS, Limits, Rows
from deqcore.ops.broyden_step import BroydenNumbers, BroydenState
from deqcore.solvers._fused import FIRST_CAPACITY, FusedSolver, enlarged, next_capacity
from deqcore.solvers._options import (
    Damping,
    options,
    require_damping,
    require_history_dtype,
    require_int,
    storage_dtype,
)
from deqcore.solvers.base import StepContext


@options
class Broyden(FusedSolver):
    """Good Broyden method on g(x) = f(x) - x, started from the inverse -I, row by row.

    Args:
        memory: stored steps, 1 to 64; a row that has filled it restarts from where it is.
            Storage grows as steps are taken.
        damping: in (0, 2]; a float, or a function of the step (1, 2, ...).
        history_dtype: of the stored steps. None: the iterate's own, float32 or float64.
            ``torch.bfloat16`` halves the memory and the traffic of the history of a float32,
            bfloat16 or float16 state; each step is rounded before it is taken, and the iterate
            stays in float32. float16 is refused: its range would end the independence of scale.
        rtol, atol, max_steps, patience, check_every, record_trace: see ``deqcore.Solver``.

    Raises:
        TypeError: an unknown option.
        ValueError: an option out of range; in a solve, a float64 state with a ``history_dtype``.

    Source: Broyden (1965); in the form that stores steps only, Kelley (1995), section 7.3.
    """

    kernel = "DirectBroyden"

    memory: int = 30
    damping: Damping = 1.0
    history_dtype: torch.dtype | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        require_int(self, "memory", 1, op.MAX_MEMORY)
        require_damping(self)
        require_history_dtype(self)

    def numbers(self, limits: Limits) -> BroydenNumbers:
        return BroydenNumbers(limits, self.memory)

    def needed(self) -> int:
        """The most steps that a solve can store."""
        return min(self.memory, self.max_steps)

    def new_state(self, x: Tensor, rows: Rows) -> BroydenState:
        batch, dim = x.shape
        capacity = min(FIRST_CAPACITY, self.needed())
        return BroydenState(
            s_ring=x.new_empty(batch, capacity, dim, dtype=storage_dtype(self, x)),
            gram=x.new_zeros(batch, capacity, capacity, dtype=torch.float64),
            best=torch.empty_like(x),
            rows=rows,
        )

    def begin(self, x: Tensor) -> Any:
        history = super().begin(x)
        return history._replace(s_ring=history.s_ring.to(x.dtype))  # see differentiable_step

    def with_all_room(self, state: BroydenState) -> BroydenState:
        return _with_slots(state, self.needed())

    def advance(
        self,
        state: BroydenState,
        x: Tensor,
        f: Tensor,
        context: StepContext,
        x_next: Tensor,
        z_next: Tensor,
    ) -> None:
        op.broyden_step(x, f, context.damping, state, x_next, z_next, context.options)

    def differentiable_step(
        self, state: BroydenState, x: Tensor, f: Tensor, step: int, context: StepContext
    ) -> tuple[BroydenState, Tensor]:
        # Rounded as in `advance`, but kept in x's dtype: gradients then are not rounded as well.
        state, dtype = self.with_room(state, step), storage_dtype(self, x)
        return op.functional(x, f, context.damping, state, context.numbers, history_dtype=dtype)

    def with_room(self, state: BroydenState, step: int) -> BroydenState:
        """Grow the ring so that no row can run out: a row stores at most one step per step."""
        capacity = state.s_ring.shape[1]
        if min(step, self.needed()) <= capacity:
            return state
        return _with_slots(state, next_capacity(capacity, self.needed()))

    def inverse_transpose(self, state: BroydenState, v: Tensor) -> Tensor:
        """-H^T v for the inverse Jacobian H that the forward solve has built; v is [B, D].

        Approximates (I - df/dz)^-T v, the adjoint's solution (SHINE, arXiv 2106.00553, eq. 3).
        """
        count = state.rows.counters[:, HISTORY].long()
        steps = state.rows.counters[:, STEPS].long()
        damping = self.damping_table(v.device)
        out = v.double()
        for j in reversed(range(state.s_ring.shape[1] - 1)):
            complete = (j + 1 < count)[:, None]
            s, s_next = (torch.where(complete, state.s_ring[:, i], 0).double() for i in (j, j + 1))
            beta, beta_next = (_damping_at(damping, steps - count + i)[:, None] for i in (j, j + 1))
            size = torch.where(complete, (s * s).sum(1, keepdim=True), 1)
            u = (beta / beta_next * s_next + (beta - 1) * s) / size
            out = out + s * (u * out).sum(1, keepdim=True)
        return out.to(v.dtype)


def _with_slots(state: BroydenState, capacity: int) -> BroydenState:
    batch, _, dim = state.s_ring.shape
    return state._replace(
        s_ring=enlarged(state.s_ring, batch, capacity, dim),
        gram=enlarged(state.gram, batch, capacity, capacity),
    )


def _damping_at(table: Tensor, steps: Tensor) -> Tensor:
    return table[(steps - 1).clamp(0, len(table) - 1)]
