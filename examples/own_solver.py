"""A solver and an adjoint of your own, in PyTorch alone: no change to deqcore is needed.

``Aitken`` is relaxation by Aitken's delta-squared in the form of Irons and Tuck (1969), as used in
fluid-structure coupling (Kuettler and Wall, Comput. Mech. 43, 2008): a damped step whose factor is
fitted to the last two residuals. Unlike there, a step that made the residual larger is followed by
a plain one. It remembers one residual where Anderson remembers five.

``Neumann`` sums the first terms of the series (I - J^T)^-1 g = g + J^T g + J^T J^T g + ...

    python examples/own_solver.py
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

import deqcore


class Relaxation(NamedTuple):
    """What a step leaves to the next one."""

    g: Tensor  # [B, D] residual f(x) - x
    factor: Tensor  # float64 [B, 1] that it was multiplied by


@dataclass(frozen=True, kw_only=True)
class Aitken(deqcore.Solver):
    """x <- x + factor * damping * (f(x) - x), with one factor for each row.

    Args:
        damping: in (0, 2]; a float, or a function of the step (1, 2, ...).
        bound: the factor's largest size, at least 1.
        rtol, atol, max_steps, patience, check_every, record_trace: see :class:`deqcore.Solver`.
    """

    damping: float | Callable[[int], float] = 1.0
    bound: float = 2.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not callable(self.damping) and not 0 < self.damping <= 2:
            raise ValueError(f"Aitken: damping must be in (0, 2], got {self.damping!r}")
        if not self.bound >= 1:
            raise ValueError(f"Aitken: bound must be at least 1, got {self.bound!r}")

    def begin(self, x: Tensor) -> Relaxation:
        return Relaxation(
            torch.zeros_like(x), torch.ones(len(x), 1, dtype=torch.float64, device=x.device)
        )

    def step(
        self, history: Relaxation, x: Tensor, f: Tensor, info: deqcore.StepInfo
    ) -> tuple[Relaxation, Tensor]:
        g = f - x
        change = g - history.g
        size = info.dot(change, change)
        known = info.improved & (info.steps > 1) & (size > 0)  # else a plain step
        fitted = -history.factor * info.dot(history.g, change) / torch.where(known, size, 1)
        factor = torch.where(known, fitted.clamp(-self.bound, self.bound), 1.0)
        return Relaxation(g, factor), x + factor.to(x.dtype) * info.damping * g


@dataclass(frozen=True)
class Neumann(deqcore.Adjoint):
    """The gradient by the first ``terms`` + 1 terms of the Neumann series at the solution."""

    terms: int = 5

    def solve(
        self, problem: deqcore.Problem, z0: Tensor, solver: deqcore.Solver, record: Any
    ) -> tuple[Tensor, deqcore.Solved]:
        solved = problem.solve(z0, solver)
        if not torch.is_grad_enabled():
            return solved.value, solved
        z = solved.value.clone().requires_grad_()
        f = problem(z)
        if not f.requires_grad:
            return solved.value, solved
        return solved.with_gradient_of(_NeumannSeries.apply(f, z, self.terms)), solved


class _NeumannSeries(torch.autograd.Function):
    """f in forward; in backward, u = g + J^T u a few times from u = g."""

    @staticmethod
    def forward(ctx: Any, f: Tensor, z: Tensor, terms: int) -> Tensor:
        ctx.terms = terms
        ctx.graph = f, z
        return f.clone()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        f, z = ctx.graph
        u = grad
        for _ in range(ctx.terms):
            u = grad + torch.autograd.grad(f, z, u, retain_graph=True, materialize_grads=True)[0]
        return u, None, None


class Cell(torch.nn.Module):
    """z -> tanh(W z + x), with W scaled to a contraction."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear = torch.nn.Linear(width, width)

    def forward(self, z: Tensor, x: Tensor) -> Tensor:
        return torch.tanh(0.9 * self.linear(z) + x)


def main() -> dict[str, Any]:
    """Solve with both, and compare with what deqcore brings."""
    torch.manual_seed(0)
    cell = Cell(64)
    x = torch.randn(16, 64)
    steps, gradients = {}, {}
    for solver in (deqcore.Picard(), Aitken(), deqcore.Anderson()):
        with torch.no_grad():
            solution = deqcore.fixed_point(cell, torch.zeros_like(x), x, solver=solver)
        solution.raise_for_status()
        steps[type(solver).__name__] = int(solution.steps.max())
    layer = deqcore.ImplicitLayer(cell, solver=Aitken(rtol=1e-6))
    implicit = deqcore.Implicit(solver=Aitken(rtol=1e-6))
    for adjoint in (implicit, deqcore.Unrolled(), Neumann(terms=20), Neumann(terms=1)):
        layer.adjoint = adjoint
        loss = layer(x).square().sum()
        gradients[str(adjoint)] = torch.autograd.grad(loss, cell.linear.weight)[0]
    exact, *others = gradients.items()
    print("steps:", ", ".join(f"{name} {count}" for name, count in steps.items()))
    for name, gradient in others:
        error = (gradient - exact[1]).norm() / exact[1].norm()
        print(f"{name}: {error:.1e} from the implicit gradient")
    square = deqcore.root(lambda z: (2 - z * z) / 4, torch.ones(3, 1), solver=Aitken())
    print("square root of 2:", square.value.flatten().tolist())
    return {"steps": steps, "gradients": gradients, "root": square.value}


if __name__ == "__main__":
    main()
