"""What a solve returns, and what to do when it did not converge."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from typing_extensions import Self

from deqcore._status import RANDOM_ADVICE, Status
from deqcore.ops._rows import BEST, STEPS, Rows


class ConvergenceError(RuntimeError):
    """Raised by ``SolveReport.raise_for_status`` when a row did not converge."""


@dataclass(eq=False)
class BackwardRecord:
    """Filled by the adjoint solve when ``backward`` runs; None until then."""

    report: SolveReport | None = None


@dataclass(eq=False)
class SolveReport:
    """The outcome of a solve, row by row, without the solution itself.

    Attributes:
        status: int8 [B], values of ``Status``; [1] with ``batch="coupled"``, as all of these.
        residual: [B], rms(f(z) - z) of the iterate that was returned; float32, or float64 for a
            float64 state. Of ``root`` the norm of g(z) that was asked for.
        steps: int32 [B], evaluations of f that the row used.
        evaluations: calls of f in all, the extra one that builds a graph included.
        trace: [B, n], the residual after each step when ``record_trace=True``, else None. A row
            that has ended repeats its last value.
        draws_numbers: whether numbers were drawn from torch's default generator in evaluations
            after the first, by an f that is random and has no fixed point (dropout). Looked at in
            solves of ``patience`` or ``max_steps`` evaluations alone, and not with
            ``check_every=0``.
    """

    status: Tensor
    residual: Tensor
    steps: Tensor
    evaluations: int
    trace: Tensor | None = None
    draws_numbers: bool = False
    record: BackwardRecord = field(default_factory=BackwardRecord, repr=False)

    @classmethod
    def of_rows(
        cls,
        rows: Rows,
        dtype: torch.dtype,
        *,
        evaluations: int | Tensor,
        trace: Tensor | None,
        draws_numbers: bool = False,
    ) -> Self:
        """The outcome of ``rows``, which nothing changes any more.

        Residual, in ``dtype``, and steps are made when they are asked for: together they take as
        long as a step of a small solve.
        """
        report = object.__new__(cls)
        vars(report).update(
            status=rows.status, evaluations=evaluations, trace=trace, draws_numbers=draws_numbers,
            record=BackwardRecord(), _rows=rows, _dtype=dtype,
        )  # fmt: skip
        if rows.status.is_cuda and torch.cuda.is_current_stream_capturing():
            report.residual, report.steps  # noqa: B018  (so that replays write them)
        return report

    def __getattr__(self, name: str) -> Any:
        rows: Rows | None = vars(self).get("_rows")
        if rows is None or name not in ("residual", "steps"):
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        value = (
            rows.counters[:, STEPS].clone()
            if name == "steps"
            else rows.residuals[:, BEST].to(self._dtype)
        )
        setattr(self, name, value)
        return value

    @property
    def backward(self) -> SolveReport | None:
        """Outcome of the last backward solve of this solution (``Implicit``); None before it.

        Its residual is that of the unit-size problem: relative to each row's incoming gradient.
        """
        return self.record.report

    @property
    def converged(self) -> Tensor:
        """bool [B]: the rows that met the tolerance."""
        return self.status == Status.CONVERGED

    def raise_for_status(self) -> None:
        """Raise ``ConvergenceError`` unless every row converged (reads the device once)."""
        counts = torch.bincount(self.status.long().cpu(), minlength=len(Status)).tolist()
        if sum(counts[1:]) == 0:
            return
        rows = (self.status != Status.CONVERGED).nonzero().flatten().tolist()
        shown = ", ".join(map(str, rows[:8])) + (", ..." if len(rows) > 8 else "")
        worst = self.residual.double()[self.status != Status.CONVERGED].max().item()
        lines = [
            f"{len(rows)} of {len(self.status)} rows did not converge (rows {shown}; "
            f"largest residual {worst:.3g}):"
        ]
        if self.draws_numbers:
            lines.append(f"  f is random: {RANDOM_ADVICE}")
        for status, count in zip(Status, counts, strict=True):
            if count and status is not Status.CONVERGED:
                lines.append(f"  {count} {status.name}: {status.advice}")
        raise ConvergenceError("\n".join(lines))


@dataclass(eq=False)
class Solution(SolveReport):
    """A ``SolveReport`` and the solution.

    Attributes:
        value: same structure, shapes, dtypes and device as z0, in memory that its leaves do not
            share. It is the iterate with the smallest
            residual that was measured (the converged one where the row converged), the same with
            and without grad mode.
        aux: what f returned beside the state at the solution, with ``has_aux=True``; its tensors
            have no graph.

    A row that does not converge goes back to an earlier iterate x. ``Broyden`` has kept it; with
    ``Anderson`` and ``Picard`` it is rebuilt from x + damping * g, g = f(x) - x, to a few machine
    epsilons of ``abs(x) + abs(damping * g)``. ``residual`` is that of x itself, so where f is so
    steep that g nears x / epsilon, nothing of x is left in ``value`` and the two do not match.
    """

    value: Any = None
    aux: Any = None

    @classmethod
    def of(cls, report: SolveReport, record: BackwardRecord, value: Any, aux: Any) -> Solution:
        """The solve of which ``report`` is the outcome."""
        solution = object.__new__(cls)
        vars(solution).update(vars(report), record=record, value=value, aux=aux)
        return solution

    def report(self) -> SolveReport:
        """This solve's outcome without its value, so that keeping it keeps no graph alive."""
        report = object.__new__(SolveReport)
        vars(report).update({k: v for k, v in vars(self).items() if k not in ("value", "aux")})
        return report
