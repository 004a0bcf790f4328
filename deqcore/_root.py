"""When a row of ``root`` is done: a residual below its own first one, near enough to a root."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from deqcore._loop import Problem
from deqcore._packing import Packing
from deqcore._status import Status
from deqcore._transforms import unwrapped, values_are_unknown
from deqcore.ops._rows import ACTIVE, BEST, BEST_STEP, FIRST, LATEST, STEPS, Rows, count_active
from deqcore.solvers.base import StepContext

# The secant through the last two evaluations must place the root within this share of how far the
# row has come, or of its size: exp(z) gets as small as one likes, and every step leads further.
NEAR = 1e-3

Norm = Literal["rms", "max"]
NORMS: tuple[str, ...] = get_args(Norm)


class Seen(NamedTuple):
    """What the test remembers of each row; rows in dim 0."""

    start: Tensor  # [B, D] first iterate
    z: Tensor  # [B, D] iterate before
    g: Tensor  # [B, D] g there
    first: Tensor  # float64 [B], its residual at the start
    latest: Tensor  # float64 [B], its residual now
    best: Tensor  # float64 [B], that of the iterate which the solver holds for its best


@dataclass(frozen=True)
class RootTest:
    """|g| <= atol + rtol * |g(z0)|, in a norm and in units of one's choice, and a root nearby.

    Attributes:
        norm: over the elements of a row, ``rms`` or ``max``.
        f_scale: [1 or B, D], multiplies g before the norm is taken; None: ones.
    """

    norm: Norm
    f_scale: Tensor | None
    rtol: float
    atol: float

    def measure(self, seen: Seen, problem: RootProblem) -> RootMeasure:
        return RootMeasure(self, problem, self.bound(seen.first))

    def start(self, z: Tensor) -> Seen:
        unknown = torch.full((len(z),), torch.inf, dtype=torch.float64, device=z.device)
        start = z.detach().clone()
        return Seen(start, start, torch.zeros_like(start), unknown, unknown, unknown)

    def size(self, g: Tensor) -> Tensor:  # [B, D] -> float64 [B]
        if self.f_scale is not None:
            g = g * self.f_scale
        return _max(g) if self.norm == "max" else _rms(g)

    def bound(self, first: Tensor) -> Tensor:
        return self.atol + self.rtol * first

    @torch.no_grad()
    def end(self, seen: Seen, rows: Rows, z: Tensor, problem: RootProblem) -> tuple[Seen, Rows]:
        """End the rows that are done at z [B, D], before the solver's step from there."""
        z, g = z.detach(), problem.g.to(z.dtype)
        residual = self.size(g)
        active = rows.status == ACTIVE
        at_start = rows.counters[:, STEPS] == 0
        first = torch.where(active & at_start, residual, seen.first)
        met = active & (residual <= torch.where(at_start, self.atol, self.bound(first)))
        # Looking would be for nothing where none has, if that is free to know.
        if z.device.type != "cpu" or values_are_unknown(z) or met.any():
            met &= at_start | self._near(seen, z, g, residual)
            rows = _ended(rows, met, residual)
        latest = torch.where(active, residual, seen.latest)
        # A tensor of its own: the solver's step may write the next iterate into z.
        return seen._replace(z=z.clone(), g=g, first=first, latest=latest), rows

    def _near(self, seen: Seen, z: Tensor, g: Tensor, residual: Tensor) -> Tensor:
        ahead = _rms(z - seen.z) * residual / self.size(g - seen.g)
        far = torch.maximum(_rms(z), _rms(z - seen.start))
        return (residual == 0) | (ahead <= NEAR * far)

    @torch.no_grad()
    def after_step(self, seen: Seen, rows: Rows) -> Seen:
        """Follow which iterate the solver's step holds for the best."""
        steps, best_step = rows.counters[:, STEPS], rows.counters[:, BEST_STEP]
        improved = (best_step == steps) | ((best_step == 0) & (steps == 1))
        return seen._replace(best=torch.where(improved, seen.latest, seen.best))

    @torch.no_grad()
    def report(self, seen: Seen, rows: Rows) -> None:
        """Put the residuals in this norm where the solver's step had its own, at the end."""
        for column, values in ((LATEST, seen.latest), (BEST, seen.best), (FIRST, seen.first)):
            rows.residuals[:, column] = values


@dataclass(frozen=True)
class RootMeasure:
    """``deqcore._checks.Measure`` of the evaluation that came last."""

    test: RootTest
    problem: RootProblem
    limit: Tensor

    def residual(self, z: Tensor, f: Tensor) -> Tensor:
        return self.test.size(self.problem.g)

    def on_host(self, z: Tensor, f: Tensor) -> list[float]:
        residuals: list[float] = self.residual(z, f).tolist()
        return residuals

    def size(self, f: Tensor) -> Tensor:
        return self.test.size(f)

    def bound(self, size: Tensor) -> Tensor:
        return self.limit


def _ended(rows: Rows, done: Tensor, residual: Tensor) -> Rows:
    status = rows.status.masked_fill(done, int(Status.CONVERGED))
    counters = rows.counters.clone()
    counters[:, STEPS] += done.int()
    counters[:, BEST_STEP] = torch.where(done, counters[:, STEPS], counters[:, BEST_STEP])
    residuals = torch.where(done[:, None], residual[:, None], rows.residuals)
    return Rows(status, counters, residuals, count_active(status))


def _rms(x: Tensor) -> Tensor:
    length = torch.linalg.vector_norm(x, dim=1, dtype=torch.float64)
    return length / max(x.shape[1], 1) ** 0.5


def _max(x: Tensor) -> Tensor:
    return torch.linalg.vector_norm(x, torch.inf, dim=1).double() if x.shape[1] else x.sum(1)


class RootProblem(Problem):
    """z + g(z), which keeps g(z); the solver sees u_scale * z.

    Attributes:
        norm, u_scale, f_scale: as in ``deqcore.root``; the scales are [1 or B, D], or None.
        g: [B, D], g of the latest evaluation in the caller's units, without a graph.
    """

    relative = False
    g: Tensor

    def __init__(
        self,
        g: Callable[..., Any],
        args: tuple[Any, ...],
        packing: Packing,
        norm: Norm,
        u_scale: Tensor | None,
        f_scale: Tensor | None,
        has_aux: bool = False,
    ) -> None:
        super().__init__(g, args, packing, has_aux=has_aux)
        self.norm, self.u_scale, self.f_scale = norm, u_scale, f_scale

    def pack(self, state: Any) -> Tensor:
        """As the solver sees it."""
        return self._scaled(self.packing.pack(state, "z0"))

    def unpack(self, value: Tensor) -> Any:
        """As the caller sees it."""
        return self.packing.unpack(self._unscaled(value), apart=True)

    def test(self, context: StepContext) -> RootTest:
        rtol, atol = context.limits.rtol, context.limits.atol
        return RootTest(self.norm, self.f_scale, rtol, atol)

    def _packed_value(self, z: Tensor) -> tuple[Tensor, Any]:
        state = self.packing.unpack(self._unscaled(z))
        value = self.f(state, *self.args)
        if self.has_aux or self.calls == 1:
            value = self.without_aux(value, "g(z)")
        self.packing.check(value, "g(z)")  # the sum would broadcast a smaller one
        self.g = self.packing.pack(pytree.tree_map(torch.detach, value), "g(z)")
        value = pytree.tree_map(torch.add, state, value)
        return self._scaled(self.packing.pack(value)), value

    def _scaled(self, z: Tensor) -> Tensor:
        return z if self.u_scale is None else (z * self.u_scale).to(z.dtype)

    def _unscaled(self, z: Tensor) -> Tensor:
        return z if self.u_scale is None else (z / self.u_scale).to(z.dtype)


def packed_scale(scale: Any, packing: Packing, z0: Any, name: str) -> Tensor | None:
    """A scale as ``root`` takes it, [B, D]: numbers that broadcast to z0, leaf by leaf."""
    if scale is None:
        return None
    like, spec = pytree.tree_flatten(z0)
    leaves = [scale] * len(like)
    if not isinstance(scale, Tensor | float | int):
        try:
            leaves = spec.flatten_up_to(scale)
        except ValueError:
            got = pytree.tree_structure(scale)
            raise ValueError(f"{name}: expected the structure of z0, {spec}, got {got}") from None
    wide = []
    for leaf, z in zip(leaves, like, strict=True):
        leaf = torch.as_tensor(leaf, dtype=packing.compute_dtype, device=packing.device)
        try:
            wide.append(leaf.detach().expand(z.shape).reshape(packing.batch, -1))
        except RuntimeError:
            raise ValueError(
                f"{name}: expected numbers that broadcast to z0, {tuple(z.shape)}, got "
                f"{tuple(leaf.shape)}"
            ) from None
    packed = torch.cat(wide, dim=1)
    values = unwrapped(packed)
    if not bool(((values > 0) & values.isfinite()).all()):
        raise ValueError(
            f"{name}: expected positive finite numbers, such as 1 / a component's usual size"
        )
    return packed
