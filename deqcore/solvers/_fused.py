"""Solvers whose op does the loop's part of a step too: counts, statuses, the best iterate."""

from __future__ import annotations

import abc
import dataclasses
from typing import Any, ClassVar

import torch
from torch import Tensor

from deqcore.ops._rows import Rows, count_active
from deqcore.solvers._buffers import step_outputs
from deqcore.solvers._direct import DirectSteps, direct_steps
from deqcore.solvers.base import MOST_STEPS, Solver, StepContext, StepInfo

FIRST_CAPACITY = 8  # slots of a history before any step was taken


class FusedSolver(Solver):
    """``Picard``, ``Anderson`` and ``Broyden``: the loop calls their ops instead of ``step``.

    Attributes:
        kernel: the class of ``deqcore._C`` that takes steps without the dispatcher.
    """

    kernel: ClassVar[str]

    @abc.abstractmethod
    def new_state(self, x: Tensor, rows: Rows) -> Any:
        """The op's state for iterates like ``x``; memory that it writes first may hold anything."""

    @abc.abstractmethod
    def with_room(self, state: Any, step: int) -> Any:
        """``state`` with the memory that this step could need."""

    @abc.abstractmethod
    def with_all_room(self, state: Any) -> Any: ...

    @abc.abstractmethod
    def advance(
        self, state: Any, x: Tensor, f: Tensor, context: StepContext, x_next: Tensor, z_next: Tensor
    ) -> None: ...

    @abc.abstractmethod
    def differentiable_step(
        self, state: Any, x: Tensor, f: Tensor, step: int, context: StepContext
    ) -> tuple[Any, Tensor]: ...

    def direct_steps(self, x: Tensor, dtype: torch.dtype) -> DirectSteps | None:
        return direct_steps(self.kernel, x, dtype)

    def initial_state(self, x: Tensor, rows: Rows, *, differentiable: bool = False) -> Any:
        state = self.new_state(x, rows)
        return _finite(state) if differentiable else state

    def reset(self, state: Any, x: Tensor) -> None:
        """Nothing: an op reads no more of a history than its rows have counted."""

    def take_step(
        self, state: Any, x: Tensor, f: Tensor, step: int, context: StepContext
    ) -> tuple[Any, Tensor, Tensor]:
        state = self.with_room(state, step)
        x_next, z_next = step_outputs(x, context)
        direct, damping, options = context.direct, context.damping, context.options
        if direct is None or not direct.take(state, x, f, damping, options, x_next, z_next):
            self.advance(state, x, f, context, x_next, z_next)
        return state, x_next, x_next if context.dtype == x.dtype else z_next

    def begin(self, x: Tensor) -> Any:
        """All that the op keeps of each row, for a solver that is made of this one."""
        rows = Rows.start(len(x), x.device)
        roomy = dataclasses.replace(self, max_steps=MOST_STEPS)  # its steps are the other one's
        state = _finite(roomy.with_all_room(roomy.new_state(x, rows)))
        return state._replace(rows=rows[:-1])  # without `remaining`, which is no row's

    def step(self, history: Any, x: Tensor, f: Tensor, info: StepInfo) -> tuple[Any, Tensor]:
        """One step of the op's oracle, with the tolerances and limits of ``info``."""
        status, counters, residuals = history.rows
        rows = Rows(status, counters, residuals, count_active(status))
        context = info.context._replace(
            damping=self.damping_table(x.device),
            numbers=self.numbers(info.context.limits),
        )
        state, x_next = self.differentiable_step(history._replace(rows=rows), x, f, 1, context)
        return state._replace(rows=state.rows[:-1]), x_next


def next_capacity(capacity: int, needed: int) -> int:
    """Slots of a history that has ``capacity`` of them and in the end may need ``needed``."""
    # Half as much again: the copies stay a small share of the traffic, and the peak low.
    return min(needed, capacity + capacity // 2)


def enlarged(old: Tensor, *sizes: int) -> Tensor:
    """A tensor of ``sizes`` with ``old`` in its first corner."""
    # Autograd multiplies even what `where` leaves out, so it must see finite memory.
    grad = torch.is_grad_enabled()
    new = old.new_zeros(sizes) if grad else old.new_empty(sizes)
    new[tuple(slice(size) for size in old.shape)] = old
    return new


def _finite(state: Any) -> Any:
    """Without uninitialised memory: autograd multiplies even what `where` leaves out."""
    zeros = {name: torch.zeros_like(t) for name, t in state._asdict().items() if name != "rows"}
    return state._replace(**zeros)
