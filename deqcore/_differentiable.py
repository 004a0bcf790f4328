"""The iteration out of functional steps, so that autograd can follow it, or a trace."""

from __future__ import annotations

import copy

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils import _pytree as pytree
from torch.utils.checkpoint import checkpoint

from deqcore._loop import Problem, Run, Solved
from deqcore._parametrized import uncached
from deqcore._randomness import Draws
from deqcore._transforms import refuse_mapped, values_are_unknown
from deqcore.dropout import masks_of_solve, solve_of
from deqcore.ops._rows import BEST_STEP
from deqcore.solvers import Solver


def differentiable_solve(
    problem: Problem, z0: Tensor, solver: Solver, checkpoint_every: int | None
) -> Solved:
    """The same iteration out of functional steps, so that autograd can follow it.

    ``checkpoint_every`` steps at a time are recomputed in backward instead of stored.
    """
    run = Run(problem, z0, solver, None, differentiable=True)
    for first in range(1, solver.max_steps + 1, checkpoint_every or solver.max_steps):
        last = min(first + (checkpoint_every or solver.max_steps), solver.max_steps + 1)
        if checkpoint_every and torch.is_grad_enabled():
            _checkpointed_steps(run, range(first, last))
        else:
            _differentiable_steps(run, range(first, last))
    with torch.no_grad():
        unknown = values_are_unknown(z0)
        solved = run.solved(None if unknown else run.latest)
        if unknown:
            solved.measure = None
    if run.first is not None:
        solved.value = _with_a_gradient(solved, run.first)
    return solved


def _with_a_gradient(solved: Solved, first: Tensor) -> Tensor:
    """The value, where it is z0 itself with the gradient of the first plain step [B, D]."""
    if not torch.is_grad_enabled() and forward_ad._current_level < 0:
        return solved.value
    z0 = solved.value.detach() + (first - first.detach()).to(solved.value.dtype)
    at_start = solved.rows.counters[:, BEST_STEP, None] == 1
    return torch.where(at_start, z0, solved.value)


def _differentiable_steps(run: Run, steps: range) -> None:
    draws_from = run.draws_from()
    for step in steps:
        if step == draws_from and step > 1:
            run.draws = Draws(run.x.device)
        # The first step of an empty batch gives its value a graph, as other adjoints do.
        needed = step == 1 and torch.is_grad_enabled()
        if run.solver.check_every and not needed and not run.rows.remaining.item():
            return
        f = run.problem(run.z)
        refuse_mapped(run.x, f)
        run.begin()
        run.end_rows()
        if step == 1:
            run.first = torch.lerp(run.x, f.to(run.x.dtype), run.context.damping[0].to(run.x.dtype))
        run.state, run.x = run.solver.differentiable_step(run.state, run.x, f, step, run.context)
        run.seen(run.x.to(run.packing.dtype))
        run.latest = f.detach()


def _checkpointed_steps(run: Run, steps: range) -> None:
    """Take the steps as a function of tensors, which autograd may call again in backward."""

    def segment(*leaves: Tensor) -> tuple[Tensor, ...]:
        part = copy.copy(run)
        part.take(pytree.tree_unflatten(list(leaves), spec))
        part.taken = steps.start - 1  # in backward, too
        with uncached(), solve_of(masks):
            _differentiable_steps(part, steps)
        parts[:] = [part]
        out, out_specs[0] = pytree.tree_flatten(part.tensors())
        return tuple(out)

    masks = masks_of_solve()
    out_specs: list[pytree.TreeSpec | None] = [None]
    parts: list[Run] = []
    leaves, spec = pytree.tree_flatten(run.tensors())
    out = checkpoint(segment, *leaves, use_reentrant=False)
    assert out_specs[0] is not None
    run.take(pytree.tree_unflatten(list(out), out_specs[0]))
    part = parts.pop()
    run.latest, run.taken, run.test, run.context = part.latest, part.taken, part.test, part.context
    run.draws = part.draws
