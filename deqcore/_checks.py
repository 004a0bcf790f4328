"""What a finished solve is checked for, when it costs next to nothing.

Rows that have converged are frozen while others go on, on the understanding that f keeps giving
them the same. The last evaluation of f, made anyway, shows whether it does.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from deqcore._notices import warn_where
from deqcore._status import Status
from deqcore.ops._rows import BEST, FIRST, STEPS, Rows

ROUNDING = 64  # epsilons of f between two evaluations of it at the same point: not every kernel
# adds in the same order each time

COUPLED = f"deqcore: {Status.INCONSISTENT.advice}"
GROWN = (
    "deqcore: a row counts as converged at a residual above its first: the iterates have grown, "
    "and rtol is relative to rms(f(z)). There may be no fixed point: look at solution.residual, "
    "start nearer, or pass rtol=0 and an atol. deqcore.root measures against the first residual."
)


FEW_ROWS = 64  # on the CPU, numbers of so few rows are looked at one by one
ALIKE = 1e-4  # share of a residual by which two ways of summing it do not differ


class Measure(Protocol):
    """What a row is judged by; float [B] each, of the evaluation f at z [B, D]."""

    def residual(self, z: Tensor, f: Tensor) -> Tensor: ...

    def on_host(self, z: Tensor, f: Tensor) -> list[float]:
        """The residual of each row, in as few operations as can be."""

    def size(self, f: Tensor) -> Tensor:
        """Of f, of which the rounding of the residual is a share."""

    def bound(self, size: Tensor) -> Tensor:
        """What the residual of a row that has converged is below."""


@dataclass(frozen=True)
class RelativeMeasure:
    """rms(f(z) - z) <= atol + rtol * rms(f(z))."""

    rtol: float
    atol: float

    def residual(self, z: Tensor, f: Tensor) -> Tensor:
        return _row_rms(f, z)

    def on_host(self, z: Tensor, f: Tensor) -> list[float]:
        factor = max(f.shape[1], 1) ** -0.5
        return [factor * norm for norm in _row_norms(f, z).tolist()]

    def size(self, f: Tensor) -> Tensor:
        return _row_rms(f)

    def bound(self, size: Tensor) -> Tensor:
        return self.atol + self.rtol * size


def check_frozen_rows(
    rows: Rows,
    z: Tensor,  # [B, D] the values, in f's dtype
    f: Tensor,  # [B, D] f at them, or at iterates of which the frozen rows are values already
    measure: Measure,
    epsilon: float,  # of z and f
    evaluations: int | Tensor | None,
) -> Tensor | None:
    """Compare f at the rows that had ended before with what it was then.

    A row that had converged and has not any more becomes INCONSISTENT, in place, and a residual
    that is another one becomes that of now. Nothing waits for a GPU.

    Args:
        evaluations: only rows that ended in fewer are compared; None: f was evaluated at all of the
            values, after the solve.

    Returns:
        Whether a row did so, bool []; None if none did, and that was free to know.
    """
    residual = measure.residual(z, f)
    before = rows.residuals[:, BEST]
    size = measure.size(f)
    rounding = ROUNDING * epsilon * size
    changed = ~((residual - before).abs() <= rounding)
    converged = rows.status == int(Status.CONVERGED)
    if evaluations is None:
        changed &= _comparable(converged, before, z)
    else:
        converged &= rows.counters[:, STEPS] < evaluations
        changed &= converged
    if _free(z) and not changed.any():
        return None
    broken = changed & converged & ~(residual <= measure.bound(size) + rounding)
    rows.status.masked_fill_(broken, int(Status.INCONSISTENT))
    rows.residuals[:, BEST] = torch.where(changed, residual.to(before), before)
    return broken.any()


def frozen_rows_are_alike(
    rows: Rows, z: Tensor, f: Tensor, measure: Measure, evaluations: int | None
) -> bool:
    """Whether ``check_frozen_rows`` would find nothing, where that is quick to know.

    In a solve that takes a millisecond what costs is each operation, as nothing of it is in a cache
    yet, not the pass over f and z.
    """
    if not _free(z) or z.shape[0] > FEW_ROWS:
        return False
    now, before = measure.on_host(z, f), rows.residuals.tolist()
    other = [
        i for i, residual in enumerate(now)
        if not abs(residual - before[i][BEST]) <= ALIKE * before[i][BEST]  # NaN is another, too
    ]  # fmt: skip
    if not other or evaluations is None:
        return not other
    status, counters = rows.status.tolist(), rows.counters.tolist()
    converged = int(Status.CONVERGED)
    return not any(status[i] == converged and counters[i][STEPS] < evaluations for i in other)


def _comparable(converged: Tensor, before: Tensor, z: Tensor) -> Tensor:
    """Rows whose value is the iterate that was measured, close enough to have its residual.

    One that did not converge may have been rebuilt, to a few epsilons of its residual.
    """
    if _free(z) and converged.all():
        return converged
    return converged | (before <= _row_rms(z))


def _free(tensor: Tensor) -> bool:
    """Whether looking at a value costs no wait."""
    return tensor.is_cpu


def _row_rms(f: Tensor, z: Tensor | None = None) -> Tensor:
    """rms of f - z, or of f, row by row; as exact as a comparison needs."""
    return _row_norms(f, z) / max(f.shape[1], 1) ** 0.5


def _row_norms(f: Tensor, z: Tensor | None) -> Tensor:
    if f.dtype not in (torch.float64, torch.float32):
        f = f.float()
    return torch.linalg.vector_norm(f if z is None else f - z, dim=1)


def warn_of_forward(rows: Rows, inconsistent: Tensor | None, *, relative: bool, wait: bool) -> None:
    """Warn of rows that are not what they seem.

    Args:
        relative: the residual was compared with rms(f(z)), which may grow.
        wait: as in ``warn_where``.
    """
    flags, messages = [], []
    if inconsistent is not None:
        flags.append(inconsistent)
        messages.append(COUPLED)
    if relative and not _none_grown(rows):
        flags.append(grown(rows))
        messages.append(GROWN)
    if flags:
        warn_where(flags, tuple(messages), wait=wait)


def grown(rows: Rows) -> Tensor:
    """bool []: whether a row has converged at a residual above its first."""
    converged = rows.status == int(Status.CONVERGED)
    return (converged & (rows.residuals[:, BEST] > rows.residuals[:, FIRST])).any()


def _none_grown(rows: Rows) -> bool:
    """Whether no row's residual is above its first, where that is free to know."""
    if not _free(rows.residuals) or rows.residuals.shape[0] > FEW_ROWS:
        return False
    return not any(row[BEST] > row[FIRST] for row in rows.residuals.tolist())
