"""The per-row state machine of a solve, in PyTorch; ``csrc/ops/rows.h`` is the same in C++.

A row is active until it converges, stalls, diverges, meets a NaN or uses up its steps; from then on
it is frozen bit for bit. Only plain steps can fail: where a row has mixed since its best iterate,
what would end it as STALLED, DIVERGED or NONFINITE sends it back there instead (a retreat), to go
on with plain steps alone until they improve on that iterate, and for a while after.

Everything here is a tensor on the state's device: nothing waits for it.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from deqcore._status import Status

ACTIVE = -1  # a row that is still being solved; never seen by users

# Columns of `counters`, int32 [B, COUNTERS].
STEPS, HISTORY, BEST_STEP, FALLBACK_STEP, MIXED = range(5)
# The newest step that mixed (0: none since the last retreat), the step of the last retreat, and how
# many steps after it are plain at least.
LAST_MIXED, RETREAT_STEP, REST = range(5, 8)
COUNTERS = 8
# Columns of `residuals`, float64 [B, 3].
LATEST, BEST, FIRST = range(3)

DIVERGENCE = 1e8  # a residual this many times the first one ends the row
# After a retreat a row rests from mixing this many times the evaluations that were lost by it, and
# this many times its last rest where mixing has gained less than that since: so a row that mixing
# does not help loses a share of its steps to it that shrinks to nothing.
REST_FACTOR = 4
LONGEST_REST = 1 << 30
SUM_BLOCK = 128


class Limits(NamedTuple):
    """What ends a row; the first of every op's numbers."""

    rtol: float
    atol: float
    patience: int  # steps
    max_steps: int


class Rows(NamedTuple):
    """Status and counters of a batch of rows; every step op changes them in place."""

    status: Tensor  # int8 [B]
    counters: Tensor  # int32 [B, COUNTERS]
    residuals: Tensor  # float64 [B, 3]
    remaining: Tensor  # int32 [1], rows still active

    @classmethod
    def start(cls, batch: int, device: torch.device, frozen: Tensor | None = None) -> Rows:
        """All rows active, except those of ``frozen`` (bool [B]), which count as converged."""
        status, counters, residuals, remaining = _at_start(batch)
        rows = cls(
            torch.full((batch,), status, dtype=torch.int8, device=device),
            torch.full((batch, COUNTERS), counters, dtype=torch.int32, device=device),
            torch.full((batch, 3), residuals, dtype=torch.float64, device=device),
            torch.full((1,), remaining, dtype=torch.int32, device=device),
        )
        rows._freeze(frozen)
        return rows

    def restart(self, frozen: Tensor | None = None) -> None:
        """Set all to what ``start`` makes, in place."""
        for tensor, value in zip(self, _at_start(len(self.status)), strict=True):
            tensor.fill_(value)
        self._freeze(frozen)

    def _freeze(self, frozen: Tensor | None) -> None:
        if frozen is None:
            return
        self.status.masked_fill_(frozen, int(Status.CONVERGED))
        self.residuals.masked_fill_(frozen[:, None], 0.0)
        self.remaining.copy_(count_active(self.status))


def _at_start(batch: int) -> tuple[int, int, float, int]:
    return ACTIVE, 0, torch.inf, batch


def count_active(status: Tensor) -> Tensor:
    """int32 [1], the rows that go on."""
    return (status == ACTIVE).sum(dtype=torch.int32).reshape(1)


class Outcome(NamedTuple):
    """What one evaluation means for each row; bool [B] each."""

    active: Tensor  # the row was active and its evaluation counts
    going_on: Tensor  # and it still is: it takes another step
    improved: Tensor  # its residual is the best so far
    ended: Tensor  # it ended now, without converging: it returns its best iterate
    retreats: Tensor  # it goes on from its best iterate, with nothing stored


def row_sum(values: Tensor) -> Tensor:
    """Sum over the last dimension in an order that depends on its length alone.

    ``Tensor.sum`` splits a reduction over threads when there is a single output, so that a row
    would depend on its batch-mates; blocks of fixed size do not.
    """
    padding = -values.shape[-1] % SUM_BLOCK
    blocks = F.pad(values, (0, padding)).unflatten(-1, (-1, SUM_BLOCK))
    return blocks.sum(-1).sum(-1)


def row_dot(a: Tensor, b: Tensor) -> Tensor:
    """Inner products over the last dimension, accumulated in float64."""
    return row_sum(a.double() * b.double())


def rms(sum_of_squares: Tensor, dim: int) -> Tensor:
    return (sum_of_squares / max(dim, 1)).sqrt()


def judge(
    rows: Rows,
    x: Tensor,
    f: Tensor,
    rtol: float,
    atol: float,
    patience: int,
    max_steps: int,
    mixed: Tensor | None = None,
) -> tuple[Rows, Outcome, Tensor, Tensor]:
    """Count one evaluation of f at x [B, D] as cast to f's dtype.

    ``mixed``, bool [B]: whether the step to x was other than plain; None: of no row.

    Returns:
        (rows, what it means for each, f and the residual g = f - x in x's dtype).
    """
    z = x.to(f.dtype).to(x.dtype)
    f = f.to(x.dtype)
    g = f - z
    residual = rms(row_dot(g.detach(), g.detach()), x.shape[1])
    scale = rms(row_dot(f.detach(), f.detach()), x.shape[1])
    rows, outcome = advance(rows, residual, scale, rtol, atol, patience, max_steps, mixed)
    return rows, outcome, f, g


def advance(
    rows: Rows,
    residual: Tensor,
    scale: Tensor,
    rtol: float,
    atol: float,
    patience: int,
    max_steps: int,
    mixed: Tensor | None = None,
) -> tuple[Rows, Outcome]:
    """Count one evaluation, of rms(f(z) - z) = ``residual`` and rms(f(z)) = ``scale``, [B]."""
    active = rows.status == ACTIVE
    steps = rows.counters[:, STEPS] + active.int()
    finite = active & residual.isfinite() & scale.isfinite()
    first = torch.where(active & (steps == 1), residual, rows.residuals[:, FIRST])

    converged = finite & (residual <= atol + rtol * scale)
    improved = converged | (finite & (residual < rows.residuals[:, BEST]))
    best_step = torch.where(improved, steps, rows.counters[:, BEST_STEP])
    best = torch.where(improved | (active & (best_step == 0)), residual, rows.residuals[:, BEST])

    last_mixed = rows.counters[:, LAST_MIXED]
    if mixed is not None:
        last_mixed = torch.where(active & mixed, steps - 1, last_mixed)
    can_retreat = (last_mixed > 0) & (last_mixed >= best_step)
    idle = steps - torch.maximum(best_step, rows.counters[:, RETREAT_STEP])
    failure = torch.where(finite & (idle >= patience), int(Status.STALLED), ACTIVE)
    diverged = finite & (residual > DIVERGENCE * first)
    failure = torch.where(diverged, int(Status.DIVERGED), failure)
    failure = torch.where(active & ~finite, int(Status.NONFINITE), failure)
    failed = active & ~converged & (failure != ACTIVE)

    status = torch.where(active & (steps >= max_steps), int(Status.MAX_STEPS), rows.status)
    status = torch.where(failed & ~can_retreat, failure, status)
    status = torch.where(converged, int(Status.CONVERGED), status).to(torch.int8)
    going_on = status == ACTIVE
    retreats = going_on & failed

    latest = torch.where(active, residual, rows.residuals[:, LATEST])
    counters = rows.counters.clone()
    counters[:, STEPS] = steps
    counters[:, BEST_STEP] = best_step
    counters[:, LAST_MIXED] = torch.where(retreats, 0, last_mixed)
    counters[:, REST] = torch.where(retreats, _rest(counters), counters[:, REST])
    counters[:, RETREAT_STEP] = torch.where(retreats, steps, counters[:, RETREAT_STEP])
    outcome = Outcome(active, going_on, improved, active & ~going_on & ~converged, retreats)
    residuals = torch.stack([latest, best, first], dim=1)
    return Rows(status, counters, residuals, count_active(status)), outcome


def _rest(counters: Tensor) -> Tensor:
    """How long a row that retreats now has to rest from mixing, [B]."""
    steps, best_step, last_retreat, last_rest = (
        counters[:, column].long() for column in (STEPS, BEST_STEP, RETREAT_STEP, REST)
    )
    rest = REST_FACTOR * (steps - best_step)
    gained = best_step - (last_retreat + last_rest)
    longer = torch.maximum(rest, REST_FACTOR * last_rest)
    return torch.where(gained < rest, longer, rest).clamp_max(LONGEST_REST).int()


def rests(rows: Rows) -> Tensor:
    """bool [B]: the coming step has to be plain."""
    counters = rows.counters.long()
    resting = counters[:, STEPS] < counters[:, RETREAT_STEP] + counters[:, REST]
    return resting | (counters[:, RETREAT_STEP] > counters[:, BEST_STEP])
