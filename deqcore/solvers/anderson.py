"""Anderson acceleration: least-squares mixing of the last iterates."""

from __future__ import annotations

import abc

import torch
from torch import Tensor

from deqcore.ops import anderson_step as op
from deqcore.ops._rows import Limits, Rows
from deqcore.ops.anderson_step import AndersonNumbers, AndersonState
from deqcore.solvers._fused import FIRST_CAPACITY, FusedSolver, enlarged, next_capacity
from deqcore.solvers._options import (
    Damping,
    options,
    require_damping,
    require_int,
    require_number,
)
from deqcore.solvers.base import StepContext, countable

LARGE = 1 << 17  # elements of a state


class MixingSolver(FusedSolver):
    """The steps that Anderson and Picard share: one op, with or without mixing."""

    kernel = "DirectAnderson"

    @abc.abstractmethod
    def ring_size(self) -> int:
        """Stored residuals."""

    def needed(self) -> int:
        """The most residuals that a solve can store."""
        return min(self.ring_size(), self.max_steps)

    def new_state(self, x: Tensor, rows: Rows) -> AndersonState:
        batch, dim = x.shape
        capacity = min(FIRST_CAPACITY, self.needed())
        return AndersonState(
            g_ring=x.new_empty(batch, capacity, dim),
            h_ring=x.new_empty(batch, capacity, dim),
            gram=x.new_zeros(batch, capacity, capacity, dtype=torch.float64),
            best=x.new_empty(batch, 0),
            rows=rows,
        )

    def with_room(self, state: AndersonState, step: int) -> AndersonState:
        """With a slot for this step, and room for best iterates that leave the ring.

        A ring that has yet to grow has never come round, so a step's slot stays where it is. The
        room for best iterates is rarely needed, so it is made when it is.
        """
        capacity = state.g_ring.shape[1]
        if step <= capacity or state.best.shape[1]:
            return state
        if capacity < self.needed():
            return _with_slots(state, next_capacity(capacity, self.needed()))
        batch, _, dim = state.g_ring.shape
        if self._is_worth_a_look(state.g_ring) and not op.evicts_best(state):
            return state
        return state._replace(best=state.g_ring.new_empty(batch, dim))

    def _is_worth_a_look(self, ring: Tensor) -> bool:
        """Large states are; on a GPU it would wait for the device."""
        if not self.check_every:  # no value is looked at, and sizes may be symbols of a trace
            return False
        return ring.device.type == "cpu" and ring.shape[0] * ring.shape[2] > LARGE

    def with_all_room(self, state: AndersonState) -> AndersonState:
        state = _with_slots(state, self.needed())
        if self.max_steps <= self.ring_size():
            return state
        return state._replace(best=torch.empty_like(state.g_ring[:, 0]))

    def advance(
        self,
        state: AndersonState,
        x: Tensor,
        f: Tensor,
        context: StepContext,
        x_next: Tensor,
        z_next: Tensor,
    ) -> None:
        op.anderson_step(x, f, context.damping, state, x_next, z_next, context.options)

    def differentiable_step(
        self, state: AndersonState, x: Tensor, f: Tensor, step: int, context: StepContext
    ) -> tuple[AndersonState, Tensor]:
        state = self.with_room(state, step)
        return op.functional(x, f, context.damping, state, context.numbers)


@options
class Anderson(MixingSolver):
    """Anderson acceleration, type II, row by row.

    The next iterate is sum_i alpha_i (x_i + damping_i * g_i) over the last ``memory`` iterates,
    with weights that sum to one and minimise |sum_i alpha_i g_i|, g = f(x) - x.

    Args:
        memory: stored residuals, 1 to 64. Storage grows as steps are taken. D + 1 of them solve an
            affine map A z + b exactly if I - A is nonsingular and GMRES, whose iterates they mix,
            does not stagnate on it: in exact arithmetic, and without ridge or restarts (Walker & Ni
            2011, theorem 2.2; Toth & Kelley, SIAM J. Numer. Anal. 53, 2015).
        damping: in (0, 2]; a float, or a function of the step (1, 2, ...). Each stored iterate
            keeps the damping of the step it was stored at.
        ridge: added to the diagonal of the Gram matrix of residual differences after they are
            scaled to unit norm, so that its effect does not depend on the problem's scale.
        start: plain steps before mixing; only the last of them stays in the history.
        restart: clear the history every this many steps; None: never.
        safeguard: a mixed iterate whose residual is more than this times the best one is rejected:
            the row takes a plain step from its best iterate with an empty history. At least 1;
            inf: off.
        max_weight: larger mixing weights mean a degenerate history: the row then mixes only its
            last two iterates, or takes a plain step.
        rtol, atol, max_steps, patience, check_every, record_trace: see ``deqcore.Solver``.

    Raises:
        TypeError: an unknown option.
        ValueError: an option out of range.

    Source: Walker & Ni (2011), doi:10.1137/10078356X.
    """

    memory: int = 5
    damping: Damping = 1.0
    ridge: float = 1e-8
    start: int = 0
    restart: int | None = None
    safeguard: float = 2.0
    max_weight: float = 1e4

    def __post_init__(self) -> None:
        super().__post_init__()
        require_int(self, "memory", 1, op.MAX_MEMORY)
        require_damping(self)
        require_number(self, "ridge", 0.0, 1.0)
        require_int(self, "start", 0)
        if self.restart is not None:
            require_int(self, "restart", 1)
        require_number(self, "safeguard", 1.0)
        require_number(self, "max_weight", 1.0)

    def ring_size(self) -> int:
        return self.memory

    def numbers(self, limits: Limits) -> AndersonNumbers:
        return AndersonNumbers(
            limits=limits,
            ridge=self.ridge,
            start=countable(self.start),
            restart=countable(self.restart or 0),
            safeguard=self.safeguard,
            max_weight=self.max_weight,
        )


def _with_slots(state: AndersonState, capacity: int) -> AndersonState:
    batch, _, dim = state.g_ring.shape
    return state._replace(
        g_ring=enlarged(state.g_ring, batch, capacity, dim),
        h_ring=enlarged(state.h_ring, batch, capacity, dim),
        gram=enlarged(state.gram, batch, capacity, capacity),
    )
