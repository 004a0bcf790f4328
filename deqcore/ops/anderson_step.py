"""One step of batched Anderson acceleration, type II: schema, oracle and the call of the kernel.

Phase 1 (push) reads x and f once: it stores the residual g = f - x and h = x + damping * g in ring
slots, and takes the new row of the Gram matrix and the norms in the same pass. Phase 2 (mix) solves
the m x m least-squares problem of each row and writes the next iterate, sum_i alpha_i h_i. Both
touch 2 * memory + 4 state-sized vectors in all.

Sources: Anderson (1965); Walker & Ni, SIAM J. Numer. Anal. 49 (2011), eq. 2.2, differences form.
Unlike them the columns are scaled to unit norm before the ridge is added, so that scaling the
problem scales the iterates and changes nothing else; columns that depend on newer ones are dropped.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from deqcore.ops import _rows
from deqcore.ops._library import call_step, define_step, unpack_numbers
from deqcore.ops._rows import (
    BEST,
    BEST_STEP,
    FALLBACK_STEP,
    HISTORY,
    LATEST,
    MIXED,
    STEPS,
    Limits,
    Rows,
)

MAX_MEMORY = 64
# A squared difference below this share of the two squared residuals is rounding.
NOISE = 1e-14
PIVOT = 1e-14  # a pivot of the unit-diagonal Gram matrix below this: a dependent column

define_step(
    "anderson_step",
    "(Tensor x, Tensor f, Tensor damping, Tensor(a!) g_ring, Tensor(b!) h_ring, Tensor(c!) gram, "
    "Tensor(d!) best, Tensor(e!) status, Tensor(f!) counters, Tensor(g!) residuals, "
    "Tensor(h!) remaining, Tensor(i!) x_next, Tensor(j!) z_next, Tensor options) -> ()",
    lambda *args: reference(*args),
)
_OP = torch.ops.deqcore.anderson_step.default


class AndersonNumbers(NamedTuple):
    """The op's numbers, in the order in which its tensor holds them."""

    limits: Limits
    ridge: float
    start: int
    restart: int  # 0: never
    safeguard: float
    max_weight: float


class AndersonState(NamedTuple):
    """History of a batch of rows; a ring slot is the row's step count modulo memory."""

    g_ring: Tensor  # [B, M, D] residuals f - x, float32 or float64
    h_ring: Tensor  # [B, M, D] x + damping * g
    gram: Tensor  # float64 [B, M, M], inner products of the residuals
    best: Tensor  # [B, D] best iterate once its slot was overwritten; [B, 0]: not needed yet
    rows: Rows


def anderson_step(
    x: Tensor,  # [B, D] current iterate, float32 or float64
    f: Tensor,  # [B, D] f at x as cast to f's dtype: float64, float32, bfloat16 or float16
    damping: Tensor,  # float64 [T] damping of step 1, 2, ...; the last one holds for later steps
    state: AndersonState,  # changed in place
    x_next: Tensor,  # [B, D] out: next iterate, or the row's value once it has ended; may be x
    z_next: Tensor,  # [B, D] out: x_next in f's dtype; empty where that is x's own dtype
    options: Tensor,  # float64 [9] on the CPU: `pack_numbers` of AndersonNumbers
) -> None:
    """Advance every active row by one step, in place, without waiting for the device.

    ``best`` may have no columns as long as no active row's best iterate sits in the slot that this
    step overwrites (see ``evicts_best``).
    """
    call_step(_OP, x, f, damping, *state[:4], *state.rows, x_next, z_next, options)


def evicts_best(state: AndersonState) -> bool:
    """Whether the next step overwrites an active row's best iterate (reads the device)."""
    counters = state.rows.counters
    age = counters[:, STEPS] + 1 - counters[:, BEST_STEP]
    doomed = (age == state.g_ring.shape[1]) & (counters[:, BEST_STEP] > 0)
    return bool((doomed & (state.rows.status == _rows.ACTIVE)).any())


def reference(
    x: Tensor,
    f: Tensor,
    damping: Tensor,
    g_ring: Tensor,
    h_ring: Tensor,
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
    state = AndersonState(g_ring, h_ring, gram, best, Rows(status, counters, residuals, remaining))
    numbers = unpack_numbers(AndersonNumbers, options)
    new, x_new = functional(x, f, damping, state, numbers)
    for old, value in zip((*state[:4], *state.rows), (*new[:4], *new.rows), strict=True):
        old.copy_(value)
    x_next.copy_(x_new)
    if z_next.shape == x_next.shape:
        z_next.copy_(x_new)


def functional(
    x: Tensor,
    f: Tensor,
    damping: Tensor,
    state: AndersonState,
    numbers: AndersonNumbers,
) -> tuple[AndersonState, Tensor]:
    """The same step without mutation: differentiable in x, f and the history."""
    memory = state.g_ring.shape[1]
    mixed = state.rows.counters[:, MIXED] >= 2
    rows, outcome, f, g = _rows.judge(state.rows, x, f, *numbers.limits, mixed)
    steps = rows.counters[:, STEPS]

    # Push. A slot's age is the number of steps since it was written.
    slots = torch.arange(memory, device=x.device)
    slot = (steps.long() - 1).clamp_min(0) % memory
    age = (slot[:, None] - slots) % memory  # [B, M]
    table = damping.to(x.dtype)
    beta = _damping_at(table, steps)
    best = _evict(state, table, outcome.active & (steps > memory), steps, slot)
    write = (outcome.active[:, None] & (age == 0))[..., None]
    g_ring = torch.where(write, g[:, None], state.g_ring)
    h_ring = torch.where(write, (x + beta[:, None] * g)[:, None], state.h_ring)

    # Which rows mix, over how many of their newest slots.
    history = torch.where(outcome.active, state.rows.counters[:, HISTORY] + 1, 0)
    fresh = (steps <= numbers.start) | _rows.rests(state.rows)
    if numbers.restart:
        fresh = fresh | ((steps - 1) % numbers.restart == 0)
    history = torch.where(fresh, 1, history).clamp_max(memory)
    # Of a row that retreats, and of older slots, nothing is used: but gradients would meet NaN.
    g_known = torch.where((age < history[:, None])[..., None], g_ring, 0)
    g_taken = torch.where(outcome.retreats[:, None], 0, g)
    gram = _new_gram(g_taken, g_known, state.gram, outcome.active, slot)
    rejected = _rejects(rows, outcome, mixed, numbers.safeguard)
    fallback = rejected | outcome.retreats
    history = torch.where(fallback, 0, history)
    alpha = _weights(gram, age, history, numbers.ridge, numbers.max_weight)  # float64 [B, M]

    # `where` and not a zero weight: an unused slot may hold NaN.
    used = (alpha != 0)[..., None]
    x_new = torch.where(used, h_ring, 0).mul(alpha.to(x.dtype)[..., None]).sum(1)
    best_x, best_h = _best_pair(rows, g_ring, h_ring, best, table, steps)
    x_new = torch.where(fallback[:, None], best_h, x_new)
    elsewhere = outcome.ended & ~outcome.improved & (rows.counters[:, BEST_STEP] > 0)
    x_new = torch.where(elsewhere[:, None], best_x, x_new)
    x_new = torch.where((outcome.going_on | elsewhere)[:, None], x_new, x)

    counters = rows.counters.clone()
    going_on = outcome.going_on
    counters[:, HISTORY] = torch.where(going_on, history, 0)
    counters[:, MIXED] = torch.where(going_on, (alpha != 0).sum(1), 0)
    fallen = torch.where(rejected, rows.counters[:, BEST_STEP], rows.counters[:, FALLBACK_STEP])
    counters[:, FALLBACK_STEP] = fallen
    rows = rows._replace(counters=counters)
    return AndersonState(g_ring, h_ring, gram, best, rows), x_new


def _damping_at(table: Tensor, steps: Tensor) -> Tensor:
    return table[(steps.long() - 1).clamp(0, len(table) - 1)]


def _slot_rows(ring: Tensor, slot: Tensor) -> Tensor:
    """ring [B, M, D], slot [B] -> the slot of each row, [B, D]."""
    return ring.gather(1, slot[:, None, None].expand(-1, 1, ring.shape[2])).squeeze(1)


def _evict(
    state: AndersonState, table: Tensor, full: Tensor, steps: Tensor, slot: Tensor
) -> Tensor:
    """Copy a best iterate out of the slot that is about to be overwritten: x = h - damping * g."""
    memory = state.g_ring.shape[1]
    if not state.best.shape[1]:
        return state.best
    best_step = state.rows.counters[:, BEST_STEP]
    doomed = full & (best_step == steps - memory)
    g, h = _slot_rows(state.g_ring, slot), _slot_rows(state.h_ring, slot)
    rebuilt = h - _damping_at(table, best_step)[:, None] * g
    return torch.where(doomed[:, None], rebuilt, state.best)


def _new_gram(g: Tensor, g_ring: Tensor, gram: Tensor, active: Tensor, slot: Tensor) -> Tensor:
    memory = g_ring.shape[1]
    dots = torch.stack([_rows.row_dot(g_ring[:, i], g) for i in range(memory)], dim=1)
    at = torch.arange(memory, device=g.device) == slot[:, None]
    gram = torch.where((active[:, None] & at)[:, :, None], dots[:, None, :], gram)
    return torch.where((active[:, None] & at)[:, None, :], dots[:, :, None], gram)


def _rejects(rows: Rows, outcome: _rows.Outcome, mixed: Tensor, limit: float) -> Tensor:
    """Rows whose mixed step made things worse: back to the best iterate, once for each best."""
    again = rows.counters[:, FALLBACK_STEP] == rows.counters[:, BEST_STEP]
    worse = rows.residuals[:, LATEST] > limit * rows.residuals[:, BEST]
    return outcome.going_on & mixed & worse & ~again


def _best_pair(
    rows: Rows, g_ring: Tensor, h_ring: Tensor, best: Tensor, table: Tensor, steps: Tensor
) -> tuple[Tensor, Tensor]:
    """The best iterate, and where a plain step from it leads.

    Once the best has left the ring, only the iterate is kept: the row goes back to it as it is.
    """
    memory = g_ring.shape[1]
    best_step = rows.counters[:, BEST_STEP]
    slot = (best_step.long() - 1).clamp_min(0) % memory
    h = _slot_rows(h_ring, slot)
    rebuilt = h - _damping_at(table, best_step)[:, None] * _slot_rows(g_ring, slot)
    if not best.shape[1]:
        return rebuilt, h
    kept = (steps - best_step < memory)[:, None]
    return torch.where(kept, rebuilt, best), torch.where(kept, h, best)


def _weights(gram: Tensor, age: Tensor, history: Tensor, ridge: float, max_weight: float) -> Tensor:
    """Mixing weights of the ring slots, float64 [B, M]; they sum to one, unused slots get 0.

    Minimises |g_0 - sum_i gamma_i c_i| over differences c_i = g_i - g_{i+1} of consecutive
    residuals (g_0 the newest), ridge relative to each |c_i|. Weights above ``max_weight`` mean that
    the history is degenerate: then only the newest difference is used, then none.
    """
    memory = gram.shape[1]
    order = age.argsort(1)  # slots from the newest to the oldest
    by_age = gram.gather(1, order[:, :, None].expand_as(gram))
    by_age = by_age.gather(2, order[:, None, :].expand_as(gram))
    ages = torch.arange(memory, device=gram.device)
    known = ages < history[:, None]
    by_age = torch.where(known[:, :, None] & known[:, None, :], by_age, 0)

    usable = ages[1:] < history[:, None]  # difference i uses ages i and i + 1
    gamma = _least_squares(by_age, usable, ridge)
    alpha = _to_weights(gamma)
    only_newest = usable & (ages[:-1] == 0)
    secant = _to_weights(_least_squares(by_age, only_newest, ridge))
    alpha = torch.where(_too_large(alpha, max_weight), secant, alpha)
    plain = (ages == 0).to(alpha.dtype).expand_as(alpha)
    alpha = torch.where(_too_large(alpha, max_weight), plain, alpha)
    alpha = torch.where(known, alpha, 0)
    return alpha.gather(1, age)  # back from ages to slots


def _too_large(alpha: Tensor, max_weight: float) -> Tensor:
    return ~(alpha.detach().abs() <= max_weight).all(1, keepdim=True)


def _to_weights(gamma: Tensor) -> Tensor:
    """gamma [B, M-1] -> alpha [B, M]: alpha_0 = 1 - gamma_0, alpha_i = gamma_{i-1} - gamma_i."""
    one = gamma.new_ones(gamma.shape[0], 1)
    zero = gamma.new_zeros(gamma.shape[0], 1)
    return torch.cat([one, gamma], 1) - torch.cat([gamma, zero], 1)


def _least_squares(by_age: Tensor, usable: Tensor, ridge: float) -> Tensor:
    """gamma [B, M-1] from the Gram matrix in order of age; 0 for columns that are not used.

    Right-looking Cholesky of the matrix scaled to unit diagonal, column after column.
    """
    top, bottom = by_age[:, :-1], by_age[:, 1:]
    normal = top[:, :, :-1] - top[:, :, 1:] - bottom[:, :, :-1] + bottom[:, :, 1:]
    size = normal.diagonal(dim1=1, dim2=2)
    norms = by_age.diagonal(dim1=1, dim2=2)
    usable = usable & (size > NOISE * (norms[:, :-1] + norms[:, 1:]))
    unit = torch.where(usable, size, 1).rsqrt()
    unit = torch.where(usable, unit, 0)
    rest = normal * unit[:, :, None] * unit[:, None, :] + ridge * torch.eye(
        normal.shape[1], dtype=normal.dtype, device=normal.device
    )
    right = (by_age[:, 0, :-1] - by_age[:, 0, 1:]) * unit

    columns, solved = [], []  # of the factor, and of L^-1 right
    for j in range(normal.shape[1]):
        pivot = rest[:, j, j]
        keep = usable[:, j] & (pivot > PIVOT)
        inverse = torch.where(keep, torch.where(keep, pivot, 1).rsqrt(), 0)
        column = rest[:, :, j] * inverse[:, None]  # rows above j are zero after their own step
        y = right[:, j] * inverse
        rest = rest - column[:, :, None] * column[:, None, :]
        right = right - column * y[:, None]
        columns.append(torch.where(torch.arange(normal.shape[1], device=y.device) > j, column, 0))
        solved.append((y, inverse))
    gamma: list[Tensor] = []  # from the last to the first
    for j in reversed(range(normal.shape[1])):
        y, inverse = solved[j]
        for i, value in zip(reversed(range(j + 1, normal.shape[1])), gamma, strict=False):
            y = y - columns[j][:, i] * value
        gamma.append(y * inverse)
    return torch.stack(gamma[::-1], 1) * unit if gamma else right
