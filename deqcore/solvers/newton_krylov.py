"""Newton-Krylov: Newton's method with GMRES on differences of f, and a line search."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from deqcore.ops import _rows
from deqcore.solvers._options import Damping, options, require_damping, require_int
from deqcore.solvers.base import Solver, StepInfo

DESCENT = 1e-4  # share of the predicted decrease that a step has to give (Armijo)
SHORTEST = 1e-3  # of Newton's step; below it the direction is given up
WINDOW = 8  # base points whose largest norm a step is compared with
FORCING = 0.1  # largest relative residual of the linear solve
BASE = -1  # a row that awaits f at a new base point; 0 to m - 1 probe a direction, m tries a step


class KrylovState(NamedTuple):
    """Where each row stands; m is the size of the Krylov space."""

    phase: Tensor  # int64 [B, 1]: BASE, the direction being probed, or m for a tried step
    base: Tensor  # [B, D] the point that Newton's step starts from
    g: Tensor  # [B, D] residual there
    norm: Tensor  # float64 [B, 1] its 2-norm
    norms: Tensor  # float64 [B, WINDOW] those of the last base points, the newest first
    forcing: Tensor  # float64 [B, 1] relative residual that the linear solve may leave
    probe: Tensor  # float64 [B, 1] length of the difference
    basis: Tensor  # [B, m + 1, D] orthonormal
    upper: Tensor  # float64 [B, m, m] triangular factor of Arnoldi's matrix
    rotations: Tensor  # float64 [B, m, 2] cosine and sine of each Givens rotation
    rhs: Tensor  # float64 [B, m + 1] rotated right-hand side
    direction: Tensor  # [B, D] Newton's step
    length: Tensor  # float64 [B, 1] share of it that is tried


@options
class NewtonKrylov(Solver):
    """Inexact Newton with GMRES, without Jacobians, made global by a line search.

    For problems on which Anderson and Broyden wander: steep, badly scaled, started far away. Every
    Newton step solves J p = -g by GMRES (Saad and Schultz 1986) from differences
    J v = (g(x + e v) - g(x)) / e (Knoll and Keyes, J. Comput. Phys. 193, 2004), up to a relative
    residual chosen by Eisenstat and Walker's second rule (1996), and is shortened until the norm of
    g falls (Dennis and Schnabel 1983, A6.3.1). Where no share of it helps, a plain damped step is
    taken. Each row does all this by itself; every evaluation counts as a step, those of the linear
    solve too.

    Differences cost half of the digits: with float32 the Newton steps converge linearly.

    Args:
        memory: largest Krylov space, at most D is used; memory + 1 vectors of a row are stored.
        damping: of the plain steps, in (0, 2]; a float, or a function of the step (1, 2, ...).
        rtol, atol, max_steps, patience, check_every, record_trace: see ``Solver``; the
            defaults of ``max_steps`` and ``patience`` are larger here, as a Newton step takes
            several evaluations.
    """

    memory: int = 20
    damping: Damping = 1.0
    max_steps: int = 500
    patience: int = 200

    def __post_init__(self) -> None:
        super().__post_init__()
        require_int(self, "memory", 1)
        require_damping(self)

    def begin(self, x: Tensor) -> KrylovState:
        batch, dim = x.shape
        size = max(1, min(self.memory, dim))

        def wide(*shape: int, value: float = 0.0) -> Tensor:
            return torch.full((batch, *shape), value, dtype=torch.float64, device=x.device)

        return KrylovState(
            phase=torch.full((batch, 1), BASE, dtype=torch.int64, device=x.device),
            base=torch.zeros_like(x),
            g=torch.zeros_like(x),
            norm=wide(1),
            norms=wide(WINDOW),
            forcing=wide(1, value=FORCING),
            probe=wide(1),
            basis=x.new_zeros(batch, size + 1, dim),
            upper=wide(size, size),
            rotations=wide(size, 2),
            rhs=wide(size + 1),
            direction=torch.zeros_like(x),
            length=wide(1),
        )

    def step(
        self, history: KrylovState, x: Tensor, f: Tensor, info: StepInfo
    ) -> tuple[KrylovState, Tensor]:
        size = history.basis.shape[1] - 1
        g = f - x
        norm = info.dot(g, g).sqrt()
        trying = history.phase == size
        largest = history.norms.amax(1, keepdim=True)
        enough = norm <= largest - DESCENT * history.length * history.norm
        accepted = (history.phase == BASE) | (trying & enough)
        based = _choose(accepted, _rebased(history, x, g, norm), history)
        probing = (history.phase >= 0) & ~trying
        probed = _choose(probing, _probed(history, g), based)
        state = _choose(trying & ~accepted, _shortened(history, norm), probed)
        target = torch.where(
            state.phase == size,
            state.base + state.length.to(x.dtype) * state.direction,
            torch.where(
                state.phase == BASE,
                state.base + info.damping * state.g,
                state.base + state.probe.to(x.dtype) * _row(state.basis, state.phase),
            ),
        )
        return state, target


def _rebased(history: KrylovState, x: Tensor, g: Tensor, norm: Tensor) -> KrylovState:
    """Begin a linear solve at x."""
    known = history.norm > 0
    ratio = norm / torch.where(known, history.norm, 1)
    forcing = torch.where(known, (0.9 * ratio.square()).clamp(1e-4, FORCING), FORCING)
    size = _rows.row_dot(x, x)[:, None].sqrt().maximum(norm)
    probe = torch.finfo(x.dtype).eps ** 0.5 * size
    unit = -g / torch.where(norm > 0, norm, 1).to(x.dtype)
    basis = torch.zeros_like(history.basis)
    basis[:, 0] = unit
    rhs = torch.zeros_like(history.rhs)
    rhs[:, :1] = norm
    return history._replace(
        phase=torch.zeros_like(history.phase), base=x, g=g, norm=norm,
        norms=torch.cat([norm, history.norms[:, :-1]], 1), forcing=forcing, probe=probe,
        basis=basis, upper=torch.zeros_like(history.upper),
        rotations=torch.zeros_like(history.rotations), rhs=rhs,
    )  # fmt: skip


def _probed(history: KrylovState, g: Tensor) -> KrylovState:
    """Take in J v for the newest v of the basis: a step of Arnoldi and of its QR factors."""
    size = history.basis.shape[1] - 1
    column = history.phase.clamp(0, size - 1)
    probe = torch.where(history.probe > 0, history.probe, 1).to(g.dtype)
    w = (g - history.g) / probe
    before = _rows.row_dot(w, w)[:, None].sqrt()
    h = torch.zeros_like(history.rhs)
    for _ in range(2):  # classical Gram-Schmidt, twice is enough
        part = _rows.row_dot(history.basis, w[:, None])
        w = w - _combined(history.basis, part)
        h = h + part
    rest = _rows.row_dot(w, w)[:, None].sqrt()
    broken = ~(rest > 1e-6 * before)  # w lies in the space already: the solution does, too
    unit = torch.where(broken, 0, w / torch.where(broken, 1, rest).to(w.dtype))
    below = torch.where(broken, 0, rest)
    here = torch.arange(size + 1, device=g.device) == column + 1
    basis = torch.where(here[..., None], unit[:, None], history.basis)

    # Rotate the new column as those before were; then zero what is below its diagonal.
    entries = list(h.unbind(1))
    diagonal = column[:, 0]
    for i in range(size - 1):
        cosine, sine = history.rotations[:, i].unbind(1)
        old = i < diagonal
        upper = torch.where(old, cosine * entries[i] + sine * entries[i + 1], entries[i])
        entries[i + 1] = torch.where(
            old, cosine * entries[i + 1] - sine * entries[i], entries[i + 1]
        )
        entries[i] = upper
    turned = torch.stack(entries[:size], 1)
    top = turned.gather(1, column)
    radius = (top.square() + below.square()).sqrt()
    safe = torch.where(radius > 0, radius, 1)
    rotation = torch.cat([torch.where(radius > 0, top / safe, 1), below / safe], 1)
    place = torch.arange(size, device=g.device)
    kept = torch.where(place == column, radius, torch.where(place < column, turned, 0))
    upper = torch.where(place == column[..., None], kept[..., None], history.upper)
    rotations = torch.where((place == column)[..., None], rotation[:, None], history.rotations)
    value = history.rhs.gather(1, column)
    places = torch.arange(size + 1, device=g.device)
    rhs = torch.where(places == column, rotation[:, :1] * value, history.rhs)
    rhs = torch.where(places == column + 1, -rotation[:, 1:] * value, rhs)

    left = (rotation[:, 1:] * value).abs()
    done = (left <= history.forcing * history.norm) | (column == size - 1) | broken
    direction = _combined(basis, _solved(upper, rhs, column))
    return history._replace(
        phase=torch.where(done, size, column + 1), basis=basis, upper=upper, rotations=rotations,
        rhs=rhs, direction=direction, length=torch.ones_like(history.length),
    )  # fmt: skip


def _solved(upper: Tensor, rhs: Tensor, column: Tensor) -> Tensor:
    """Coefficients [B, m + 1] of the solution in the basis; zero beyond ``column``."""
    size = upper.shape[1]
    largest = upper.diagonal(dim1=1, dim2=2).abs().amax(1)
    found: list[Tensor] = [torch.zeros_like(largest)] * (size + 1)
    for i in reversed(range(size)):
        value = rhs[:, i]
        for j in range(i + 1, size):
            value = value - upper[:, i, j] * found[j]
        pivot = upper[:, i, i]
        usable = (pivot.abs() > 1e-14 * largest) & (i <= column[:, 0])
        found[i] = torch.where(usable, value / torch.where(usable, pivot, 1), 0)
    return torch.stack(found, 1)


def _shortened(history: KrylovState, norm: Tensor) -> KrylovState:
    """A shorter step after one that did not help; a plain one where it would be very short."""
    size = history.basis.shape[1] - 1
    t, start = history.length, history.norm.square()
    # The parabola through |g|^2 at both ends, with the slope that Newton's step has at the first.
    bend = norm.square() - start + 2 * t * start
    shorter = t.square() * start / torch.where(bend > 0, bend, 1)
    shorter = torch.where(norm.isfinite() & (bend > 0), shorter, 0)
    length = torch.minimum(torch.maximum(shorter, 0.1 * t), 0.5 * t)
    phase = torch.where(length < SHORTEST, BASE, size)
    return history._replace(phase=phase, length=length)


def _combined(vectors: Tensor, weights: Tensor) -> Tensor:
    """Sum of weights [B, n] times vectors [B, n, D], in order: [B, D]."""
    total = torch.zeros_like(vectors[:, 0])
    for i in range(vectors.shape[1]):
        total = total + weights[:, i, None].to(vectors.dtype) * vectors[:, i]
    return total


def _row(basis: Tensor, phase: Tensor) -> Tensor:
    index = phase.clamp(0, basis.shape[1] - 1)[..., None].expand(-1, 1, basis.shape[2])
    return basis.gather(1, index)[:, 0]


def _choose(rows: Tensor, a: KrylovState, b: KrylovState) -> KrylovState:
    """a in the given rows [B, 1], b in the others."""
    chosen: list[Any] = [
        torch.where(rows.view(-1, *[1] * (x.dim() - 1)), x, y) for x, y in zip(a, b, strict=True)
    ]
    return KrylovState(*chosen)
