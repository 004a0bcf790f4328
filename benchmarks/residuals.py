"""Pictures of docs/choosing.md: residuals of each solver, and errors of each adjoint's gradient.

    python -m benchmarks.residuals --out docs/images

Nothing is timed: what is plotted are evaluations of f and products with its Jacobian, which are the
same on any machine up to rounding.
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

import deqcore
from lion_models.base.files import save_figure

ROWS, DIM = 8, 128
SOLVERS: dict[str, tuple[deqcore.Solver, str]] = {
    "Picard": (deqcore.Picard(), "#7f7f7f"),
    "Anderson": (deqcore.Anderson(), "#1f77b4"),
    "Broyden": (deqcore.Broyden(), "#d95f02"),
    "NewtonKrylov": (deqcore.NewtonKrylov(), "#2ca02c"),
}
MOST = 120  # evaluations that are shown

Problem = tuple[Callable[[Tensor], Tensor], Tensor]


def tanh_cell(gain: float) -> Problem:
    """tanh(W z + b), W Gaussian with a spectral radius of about ``gain``."""
    generator = torch.Generator().manual_seed(0)
    weight = gain / DIM**0.5 * torch.randn(DIM, DIM, generator=generator, dtype=torch.float64)
    bias = torch.randn(ROWS, DIM, generator=generator, dtype=torch.float64)
    return lambda z: torch.tanh(z @ weight.T + bias), torch.zeros(ROWS, DIM, dtype=torch.float64)


def slow_contraction() -> Problem:
    """A z + b, A symmetric with eigenvalues from 0 to 0.99."""
    generator = torch.Generator().manual_seed(0)
    q, _ = torch.linalg.qr(torch.randn(DIM, DIM, generator=generator, dtype=torch.float64))
    matrix = q @ torch.diag(torch.linspace(0, 0.99, DIM, dtype=torch.float64)) @ q.T
    bias = torch.randn(ROWS, DIM, generator=generator, dtype=torch.float64)
    return lambda z: z @ matrix + bias, torch.zeros(ROWS, DIM, dtype=torch.float64)


def reaction() -> Problem:
    """u'' = u^3 - load on 32 points, as f(u) = u + u'' - u^3 + load: no contraction anywhere."""
    load = torch.linspace(0.5, 8, ROWS, dtype=torch.float64)[:, None]

    def f(u: Tensor) -> Tensor:
        padded = torch.nn.functional.pad(u, (1, 1))
        return u + padded[:, 2:] - 2 * u + padded[:, :-2] - u**3 + load

    return f, torch.zeros(ROWS, 32, dtype=torch.float64)


PROBLEMS: dict[str, Callable[[], Problem]] = {
    "tanh cell, gain 0.5\na contraction": lambda: tanh_cell(0.5),
    "tanh cell, gain 2\nweights that have grown": lambda: tanh_cell(2.0),
    "linear map\nspectral radius 0.99": slow_contraction,
    "reaction and diffusion\nexpands everywhere": reaction,
}


def traces(problem: Problem, solver: deqcore.Solver) -> Tensor:
    """Smallest relative residual so far, [ROWS, evaluations]."""
    f, z0 = problem
    long = dataclasses.replace(
        solver, rtol=1e-12, atol=0.0, max_steps=MOST, patience=MOST, record_trace=True
    )
    solution = deqcore.fixed_point(f, z0, solver=long)
    assert solution.trace is not None
    scale = f(solution.value).square().mean(1).sqrt()[:, None]
    return (solution.trace / scale).cummin(1).values


def draw_residuals(path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.2, 6.0), layout="constrained")
    axes = figure.subplots(2, 2, sharex=True, sharey=True)  # four in a row are too small on a phone
    for axis, (title, make) in zip(axes.flat, PROBLEMS.items(), strict=True):
        for name, (solver, colour) in SOLVERS.items():
            rows = traces(make(), solver)
            middle, steps = rows.median(0).values, range(1, rows.shape[1] + 1)
            axis.fill_between(steps, rows.amin(0), rows.amax(0), color=colour, alpha=0.15, lw=0)
            axis.plot(steps, middle, color=colour, label=name)
        axis.axhline(1e-4, color="black", lw=0.7, ls=":")
        axis.set(title=title, yscale="log", xlim=(1, MOST))
        axis.set_ylim(1e-12, 10)
        axis.grid(alpha=0.3)
    for axis in axes[-1]:
        axis.set_xlabel("evaluations of f")
    for axis in axes[:, 0]:
        axis.set_ylabel("relative residual")
    axes[0, 0].legend(fontsize=8, loc="lower right")
    save_figure(path, figure)


def gradient_errors(adjoint: deqcore.Adjoint, gain: float) -> tuple[float, int]:
    """Relative error of the gradient of a loss by the bias, and products of the backward pass."""
    f, z0 = tanh_cell(gain)
    generator = torch.Generator().manual_seed(1)
    shift = torch.zeros_like(z0, requires_grad=True)
    target = torch.randn(z0.shape, generator=generator, dtype=torch.float64)
    solver = deqcore.Anderson(rtol=1e-10, atol=0.0, max_steps=300, patience=300)

    def gradient(adjoint: deqcore.Adjoint) -> tuple[Tensor, deqcore.Solution]:
        solution = deqcore.fixed_point(
            lambda z, shift: f(z + shift), z0, shift, solver=solver, adjoint=adjoint
        )
        (found,) = torch.autograd.grad((solution.value - target).square().sum(), shift)
        return found, solution

    exact, _ = gradient(deqcore.Implicit(solver=solver))
    found, solution = gradient(adjoint)
    products = adjoint.steps if isinstance(adjoint, deqcore.Phantom) else solution.evaluations
    if solution.backward is not None:
        products = int(solution.backward.steps.max())
    return float((found - exact).norm() / exact.norm()), products


def draw_gradients(path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 3.2), layout="constrained")
    axes = figure.subplots(1, 2, sharey=True)
    kinds: dict[str, tuple[list[deqcore.Adjoint], str]] = {
        "Implicit, rtol from 0.1 to 1e-8": (
            [
                deqcore.Implicit(
                    solver=deqcore.Anderson(rtol=10.0**-k, atol=0.0, max_steps=100, patience=100)
                )
                for k in range(1, 9)
            ],
            "#1f77b4",
        ),
        "Phantom, 1 to 40 steps": (
            [deqcore.Phantom(steps=steps) for steps in (1, 2, 3, 5, 8, 12, 20, 30, 40)],
            "#d95f02",
        ),
        "Unrolled": ([deqcore.Unrolled()], "#2ca02c"),
    }
    for axis, gain in zip(axes, (0.5, 1.2), strict=True):
        for name, (adjoints, colour) in kinds.items():
            errors, products = zip(
                *(gradient_errors(adjoint, gain) for adjoint in adjoints), strict=True
            )
            axis.plot(products, errors, "o-", ms=4, color=colour, label=name)
        axis.set(title=f"tanh cell, gain {gain}", xlabel="products with the Jacobian", yscale="log")
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("relative error of the gradient")
    axes[0].legend(fontsize=8)
    save_figure(path, figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("docs/images"), help="folder to write to")
    folder = parser.parse_args().out
    draw_residuals(folder / "residuals.png")
    draw_gradients(folder / "gradients.png")


if __name__ == "__main__":
    main()
