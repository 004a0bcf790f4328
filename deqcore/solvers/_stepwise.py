"""The loop's part of a step, in PyTorch, around a solver that gives ``begin`` and ``step`` alone.

Counting, tolerances, statuses, the best iterate, and rows that have ended: the fused ops do all
this inside their kernels.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from deqcore.ops import _rows
from deqcore.ops._rows import BEST_STEP, STEPS, Rows

if TYPE_CHECKING:
    from deqcore.solvers.base import Solver, StepContext


class StepwiseState(NamedTuple):
    """A solver's history, and what the loop keeps of each row."""

    history: Any  # pytree of tensors [B, ...]
    best: Tensor  # [B, D] iterate with the smallest residual
    rows: Rows


def initial_state(solver: Solver, x: Tensor, rows: Rows) -> StepwiseState:
    history = solver.begin(x)
    for leaf in pytree.tree_leaves(history):
        if not isinstance(leaf, Tensor) or leaf.dim() == 0 or leaf.shape[0] != x.shape[0]:
            got = f"shape {tuple(leaf.shape)}" if isinstance(leaf, Tensor) else repr(leaf)
            raise ValueError(
                f"{type(solver).__name__}.begin: expected tensors with {len(x)} rows in dim 0, got "
                f"{got}; keep numbers that all rows share as options of the solver"
            )
    # Memory of its own: the loop may change x, and `advance` changes the history, in place.
    return StepwiseState(pytree.tree_map(torch.clone, history), torch.zeros_like(x), rows)


def copy_into(old: Any, new: Any) -> None:
    """Copy the tensors of one pytree into those of another of its structure."""
    for target, source in zip(pytree.tree_leaves(old), pytree.tree_leaves(new), strict=True):
        target.copy_(source)


def step(
    solver: Solver, state: StepwiseState, x: Tensor, f: Tensor, context: StepContext
) -> tuple[StepwiseState, Tensor]:
    """One evaluation of f, judged, and the solver's step for the rows that go on."""
    from deqcore.solvers.base import StepInfo

    rows, outcome, f, _ = _rows.judge(state.rows, x, f, *context.limits)
    going_on = outcome.going_on[:, None]
    best = torch.where(outcome.improved[:, None], x, state.best)
    steps = rows.counters[:, STEPS, None].long()
    last = len(context.damping) - 1
    info = StepInfo(
        steps=steps,
        damping=context.damping[(steps - 1).clamp(0, last)].to(x.dtype),
        residual=rows.residuals[:, _rows.LATEST, None],
        improved=outcome.improved[:, None],
        context=context,
    )
    # Zeros for the others: a NaN there would reach gradients, whatever is taken of the result.
    history = pytree.tree_map(lambda leaf: _where(going_on, leaf, 0), state.history)
    x_seen, f = torch.where(going_on, x, 0), torch.where(going_on, f, 0)
    history, x_new = solver.step(history, x_seen, f, info)
    _check(solver, state.history, x, history, x_new)
    history = pytree.tree_map(lambda new, old: _where(going_on, new, old), history, state.history)
    elsewhere = outcome.ended & ~outcome.improved & (rows.counters[:, BEST_STEP] > 0)
    x_new = torch.where(going_on, x_new, torch.where(elsewhere[:, None], best, x))
    return StepwiseState(history, best, rows), x_new


def _where(rows: Tensor, a: Tensor, b: Tensor | int) -> Tensor:  # bool [B, 1], [B, ...]
    return torch.where(rows.view(-1, *[1] * (a.dim() - 1)), a, b)


def _check(solver: Solver, before: Any, x: Tensor, history: Any, x_new: Any) -> None:
    where = f"{type(solver).__name__}.step"
    if not isinstance(x_new, Tensor) or (x_new.shape, x_new.dtype) != (x.shape, x.dtype):
        raise ValueError(
            f"{where}: expected a next iterate of shape {tuple(x.shape)} in {x.dtype}, got "
            f"{_described(x_new)}"
        )
    old, spec = pytree.tree_flatten(before)
    new, new_spec = pytree.tree_flatten(history)
    if new_spec != spec:
        raise ValueError(f"{where}: expected the history's structure, {spec}, got {new_spec}")
    for a, b in zip(old, new, strict=True):
        if not isinstance(b, Tensor) or (a.shape, a.dtype) != (b.shape, b.dtype):
            raise ValueError(
                f"{where}: expected a history like that of begin, {_described(a)}, got "
                f"{_described(b)}"
            )


def _described(value: Any) -> str:
    if not isinstance(value, Tensor):
        return repr(value)
    return f"shape {tuple(value.shape)} in {value.dtype}"
