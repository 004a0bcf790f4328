"""What a captured solve says of its outcome: one buffer on the device, copied once a replay."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from deqcore._solution import BackwardRecord, Solution, SolveReport
from deqcore.ops._rows import BEST, STEPS, Rows


@dataclass(frozen=True)
class Layout:
    """Where they are: residual [B], steps int32 [B], most steps int32 [1], status int8 [B]."""

    rows: int
    dtype: torch.dtype  # of the residual

    @property
    def _ends(self) -> tuple[int, int, int, int]:
        residual = self.rows * self.dtype.itemsize
        steps = residual + 4 * self.rows
        return residual, steps, steps + 4, steps + 4 + self.rows

    def new(self, device: torch.device) -> Tensor:
        return torch.zeros(self._ends[3], dtype=torch.uint8, device=device)

    def residual(self, buffer: Tensor) -> Tensor:
        return buffer[: self._ends[0]].view(self.dtype)

    def steps(self, buffer: Tensor) -> Tensor:
        return buffer[self._ends[0] : self._ends[1]].view(torch.int32)

    def most_steps(self, buffer: Tensor) -> Tensor:
        return buffer[self._ends[1] : self._ends[2]].view(torch.int32)

    def status(self, buffer: Tensor) -> Tensor:
        return buffer[self._ends[2] :].view(torch.int8)

    def note(self, buffer: Tensor, rows: Rows) -> None:
        """Write how ``rows`` ended, without waiting for the device."""
        steps = rows.counters[:, STEPS]
        self.residual(buffer).copy_(rows.residuals[:, BEST])
        self.steps(buffer).copy_(steps)
        self.most_steps(buffer).copy_(steps.amax() if self.rows else torch.ones_like(steps.sum()))
        self.status(buffer).copy_(rows.status)


class _Noted:
    """The fields of a report, read out of a buffer when they are asked for."""

    def __init__(
        self, buffer: Tensor, layout: Layout, record: BackwardRecord, more: int, fixed: int | None
    ) -> None:
        """``more`` evaluations than steps, of which there were ``fixed`` if that is not None."""
        self.record, self.trace = record, None
        self._buffer, self._layout, self._more, self._fixed = buffer, layout, more, fixed

    @property
    def status(self) -> Tensor:
        return self._layout.status(self._buffer)

    @property
    def residual(self) -> Tensor:
        return self._layout.residual(self._buffer)

    @property
    def steps(self) -> Tensor:
        return self._layout.steps(self._buffer)

    @property
    def evaluations(self) -> int:
        """Calls of f in all; waits for the device."""
        if self._fixed is not None:
            return self._fixed + self._more
        return int(self._layout.most_steps(self._buffer)) + self._more


# A property of theirs stands where the base has a field, which mypy takes for an error.
class CapturedReport(_Noted, SolveReport):  # type: ignore[override, misc]
    """A ``SolveReport`` of a captured solve; ``evaluations`` is read from the device."""


class CapturedSolution(_Noted, Solution):  # type: ignore[override, misc]  # likewise
    """A ``Solution`` of a captured solve; ``evaluations`` is read from the device."""

    def __init__(self, value: Any, report: CapturedReport) -> None:
        vars(self).update(vars(report))
        self.value = value

    def report(self) -> SolveReport:
        report = object.__new__(CapturedReport)
        vars(report).update({k: v for k, v in vars(self).items() if k != "value"})
        return report
