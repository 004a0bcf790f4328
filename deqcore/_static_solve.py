"""A solve and its gradient in buffers of their own, as parts that a recorder joins."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from deqcore._checks import COUPLED, GROWN, RelativeMeasure, check_frozen_rows, grown
from deqcore._graphs import Parts
from deqcore._loop import Problem
from deqcore._outcome import Layout
from deqcore._packing import Packing
from deqcore.adjoints._linear import UnitGradient, scaled_back, vector_jacobian
from deqcore.adjoints._system import FAILURES, row_bits
from deqcore.ops._rows import STEPS, Rows
from deqcore.solvers import Solver
from deqcore.sparse.dense_weights import SolveWeights


class StaticSolve:
    """The buffers of a solve, and its parts as functions that change them.

    Attributes:
        outcome: how the rows ended, laid out as ``layout`` says.
        flags: bool, whether one of ``messages`` is due since the flags were last cleared.
        extra: whether ``finish`` evaluates f.
    """

    def __init__(
        self,
        problem: Problem,
        solver: Solver,
        frozen: Tensor | None = None,
        weights: SolveWeights | None = None,
    ):
        packing = problem.packing
        self.problem, self.solver, self.packing, self.frozen = problem, solver, packing, frozen
        self.weights = weights
        size, device = (packing.batch, packing.dim), packing.device
        self.z0 = torch.zeros(size, dtype=packing.dtype, device=device)
        self.x = torch.zeros(size, dtype=packing.compute_dtype, device=device)
        self.same = packing.dtype == packing.compute_dtype
        self.z = self.x if self.same else torch.zeros_like(self.z0)  # the iterate as f sees it
        rows = Rows.start(size[0], device)
        self.state = solver.with_all_room(solver.initial_state(self.x, rows))
        self.context: Any = None
        self.extra = False
        # f, for a look after the last step at rows that had ended before.
        self.latest = torch.zeros_like(self.z0) if size[0] > 1 else None
        self.inconsistent: Tensor | None = None
        self.layout = Layout(size[0], packing.compute_dtype)
        self.outcome = self.layout.new(device)
        self.failures = torch.tensor(FAILURES, dtype=torch.int8).to(device)
        self.flags = torch.zeros(2 if frozen is None else len(FAILURES), device=device).bool()

    @property
    def rows(self) -> Rows:
        rows: Rows = self.state.rows
        return rows

    @property
    def messages(self) -> tuple[str, str]:
        """Those of ``note``."""
        return COUPLED, GROWN

    def parts(
        self, last: Callable[[], None] | None, first: Callable[[], None] | None = None
    ) -> Parts:
        first = first or self.begin
        taken = torch.zeros_like(self.rows.remaining)
        return Parts(first, self.step, last, self.rows.remaining, self.solver.max_steps, taken)

    @torch.no_grad()
    def begin(self) -> None:
        if self.weights is not None:
            self.weights.fill()
        self.x.copy_(self.z0)
        if not self.same or not self.packing.uniform:
            self._see(self.packing.cast(self.x))
        if self.problem.buffers is not None:
            self.problem.buffers.take()
        self.rows.restart(self.frozen)
        self.solver.reset(self.state, self.x)

    @torch.no_grad()
    def step(self) -> None:
        with contextlib.nullcontext() if self.weights is None else self.weights.used():
            f = self.problem(self.z)
        if self.context is None:  # while warming up
            dtypes = self.problem.f_dtypes
            self.context = self.solver.context(self.x, self.packing.dtype, dtypes)
        if self.latest is not None:
            self.latest.copy_(f)
        z_next = self.context.nothing if self.same else self.z
        self.solver.advance(self.state, self.x, f, self.context, self.x, z_next)
        if not self.packing.uniform:
            self._see(self.packing.cast(self.z))
            self.x.copy_(self.z)

    @torch.no_grad()
    def finish(self) -> None:
        """After the last step: compare rows, and let modules note the solution."""
        buffers = self.problem.buffers
        if self.latest is not None:
            self.check(self.latest, self.rows.counters[:, STEPS].amax())
        if buffers is not None and buffers.waiting:
            self.extra = True
            with buffers.changing():
                self.problem.evaluate(self.z)
        self.note()

    def check(self, f: Tensor, evaluations: Tensor | None) -> None:
        """See ``check_frozen_rows``."""
        if self.latest is None or self.context is None:  # not before the first step
            return
        found = check_frozen_rows(
            self.rows,
            self.z,
            f,
            RelativeMeasure(self.context.limits.rtol, self.context.limits.atol),
            self.problem.rounding(),
            evaluations,
        )
        if self.inconsistent is None:
            self.inconsistent = torch.zeros((), dtype=torch.bool, device=f.device)
        self.inconsistent.fill_(False) if found is None else self.inconsistent.copy_(found)

    def note(self) -> None:
        """Write down how the rows ended, and what is to be warned of."""
        self.layout.note(self.outcome, self.rows)
        if self.frozen is None:
            if self.inconsistent is not None:
                self.flags[0].logical_or_(self.inconsistent)
            self.flags[1].logical_or_(grown(self.rows))
        else:
            self.flags.logical_or_((self.rows.status[:, None] == self.failures).any(0))

    def _see(self, z: Tensor) -> None:
        self.z.copy_(z)


class StaticBackward:
    """The evaluation at the solution, and the linear problem u = g + (df/dz)^T u there."""

    linear: StaticSolve

    def __init__(self, problem: Problem, forward: StaticSolve) -> None:
        self.problem, self.forward = problem, forward
        self.inputs: list[Tensor] = []  # leaves that f reaches: parameters and arguments
        self.grads: tuple[Tensor | None, ...] = ()
        self.grad = torch.zeros_like(forward.z0)  # the incoming one
        self.unit = torch.zeros_like(forward.z0)  # each row of it at unit size
        self.exponent = torch.zeros(len(self.grad), 1, device=self.grad.device)

    def make_linear(self, solver: Solver) -> None:
        zero = torch.zeros(len(self.unit), dtype=torch.bool, device=self.unit.device)
        packing, dtypes = Packing.of(self.unit), self.problem.f_dtypes
        # As in LinearSystem.problem; which product has signs must be known to the device alone.
        self.signs = torch.ones(len(self.unit), 1, dtype=self.unit.dtype, device=self.unit.device)
        self.flip = (1 - 2 * row_bits(self.unit)).prod(0)
        problem = Problem(self._image, (), packing, dtypes)
        self.linear = StaticSolve(problem, solver, frozen=zero)

    def _image(self, u: Tensor) -> Tensor:
        if len(u) < 2:
            return self.unit + vector_jacobian(self.f, self.z, u)
        product = vector_jacobian(self.f, self.z, u * self.signs)
        image = torch.addcmul(self.unit, self.signs, product)
        self.signs.mul_(self.flip)
        return image

    @torch.enable_grad()
    def evaluate(self) -> None:
        """f at the solution, with its graph."""
        self.z = self.forward.z.clone().requires_grad_()
        buffers, weights = self.problem.buffers, self.forward.weights
        with (
            contextlib.nullcontext() if buffers is None else buffers.changing(),
            contextlib.nullcontext() if weights is None else weights.used(),
        ):
            self.f = self.problem.evaluate(self.z)
        with torch.no_grad():
            self.forward.check(self.f.detach(), None)
            self.forward.note()

    @torch.no_grad()
    def begin(self) -> None:
        unit, self.exponent, zero = UnitGradient.of(self.grad)
        self.unit.copy_(unit)
        assert self.linear.frozen is not None
        self.linear.frozen.copy_(zero)
        self.signs.fill_(1)
        self.linear.z0.copy_(self.unit)
        self.linear.begin()

    def finish(self) -> None:
        self.linear.finish()
        u = scaled_back(self.linear.z, self.exponent)
        self.grads = torch.autograd.grad(
            self.f, self.inputs, u, retain_graph=True, allow_unused=True
        )

    def forget(self) -> None:
        """Let go of the graph of f, which no replay needs.

        It would keep the parameters' AccumulateGrad nodes alive, and with them the stream of this
        capture: every later backward would accumulate there, and none could be captured.
        """
        del self.f, self.z
