"""Twenty-five hard systems of equations, by deqcore's solvers and by scipy's.

    python -m benchmarks.hard_problems --out benchmarks/results/hard_problems.json

The systems are those of Moré, Garbow and Hillstrom ("Testing unconstrained optimization software",
ACM TOMS 7, 1981) that are square, and of the collection that Burkardt keeps as TEST_NONLIN and
SciML as NonlinearProblemLibrary, from their mathematical statements and with their standard
starting points; the last two are the first kind's extended forms.

A system is solved when the 2-norm of g at what comes back, evaluated here, is at most 1e-6. All
solvers may call g 2000 times; of scipy's, the best point that they asked for counts. What ours
iterate is z + s g(z), with s by one rule for all systems: -<g, J g> / |J g|^2 at the start, the
damping with which the first step leaves the smallest residual of a linear g.
"""

from __future__ import annotations

import argparse
import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

import deqcore
from benchmarks.harness import machine
from lion_models.base.files import write_json

CALLS = 2000  # of g, for every solver
GOAL = 1e-9  # what every solver is asked for: rms(g) ours, the largest entry scipy's
SOLVED = 1e-6

System = Callable[[Tensor], Tensor]  # z (n,) -> g (n,), float64


@dataclass(frozen=True)
class Problem:
    """A square system g(z) = 0 and where to start."""

    name: str
    g: System
    start: tuple[float, ...]


def _index(z: Tensor) -> Tensor:
    return torch.arange(1, len(z) + 1, dtype=z.dtype)


def rosenbrock(z: Tensor) -> Tensor:
    return torch.cat([1 - z[:1], 10 * (z[1:] - z[:-1] ** 2)])


def powell_singular(z: Tensor) -> Tensor:
    a, b, c, d = z.unflatten(0, (-1, 4)).unbind(1)
    parts = [a + 10 * b, 5**0.5 * (c - d), (b - 2 * c) ** 2, 10**0.5 * (a - d) ** 2]
    return torch.stack(parts, 1).flatten()


def powell_badly_scaled(z: Tensor) -> Tensor:
    a, b = z
    return torch.stack([1e4 * a * b - 1, torch.exp(-a) + torch.exp(-b) - 1.0001])


def wood(z: Tensor) -> Tensor:
    a, b, c, d = z
    s, t = b - a**2, d - c**2
    return torch.stack(
        [
            -200 * a * s - (1 - a),
            200 * s + 20.2 * (b - 1) + 19.8 * (d - 1),
            -180 * c * t - (1 - c),
            180 * t + 20.2 * (d - 1) + 19.8 * (b - 1),
        ]
    )


def helical_valley(z: Tensor) -> Tensor:
    a, b, c = z
    turn = torch.atan2(b, a) / (2 * math.pi)
    return torch.stack([10 * (c - 10 * turn), 10 * ((a**2 + b**2).sqrt() - 1), c])


def watson(z: Tensor) -> Tensor:
    """Half the gradient of Watson's sum of 31 squares."""
    n = len(z)
    j = _index(z)
    t = (torch.arange(1, 30, dtype=z.dtype) / 29)[:, None]
    powers = t ** (j - 1)  # (29, n)
    slopes = torch.where(j > 1, (j - 1) * t ** (j - 2).clamp(min=0), 0)
    value = powers @ z
    rest = slopes @ z - value**2 - 1
    g = ((slopes - 2 * value[:, None] * powers) * rest[:, None]).sum(0)
    last = z[1] - z[0] ** 2 - 1
    unit = torch.eye(n, dtype=z.dtype)
    return g + unit[0] * (z[0] - 2 * z[0] * last) + unit[1] * last


def chebyquad(z: Tensor) -> Tensor:
    before, now = torch.ones_like(z), 2 * z - 1
    parts = []
    for i in range(1, len(z) + 1):
        parts.append(now.mean() + (1 / (i * i - 1) if i % 2 == 0 else 0.0))
        before, now = now, 2 * (2 * z - 1) * now - before
    return torch.stack(parts)


def brown_almost_linear(z: Tensor) -> Tensor:
    return torch.cat([z[:-1] + z.sum() - (len(z) + 1), (z.prod() - 1)[None]])


def discrete_boundary_value(z: Tensor) -> Tensor:
    h = 1 / (len(z) + 1)
    padded = torch.nn.functional.pad(z, (1, 1))
    t = _index(z) * h
    return 2 * z - padded[:-2] - padded[2:] + h**2 / 2 * (z + t + 1) ** 3


def discrete_integral_equation(z: Tensor) -> Tensor:
    h = 1 / (len(z) + 1)
    t = _index(z) * h
    cubes = (z + t + 1) ** 3
    low, high = (t * cubes).cumsum(0), ((1 - t) * cubes).flip(0).cumsum(0).flip(0)
    above = torch.cat([high[1:], high.new_zeros(1)])
    return z + h / 2 * ((1 - t) * low + t * above)


def trigonometric(z: Tensor) -> Tensor:
    return len(z) - z.cos().sum() + _index(z) * (1 - z.cos()) - z.sin()


def variably_dimensioned(z: Tensor) -> Tensor:
    j = _index(z)
    s = (j * (z - 1)).sum()
    return z - 1 + j * s * (1 + 2 * s**2)


def broyden_tridiagonal(z: Tensor) -> Tensor:
    padded = torch.nn.functional.pad(z, (1, 1))
    return (3 - 2 * z) * z - padded[:-2] - 2 * padded[2:] + 1


def broyden_banded(z: Tensor) -> Tensor:
    i = _index(z)
    near = (i[None] >= i[:, None] - 5) & (i[None] <= i[:, None] + 1) & (i[None] != i[:, None])
    return z * (2 + 5 * z**2) + 1 - near.to(z.dtype) @ (z * (1 + z))


def hammarling(z: Tensor) -> Tensor:
    """The square root of a matrix that is nearly a Jordan block."""
    n = math.isqrt(len(z))
    root = z.view(n, n)
    target = 1e-4 * torch.eye(n, dtype=z.dtype)
    target[0, 1] = 1
    return (root @ root - target).flatten()


def dennis_schnabel(z: Tensor) -> Tensor:
    return torch.stack([z.sum() - 3, z.square().sum() - 9])


def sample_18(z: Tensor) -> Tensor:
    def over(value: Tensor) -> Tensor:  # (1 - exp(-v^2)) / v
        safe = torch.where(value == 0, 1, value)
        return torch.where(value == 0, 0, -torch.expm1(-(safe**2)) / safe)

    return torch.stack([z[1] ** 2 * over(z[0]), z[0] * over(z[1])])


def sample_19(z: Tensor) -> Tensor:
    return z * z.square().sum()


def scalar_cubic(z: Tensor) -> Tensor:
    return z * (z - 5) ** 2


def freudenstein_roth(z: Tensor) -> Tensor:
    a, b = z
    return torch.stack([-13 + a + ((5 - b) * b - 2) * b, -29 + a + ((b + 1) * b - 14) * b])


def boggs(z: Tensor) -> Tensor:
    a, b = z
    return torch.stack([a**2 - b + 1, a - torch.cos(math.pi * b / 2)])


def chandrasekhar(z: Tensor) -> Tensor:
    n, c = len(z), 0.9
    mu = (_index(z) - 0.5) / n
    return z - 1 / (1 - c / (2 * n) * ((mu[:, None] / (mu[:, None] + mu)) @ z))


def problems() -> list[Problem]:
    """All of them, in the order of the collection."""
    ten = [i / 11 for i in range(1, 11)]
    return [
        Problem("generalized Rosenbrock, 10", rosenbrock, (-1.2, *[1.0] * 9)),
        Problem("Powell singular, 4", powell_singular, (3, -1, 0, 1)),
        Problem("Powell badly scaled, 2", powell_badly_scaled, (0, 1)),
        Problem("Wood, 4", wood, (-3, -1, -3, -1)),
        Problem("helical valley, 3", helical_valley, (-1, 0, 0)),
        Problem("Watson, 6", watson, (0.0,) * 6),
        Problem("Chebyquad, 7", chebyquad, tuple(i / 8 for i in range(1, 8))),
        Problem("Brown almost linear, 10", brown_almost_linear, (0.5,) * 10),
        Problem("discrete boundary value, 10", discrete_boundary_value,
                tuple(t * (t - 1) for t in ten)),
        Problem("discrete integral equation, 10", discrete_integral_equation,
                tuple(t * (t - 1) for t in ten)),
        Problem("trigonometric, 10", trigonometric, (0.1,) * 10),
        Problem("variably dimensioned, 10", variably_dimensioned,
                tuple(1 - j / 10 for j in range(1, 11))),
        Problem("Broyden tridiagonal, 10", broyden_tridiagonal, (-1.0,) * 10),
        Problem("Broyden banded, 10", broyden_banded, (-1.0,) * 10),
        Problem("Hammarling 2 x 2 root, 4", hammarling, (1, 0, 0, 1)),
        Problem("Hammarling 3 x 3 root, 9", hammarling, (1, 0, 0, 0, 1, 0, 0, 0, 1)),
        Problem("Dennis and Schnabel, 2", dennis_schnabel, (1, 5)),
        Problem("sample 18, 2", sample_18, (2, 2)),
        Problem("sample 19, 2", sample_19, (3, 3)),
        Problem("x (x - 5)^2, 1", scalar_cubic, (1.0,)),
        Problem("Freudenstein and Roth, 2", freudenstein_roth, (0.5, -2)),
        Problem("Boggs, 2", boggs, (1, 0)),
        Problem("Chandrasekhar H, 10", chandrasekhar, (1.0,) * 10),
        Problem("extended Rosenbrock, 30", rosenbrock, (-1.2, *[1.0] * 29)),
        Problem("extended Powell singular, 12", powell_singular, (3, -1, 0, 1) * 3),
    ]  # fmt: skip


LIMITS: dict[str, Any] = {"rtol": 0.0, "max_steps": CALLS, "patience": CALLS}
SOLVERS: dict[str, type[deqcore.Solver]] = {
    solver.__name__: solver
    for solver in (deqcore.Picard, deqcore.Anderson, deqcore.Broyden, deqcore.NewtonKrylov)
}
SCIPY = ("hybr", "anderson", "broyden1", "krylov")


def scale_of(g: System, start: Tensor) -> float:
    """s of the module's docstring; -1 where that is no number."""
    value, slope, *_ = torch.func.jvp(g, (start,), (g(start),))
    s = -float(value @ slope / slope.square().sum())
    return s if math.isfinite(s) and s != 0 else -1.0


def by_deqcore(problem: Problem, name: str) -> tuple[Tensor, int, str]:
    """What a solver of ours returns, its calls of g, and its status."""
    start = torch.tensor(problem.start, dtype=torch.float64)
    scale = scale_of(problem.g, start)
    solver = SOLVERS[name](atol=min(1.0, abs(scale)) * GOAL, **LIMITS)
    with torch.no_grad():
        found = deqcore.root(lambda z: scale * problem.g(z[0])[None], start[None], solver=solver)
    return found.value[0], int(found.steps), deqcore.Status(int(found.status)).name.lower()


class _SpentError(Exception):
    """All calls of g are used up."""


def by_scipy(problem: Problem, method: str) -> tuple[Tensor, int, str]:
    """The same of a method of scipy.optimize.root: the best point that it asked for."""
    from scipy.optimize import root

    calls, best = 0, (math.inf, torch.tensor(problem.start, dtype=torch.float64))

    def g(z: Any) -> Any:
        nonlocal calls, best
        if calls == CALLS:
            raise _SpentError
        calls += 1
        point = torch.from_numpy(np.array(z, dtype=np.float64))
        value = problem.g(point)
        norm = float(value.norm())
        if norm < best[0]:
            best = norm, point
        return value.numpy()

    options = {"xtol": 1e-14} if method == "hybr" else {"fatol": GOAL}
    with np.errstate(all="ignore"), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of matrices that are nearly singular
        try:
            found = root(g, np.array(problem.start, dtype=np.float64), method=method,
                         options=options)  # fmt: skip
            status = "converged" if found.success else "stopped"
        except _SpentError:
            status = "max_steps"
        except (ValueError, ArithmeticError, np.linalg.LinAlgError) as error:
            status = type(error).__name__
    return best[1], calls, status


def measure(systems: Sequence[Problem], bar: bool = True) -> list[dict[str, Any]]:
    """A row for each system and solver: `system`, `solver`, `norm`, `calls`, `status`, `solved`."""
    rows: list[dict[str, Any]] = []
    for problem in tqdm(systems, unit="system", disable=None if bar else True):
        for name in (*SOLVERS, *SCIPY):
            value, calls, status = (by_deqcore if name in SOLVERS else by_scipy)(problem, name)
            norm = float(problem.g(value).norm())
            rows.append(
                {
                    "system": problem.name,
                    "solver": name if name in SOLVERS else f"scipy {name}",
                    "norm": norm if math.isfinite(norm) else None,
                    "calls": calls,
                    "status": status,
                    "solved": norm <= SOLVED,
                }
            )
    return rows


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Markdown: calls of g where a system was solved, else the norm that was reached."""
    solvers = list(dict.fromkeys(row["solver"] for row in rows))
    systems = list(dict.fromkeys(row["system"] for row in rows))
    by_key = {(row["system"], row["solver"]): row for row in rows}
    lines = [f"| system | {' | '.join(solvers)} |", "| --- " + "| ---: " * len(solvers) + "|"]
    for system in systems:
        cells = []
        for solver in solvers:
            row = by_key[system, solver]
            norm = "-" if row["norm"] is None else f"({row['norm']:.0e})"
            cells.append(str(row["calls"]) if row["solved"] else norm)
        lines.append(f"| {system} | {' | '.join(cells)} |")
    counts = [sum(by_key[system, solver]["solved"] for system in systems) for solver in solvers]
    lines.append(f"| **solved, of {len(systems)}** | " + " | ".join(map(str, counts)) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="JSON file to write")
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows = measure(problems())
    print(table(rows))
    if options.out is not None:
        content = {"machine": machine(), "calls": CALLS, "goal": GOAL, "solved": SOLVED,
                   "rows": rows}  # fmt: skip
        write_json(options.out, content)
        print(f"written to {options.out}")


if __name__ == "__main__":
    main()
