"""The linear problem of backward, u = g + J^T u: at unit scale, and by other means if need be."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from deqcore._checks import ROUNDING
from deqcore._loop import Problem, Solved
from deqcore._notices import warn_where
from deqcore._packing import Packing
from deqcore._solution import ConvergenceError, SolveReport
from deqcore._status import Status
from deqcore.adjoints._linear import UnitGradient, scaled_back
from deqcore.solvers import Anderson, Solver

POLICIES = ("warn", "raise", "fallback", "ignore")
FAILURES = [status for status in Status if status is not Status.CONVERGED]

DENSE_DIM = (
    256  # elements of a row up to which a fallback sets up its Jacobian, in as many products
)
DENSE_SIZE = 1 << 24  # elements of all those Jacobians together
FALLBACK_STEPS = 300
FALLBACK_MEMORY = 64


@dataclass(eq=False)
class LinearSystem:
    """u = g + J^T u for rows at unit size, with products J^T u."""

    vjp: Callable[[Tensor], Tensor]  # [B, D] -> [B, D]
    grad: Tensor  # [B, D] the incoming gradient g
    f_dtypes: tuple[torch.dtype, ...]  # the products are as coarse as f

    def __post_init__(self) -> None:
        self.unit, self.exponent, self.zero = UnitGradient.of(self.grad)

    def problem(self) -> Problem:
        """u -> g + J^T u, with products that betray a J which couples rows.

        Rows are scaled, accelerated and ended one by one, which is right for a J that does not
        couple them. Then S^-1 J^T S u = J^T u for signs and powers of two S, bit for bit. In any
        other case each product is another one, and the solve settles on nothing, instead of on what
        would be wrong.
        """
        unit, vjp = self.unit, self.vjp
        factors = _row_factors_for(unit) if len(unit) > 1 else ()
        products = itertools.count(-1)

        def image(u: Tensor) -> Tensor:
            product = next(products)
            if product < 0 or not factors:
                return unit + vjp(u)
            factor, inverse = factors[product % len(factors)]
            return torch.addcmul(unit, inverse, vjp(u * factor))

        return Problem(image, (), Packing.of(unit), self.f_dtypes)

    def unscaled(self, u: Tensor) -> Tensor:
        return scaled_back(u, self.exponent)

    def couples_rows(self) -> bool:
        """Whether J does not keep to its rows."""
        if len(self.unit) < 2:
            return False
        plain = self.vjp(self.unit)
        dtypes = (plain.dtype, *self.f_dtypes)
        rounding = ROUNDING * max(torch.finfo(dtype).eps for dtype in dtypes) * plain.abs().amax()
        for bits in row_bits(self.unit):
            sign = 1 - 2 * bits
            if bool(((sign * self.vjp(self.unit * sign) - plain).abs() > rounding).any()):
                return True
        return False

    def solve_otherwise(
        self, tolerance: Solver, start: Tensor, frozen: Tensor
    ) -> tuple[Solved, Problem]:
        """From ``start``, with much memory; small rows that are not ``frozen`` first directly."""
        rows, dim = self.unit.shape
        if dim <= DENSE_DIM and rows * dim * dim <= DENSE_SIZE:
            start = torch.where(frozen[:, None], start, self._direct(start))
        solver = Anderson(
            memory=FALLBACK_MEMORY,
            max_steps=FALLBACK_STEPS,
            patience=FALLBACK_STEPS,
            rtol=tolerance.rtol,
            atol=tolerance.atol,
        )
        problem = self.problem()
        return problem.solve(start, solver, frozen), problem

    def _direct(self, otherwise: Tensor) -> Tensor:
        """By each row's own matrix; ``otherwise`` where that is singular."""
        rows, dim = self.unit.shape
        basis = torch.eye(dim, dtype=self.unit.dtype, device=self.unit.device)
        products = [self.vjp(basis[i].expand(rows, dim).contiguous()) for i in range(dim)]
        J = torch.stack(products, 1).double()  # [B, D, D], row i is e_i^T J
        eye = torch.eye(dim, dtype=torch.float64, device=J.device)
        u, _ = torch.linalg.solve_ex(eye - J.mT, self.unit.double()[:, :, None])
        u = u[:, :, 0].to(self.unit.dtype)
        return torch.where(u.isfinite().all(1, keepdim=True), u, otherwise)


FACTORS = (-1.0, 2.0, -0.5, -2.0, 0.5, 1.0, -4.0)
# float16 has no exponents to spare.
NARROW_FACTORS = (-1.0, 1.0)


def row_bits(like: Tensor) -> Tensor:
    """[n, B, 1], 0 and 1, the bits of a row's number: any two rows differ in one of n."""
    number = torch.arange(len(like), device=like.device)
    bit = torch.arange(max(len(like) - 1, 1).bit_length(), device=like.device)
    return ((number >> bit[:, None]) & 1).to(like.dtype)[:, :, None]


def row_factors(like: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Factors of each row and their inverses, [B, 1]; each of FACTORS with each of the bits."""
    bits = row_bits(like)
    values = NARROW_FACTORS if like.dtype == torch.float16 else FACTORS
    factors = [torch.where(bits == 1, value, 1.0).to(like.dtype) for value in values]
    inverses = [torch.where(bits == 1, 1 / value, 1.0).to(like.dtype) for value in values]
    return [
        (factors[i % len(values)][i % len(bits)], inverses[i % len(values)][i % len(bits)])
        for i in range(math.lcm(len(values), len(bits)))
    ]


@functools.lru_cache(maxsize=64)
def _row_factors_on_cpu(rows: int, dtype: torch.dtype) -> list[tuple[Tensor, Tensor]]:
    with torch.inference_mode(False):
        return row_factors(torch.empty(rows, 0, dtype=dtype))


def _row_factors_for(like: Tensor) -> list[tuple[Tensor, Tensor]]:
    plain = type(like) is Tensor and like.device.type == "cpu"
    return _row_factors_on_cpu(len(like), like.dtype) if plain else row_factors(like)


def fall_back(
    system: LinearSystem, solver: Solver, u: Tensor, report: SolveReport
) -> tuple[Tensor, SolveReport]:
    """(u [B, D], report) after other means for the rows that ``solver`` left at ``u``.

    Rows that have converged keep what they have, unless rows depend on each other: then all are
    solved as one. Waits for the device.
    """
    failed = ~report.converged
    if not bool(failed.any()):
        return system.unscaled(u), report
    inconsistent = bool((report.status == int(Status.INCONSISTENT)).any())
    if not inconsistent and not system.couples_rows():
        start = torch.where(failed[:, None], system.unit, u)
        solved, problem = system.solve_otherwise(solver, start, ~failed)
        new = solved.report(problem)
        new.steps = report.steps + new.steps
        new.residual = torch.where(failed, new.residual, report.residual)
        new.evaluations += report.evaluations
        return system.unscaled(solved.value), new
    shape = system.unit.shape
    whole = LinearSystem(
        lambda v: system.vjp(v.view(shape)).reshape(1, -1),
        system.grad.reshape(1, -1),
        system.f_dtypes,
    )
    solved, problem = whole.solve_otherwise(solver, whole.unit, whole.zero)
    new = solved.report(problem)
    new.status, new.residual, new.steps = (
        one.expand(len(failed)).clone() for one in (new.status, new.residual, new.steps)
    )
    new.steps += report.steps
    new.evaluations += report.evaluations
    return whole.unscaled(solved.value).view(shape), new


def act_on_failure(policy: str, report: SolveReport, *, wait: bool) -> None:
    """Warn or raise if rows did not converge; ``wait`` as in ``warn_where``."""
    if policy == "ignore":
        return
    if policy == "raise":
        raise_in_backward(report)
        return
    if report.status.device.type == "cpu" and report.converged.all():
        return
    flags = [(report.status == int(status)).any() for status in FAILURES]
    warn_where(flags, failure_messages(policy), wait=wait)


def raise_in_backward(report: SolveReport) -> None:
    """Raise ``ConvergenceError`` unless every row converged (waits for the device)."""
    try:
        report.raise_for_status()
    except ConvergenceError as error:
        raise ConvergenceError(f"deqcore.Implicit: the linear solve of backward: {error}") from None


@functools.cache
def failure_messages(policy: str) -> tuple[str, ...]:
    """What to warn of for each of FAILURES."""
    return tuple(_message(policy, status) for status in FAILURES)


def _message(policy: str, status: Status) -> str:
    tried = policy == "fallback"
    means = "" if tried else "on_failure='fallback' tries other means, "
    return (
        f"deqcore.Implicit: in backward the linear solve{' and its fallback' if tried else ''} "
        f"ended as {status.name} in some rows: their gradient is an approximation, see "
        f"solution.backward. For u = g + J^T u in place of f: {status.advice} Of Implicit's "
        f"options solver=... sets how it is solved; {means}on_failure='raise' stops here, and "
        "'ignore' is for a backward that is cut short on purpose."
    )
