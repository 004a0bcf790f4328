"""One step of batched limited-memory Broyden ("good"): schema, oracle and the call of the kernel.

For g(x) = f(x) - x and B_0 = -I, Broyden's inverse after steps s_0 .. s_n of damping beta_j is a
product that needs the steps alone (Kelley, "Iterative Methods for Linear and Nonlinear Equations",
1995, section 7.3, for beta = 1):

    -H_{n+1} = (I + (a_n s_{n+1} + b_n s_n) s_n^T) ... (I + (a_0 s_1 + b_0 s_0) s_0^T)
    a_j = beta_j / (beta_{j+1} |s_j|^2),    b_j = (beta_j - 1) / |s_j|^2

Inner products of steps with g come from one pass over the stored steps; the product is then
evaluated on their Gram matrix, in float64; a second pass adds up the next step. That is half the
memory of the usual U and V, and the same traffic. When the history is full the row restarts from
its current iterate with H = -I: overwriting the oldest pair instead makes the method diverge.

The history may be kept in bfloat16 beside a float32 iterate. A step is then rounded before it is
taken, not only before it is stored, so that what is stored is what happened and every secant
equation holds exactly; the rounding costs at most a factor of 2^-9 in what one step can gain.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from deqcore.ops import _rows
from deqcore.ops._library import call_step, define_step, unpack_numbers
from deqcore.ops._rows import BEST_STEP, HISTORY, MIXED, STEPS, Limits, Rows

MAX_MEMORY = 64
# A rank-one update that would stretch the step by more than this is singular: the row restarts.
MAX_GROWTH = 1e4

define_step(
    "broyden_step",
    "(Tensor x, Tensor f, Tensor damping, Tensor(a!) s_ring, Tensor(b!) gram, Tensor(c!) best, "
    "Tensor(d!) status, Tensor(e!) counters, Tensor(f!) residuals, Tensor(g!) remaining, "
    "Tensor(h!) x_next, Tensor(i!) z_next, Tensor options) -> ()",
    lambda *args: reference(*args),
)
_OP = torch.ops.deqcore.broyden_step.default


class BroydenNumbers(NamedTuple):
    """The op's numbers, in the order in which its tensor holds them."""

    limits: Limits
    memory: int  # most stored steps


class BroydenState(NamedTuple):
    """Steps of a batch of rows since their last restart, oldest first."""

    s_ring: Tensor  # [B, C, D] steps s_j, in x's dtype or, for a float32 x, in bfloat16;
    # C grows to memory as it is needed
    gram: Tensor  # float64 [B, C, C], inner products of the steps
    best: Tensor  # [B, D] iterate with the smallest residual
    rows: Rows


def broyden_step(
    x: Tensor,  # [B, D] current iterate, float32 or float64
    f: Tensor,  # [B, D] f at x as cast to f's dtype: float64, float32, bfloat16 or float16
    damping: Tensor,  # float64 [T] damping of step 1, 2, ...; the last one holds for later steps
    state: BroydenState,  # changed in place
    x_next: Tensor,  # [B, D] out: next iterate, or the row's value once it has ended; may be x
    z_next: Tensor,  # [B, D] out: x_next in f's dtype; empty where that is x's own dtype
    options: Tensor,  # float64 [5] on the CPU: `pack_numbers` of BroydenNumbers
) -> None:
    """Advance every active row by one step, in place, without waiting for the device.

    ``s_ring`` must have a free slot for every active row that has not yet stored ``memory`` steps.
    """
    call_step(_OP, x, f, damping, *state[:3], *state.rows, x_next, z_next, options)


def reference(
    x: Tensor,
    f: Tensor,
    damping: Tensor,
    s_ring: Tensor,
    gram: Tensor,
    best: Tensor,
    status: Tensor,
    counters: Tensor,
    residuals: Tensor,
    remaining: Tensor,
    x_next: Tensor,
    z_next: Tensor,
    options: Tensor,
) -> None:
    """The op in pure PyTorch, on any device."""
    wide = s_ring.to(x.dtype)
    state = BroydenState(wide, gram, best, Rows(status, counters, residuals, remaining))
    numbers = unpack_numbers(BroydenNumbers, options)
    new, x_new = functional(x, f, damping, state, numbers, history_dtype=s_ring.dtype)
    s_ring.copy_(new.s_ring)
    for old, value in zip((*state[1:3], *state.rows), (*new[1:3], *new.rows), strict=True):
        old.copy_(value)
    x_next.copy_(x_new)
    if z_next.shape == x_next.shape:
        z_next.copy_(x_new)


def functional(
    x: Tensor,
    f: Tensor,
    damping: Tensor,
    state: BroydenState,
    numbers: BroydenNumbers,
    *,
    history_dtype: torch.dtype | None = None,
) -> tuple[BroydenState, Tensor]:
    """The same step without mutation: differentiable in x, f and the history.

    ``state.s_ring`` has x's dtype here, and steps are rounded to ``history_dtype``, by default that
    one; gradients pass through the rounding as if it were not there, in x's dtype.
    """
    capacity = state.s_ring.shape[1]
    mixed = state.rows.counters[:, MIXED] >= 1
    rows, outcome, _, g = _rows.judge(state.rows, x, f, *numbers.limits, mixed)
    going_on = outcome.going_on
    steps_on = going_on & ~outcome.retreats
    g = torch.where(outcome.retreats[:, None], 0, g)  # unused; but gradients would meet its NaN
    best = torch.where((outcome.improved & going_on)[:, None], x, state.best)
    count = torch.where(steps_on, state.rows.counters[:, HISTORY], 0)
    restarts = (count >= numbers.memory) | _rows.rests(state.rows)
    count = torch.where(restarts, 0, count)
    beta = _damping_at(damping, rows.counters[:, STEPS])

    stored = torch.arange(capacity, device=x.device) < count[:, None]  # [B, C]
    s_ring = torch.where(stored[..., None], state.s_ring, 0)
    gram = _new_gram(s_ring, stored, state.gram, count)
    weights, scale_g, singular = _inverse_weights(s_ring, g, gram, stored, count, damping, rows)
    count = torch.where(singular, 0, count)
    stored = stored & ~singular[:, None]
    weights = torch.where(stored, weights, 0)
    scale_g = torch.where(singular, 1.0, scale_g)

    step = (beta * scale_g).to(x.dtype)[:, None] * g
    mixed = torch.where(stored[..., None], s_ring, 0)
    step = step + (mixed * (beta[:, None] * weights).to(x.dtype)[..., None]).sum(1)
    if history_dtype not in (None, x.dtype):
        # Exact: a number and its rounding are close enough for both sums to need no rounding.
        step = step + (step.detach().to(history_dtype).to(x.dtype) - step.detach())
    write = (torch.arange(capacity, device=x.device) == count[:, None]) & steps_on[:, None]
    s_ring = torch.where(write[..., None], step[:, None], state.s_ring)
    x_new = torch.where(steps_on[:, None], x + step, x)
    elsewhere = outcome.ended & ~outcome.improved & (rows.counters[:, BEST_STEP] > 0)
    x_new = torch.where((elsewhere | outcome.retreats)[:, None], best, x_new)

    counters = rows.counters.clone()
    counters[:, MIXED] = count
    stored_steps = torch.where(outcome.retreats, 0, count + 1)
    counters[:, HISTORY] = torch.where(going_on, stored_steps, state.rows.counters[:, HISTORY])
    rows = rows._replace(counters=counters)
    return BroydenState(s_ring, gram, best, rows), x_new


def _damping_at(table: Tensor, steps: Tensor) -> Tensor:
    return table[(steps.long() - 1).clamp(0, len(table) - 1)]


def _new_gram(s_ring: Tensor, stored: Tensor, gram: Tensor, count: Tensor) -> Tensor:
    """Add the row and column of the newest step, slot count - 1, to the Gram matrix."""
    capacity = s_ring.shape[1]
    newest = (count - 1).clamp_min(0).long()
    last = s_ring.gather(1, newest[:, None, None].expand(-1, 1, s_ring.shape[2])).squeeze(1)
    dots = torch.stack([_rows.row_dot(s_ring[:, j], last) for j in range(capacity)], 1)
    at = (torch.arange(capacity, device=gram.device) == newest[:, None]) & (count > 0)[:, None]
    gram = torch.where(at[:, :, None] & stored[:, None, :], dots[:, None, :], gram)
    return torch.where(at[:, None, :] & stored[:, :, None], dots[:, :, None], gram)


def _inverse_weights(
    s_ring: Tensor,
    g: Tensor,
    gram: Tensor,
    stored: Tensor,
    count: Tensor,
    damping: Tensor,
    rows: Rows,
) -> tuple[Tensor, Tensor, Tensor]:
    """-H g = scale_g * g + sum_j weights_j s_j; and the rows whose newest update is singular."""
    capacity = s_ring.shape[1]
    device = g.device
    dots = torch.stack([_rows.row_dot(s_ring[:, j], g) for j in range(capacity)], 1)
    table = torch.where(stored[:, :, None] & stored[:, None, :], gram, 0)
    size = table.diagonal(dim1=1, dim2=2)
    inverse_size = torch.where(size > 0, torch.where(size > 0, size, 1).reciprocal(), 0)
    # Step j was taken count - j evaluations ago, each with the damping of its own evaluation.
    ages = count[:, None] - torch.arange(capacity + 1, device=device)
    betas = _damping_at(damping, rows.counters[:, STEPS, None] - ages)

    weights = torch.zeros_like(dots)
    index = torch.arange(capacity, device=device)
    newest = index == count[:, None] - 1
    for j in range(capacity - 1):
        complete = j + 1 < count  # the update of step j also needs step j + 1
        w = dots[:, j] + (weights * table[:, j]).sum(1)
        w = torch.where(complete, w, 0) * inverse_size[:, j]
        a, b = betas[:, j] / betas[:, j + 1] * w, (betas[:, j] - 1) * w
        weights = weights + torch.where(index == j, b[:, None], 0)
        weights = weights + torch.where(index == j + 1, a[:, None], 0)
    w = (dots + (weights[:, None, :] * table).sum(2)).mul(newest).sum(1)
    last_beta = torch.where(count > 0, (betas[:, :-1] * newest).sum(1), 1)
    w = w * (inverse_size * newest).sum(1)  # s . q / |s|^2
    left = 1 - last_beta * w
    singular = (count > 0) & ~(left.detach().abs() * MAX_GROWTH >= 1)
    left = torch.where(singular, 1, left)
    scale_g = 1 / left
    own = (last_beta - 1) * w / left
    return weights * scale_g[:, None] + torch.where(newest, own[:, None], 0), scale_g, singular
