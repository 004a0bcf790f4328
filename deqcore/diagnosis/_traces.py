"""What each solver does, written down evaluation by evaluation."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from deqcore._checks import RelativeMeasure
from deqcore._loop import Problem
from deqcore._module_buffers import ModuleBuffers
from deqcore._packing import Packing
from deqcore.solvers import Solver

# What the call that is written says by other means, or not at all.
_LIMITS = ("rtol", "atol", "max_steps", "patience", "check_every", "record_trace")


@dataclass(frozen=True, eq=False)
class Trace:
    """One solver from z0, with tolerances that end nothing: down to where it gets no further.

    Attributes:
        solver: with its options.
        residual: float64 [B, n] on the CPU, of each row in each evaluation of f:
            rms(f(z) - z) / (rms(f(z)) + atol / rtol), which is at most rtol where a row has
            converged. With rtol=0 it is rms(f(z) - z), and atol stands for rtol.
        tolerance: that rtol.
        demand: the smallest rms(f(z) - z) / rms(f(z)) that the tolerance asks of a row; more than
            rtol, by what ``atol`` allows.
        value: [B, D] each row's best iterate.
    """

    solver: Solver
    residual: Tensor
    tolerance: float
    demand: float
    value: Tensor

    @property
    def name(self) -> str:
        """The solver as one writes it, without its limits."""
        return written(self.solver)

    @property
    def smallest(self) -> Tensor:
        """float64 [B, n], each row's smallest residual so far; inf before there is one."""
        return torch.where(self.residual.isnan(), torch.inf, self.residual).cummin(1).values

    @property
    def worst(self) -> Tensor:
        """float64 [n], the largest of them over the rows."""
        return self.smallest.amax(0)

    @property
    def best(self) -> float:
        """The residual that the worst row reached; inf where it has none."""
        return self.worst[-1].item()

    @property
    def evaluations(self) -> int | None:
        """Calls of f until every row met the tolerance; None if one did not."""
        met = (self.worst <= self.tolerance).nonzero()
        return int(met[0]) + 1 if len(met) else None

    @property
    def converged(self) -> int:
        """Rows that met the tolerance."""
        return int((self.smallest[:, -1] <= self.tolerance).sum())


def written(solver: Solver, **limits: Any) -> str:
    """``solver`` as one writes it: options that are not defaults, then ``limits``."""
    options = {
        field.name: getattr(solver, field.name)
        for field in dataclasses.fields(solver)
        if field.name not in _LIMITS and getattr(solver, field.name) != field.default
    }
    options |= limits
    inside = ", ".join(f"{name}={value!r}" for name, value in options.items())
    return f"{type(solver).__name__}({inside})"


def traced(
    f: Callable[..., Any],
    z0: Tensor,  # [B, D]
    args: tuple[Any, ...],
    packing: Packing,
    solver: Solver,
    wanted: Solver,
) -> Trace:
    """Solve by ``solver``, without a graph, for the tolerance of ``wanted``.

    Buffers of f's modules are put back.
    """
    problem = _Watched(f, args, packing)
    problem.wanted = wanted
    with ModuleBuffers().unchanged():
        solved = problem.solve(z0, solver, check=False)
    measure = problem.measure
    unit = measure.rtol or measure.atol
    residual = torch.stack(problem.ratios, 1).double().cpu() * unit
    demand = measure.rtol + (measure.atol / problem.size.double()).nan_to_num(0, 0).min().item()
    return Trace(solver, residual, unit, demand, solved.value)


class _Watched(Problem):
    """A problem that notes each residual over the bound that it has to meet."""

    wanted: Solver
    measure: RelativeMeasure
    size: Tensor  # of f in the last evaluation

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.ratios: list[Tensor] = []

    def __call__(self, z: Tensor) -> Tensor:
        f = super().__call__(z)
        if self.calls == 1:
            rtol = self.wanted.relative_tolerance(self.packing.dtype, *self.f_dtypes)
            self.measure = RelativeMeasure(rtol, self.wanted.atol)
        self.size = self.measure.size(f)
        self.ratios.append(self.measure.residual(z, f) / self.measure.bound(self.size))
        return f
