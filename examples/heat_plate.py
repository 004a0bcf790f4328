# %% [markdown]
# # Heat in equilibrium, and who put it there
#
# A plate with cold edges is heated by a source, conducts, and radiates with the fourth power of its
# temperature u (all without dimensions; 1 is the temperature of the surroundings):
#
#     -Δu = q - β (u⁴ - 1),   u = 1 at the edges.
#
# With the inverse Laplacian on both sides this is a fixed point. Plain iteration diverges here, as
# radiation is steep; Anderson's and Broyden's methods need about a dozen evaluations. The answers
# are compared with scipy's. Then the inverse problem: find the heater from twelve noisy sensors,
# by the gradients of the equilibrium that the implicit function theorem gives.
#
# As a script: `python examples/heat_plate.py [--small] [--out FOLDER]`

# %%
import argparse
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import scipy.optimize
import torch
from matplotlib import pyplot as plt
from torch import Tensor

import deqcore

parser = argparse.ArgumentParser(description="Heat in equilibrium, and who put it there")
parser.add_argument("--small", action="store_true", help="a coarse grid, a few seconds")
parser.add_argument("--out", type=Path, metavar="FOLDER", help="for heat_plate.png")
options = parser.parse_args(sys.argv[1:] if "__file__" in globals() else [])  # not in a notebook

torch.manual_seed(0)
torch.set_default_dtype(torch.float64)

# %% [markdown]
# The plate: five-point differences, whose inverse is products with the sine transform's matrix.

# %%
n = 12 if options.small else 24  # inner points a side
grid = torch.arange(1, n + 1) / (n + 1)
sines = torch.sin(torch.pi * torch.outer(torch.arange(1, n + 1), grid)) * (2 / (n + 1)) ** 0.5
values = (2 * (n + 1) * torch.sin(torch.pi * torch.arange(1, n + 1) / (2 * (n + 1)))) ** 2


def inverse_laplacian(q: Tensor) -> Tensor:  # (..., n, n) -> (..., n, n)
    return sines @ ((sines @ q @ sines) / (values[:, None] + values)) @ sines


def heater(x: Tensor, y: Tensor, power: Tensor) -> Tensor:
    square = (grid[:, None] - x) ** 2 + (grid - y) ** 2
    return power * torch.exp(-square / (2 * 0.08**2))


def plate(u: Tensor, q: Tensor, beta: Tensor) -> Tensor:  # (B, n, n)
    return 1 + inverse_laplacian(q - beta * (u**4 - 1))


# %% [markdown]
# ## The equilibrium, by us and by scipy
#
# Both solve u - plate(u) = 0 from u = 1; an evaluation is one call of `plate`. Times are of one
# thread on the machine that ran this, conversions between numpy and torch included.

# %%
truth = {"x": 0.3, "y": 0.6, "power": 200.0, "beta": 3.0}
x, y, power, beta = map(torch.tensor, truth.values())
q, cold = heater(x, y, power), torch.ones(1, n, n)
exact: dict[str, Any] = {"rtol": 1e-12, "atol": 0.0, "max_steps": 200, "record_trace": True}
solvers = [
    deqcore.Picard(**exact),
    deqcore.Anderson(**exact),
    deqcore.Broyden(**exact),
    deqcore.NewtonKrylov(**exact),
]
solutions = {}
with torch.no_grad():
    for solver in solvers:
        start = time.thread_time()
        solution = deqcore.fixed_point(plate, cold, q, beta, solver=solver)
        taken = time.thread_time() - start
        name = type(solver).__name__
        solutions[name] = solution
        status = deqcore.Status(int(solution.status)).name.lower()
        print(f"{name:14} {solution.steps.item():4} evaluations, {1e3 * taken:6.1f} ms, {status}")

# %%
u = solutions["Anderson"].value
differences = {}
for method, tolerances in {
    "hybr": {"xtol": 1e-13},
    "krylov": {"fatol": 1e-12},
    "anderson": {"fatol": 1e-12},
    "df-sane": {"ftol": 0.0, "fatol": 1e-11},
}.items():
    evaluations = 0

    def residual(flat: np.ndarray) -> np.ndarray:
        global evaluations
        evaluations += 1
        with torch.no_grad():
            guess = torch.from_numpy(flat).view(1, n, n)
            return (plate(guess, q, beta) - guess).flatten().numpy()

    start = time.thread_time()
    found = scipy.optimize.root(residual, cold.flatten(), method=method, options=tolerances)
    taken = time.thread_time() - start
    assert found.success, method
    differences[method] = (torch.from_numpy(found.x) - u.flatten()).abs().max().item()
    print(
        f"scipy {method:8} {evaluations:4} evaluations, {1e3 * taken:6.1f} ms, "
        f"at most {differences[method]:.0e} from Anderson's answer"
    )

# %% [markdown]
# ## The inverse problem
#
# Twelve sensors with noise of 0.01, and four unknowns: where the heater is, its power, and β. Only
# the solve is implicit; the fit is least squares by PyTorch's L-BFGS from a wrong guess. Its
# gradients come from one linear solve each and hold no iterate of the forward solve.

# %%
place = torch.randint(0, n, (2, 12))
measured = u[0, place[0], place[1]] + 0.01 * torch.randn(12)
unit = torch.tensor([0.5, 0.5, 100.0, 1.0])
guess = torch.ones(4, requires_grad=True)  # of x, y, power and beta in these units
solver = deqcore.Anderson(rtol=1e-10, atol=0.0, max_steps=200)
adjoint = deqcore.Implicit(solver=solver)


def equilibrium(parameters: Tensor) -> Tensor:
    x, y, power, beta = parameters * unit
    args = heater(x, y, power), beta
    solution = deqcore.fixed_point(plate, cold, *args, solver=solver, adjoint=adjoint)
    solution.raise_for_status()
    return solution.value[0]


def loss(parameters: Tensor) -> Tensor:
    return (equilibrium(parameters)[place[0], place[1]] - measured).square().sum()


(gradient,) = torch.autograd.grad(loss(guess), guess)
with torch.no_grad():
    small = 1e-5 * torch.eye(4)
    slopes = torch.stack([(loss(guess + h) - loss(guess - h)) / 2e-5 for h in small])
gradient_error = ((gradient - slopes).norm() / slopes.norm()).item()
print(f"implicit gradient against central differences: {gradient_error:.0e}")

# %%
optimizer = torch.optim.LBFGS([guess], max_iter=60, line_search_fn="strong_wolfe")
losses: list[float] = []


def closure() -> Tensor:
    optimizer.zero_grad()
    value = loss(guess)
    value.backward()
    losses.append(value.item())
    return value


optimizer.step(closure)
estimate = dict(zip(truth, (guess * unit).tolist(), strict=True))
for name, value in estimate.items():
    print(f"{name:6} found {value:7.3f}, true {truth[name]:7.3f}")
print(f"loss {losses[0]:.2e} -> {min(losses):.2e} in {len(losses)} solves")

# %%
figure, (left, middle, right) = plt.subplots(1, 3, figsize=(12, 3.7), layout="constrained")
for name, solution in solutions.items():
    assert solution.trace is not None  # record_trace was asked for
    (trace,) = solution.trace
    right.semilogy(range(1, len(trace) + 1), trace, label=name, lw=2)
right.set(xlim=(0, 40), ylim=(1e-13, 1e2), xlabel="evaluations", title="residual")
right.legend(frameon=False, loc="center right")
with torch.no_grad():
    error = equilibrium(guess) - u[0]
warmth = left.imshow(u[0].T, origin="lower", extent=(0, 1, 0, 1), cmap="inferno", vmin=1)
left.set_title("equilibrium, and its sensors")
most = error.abs().max().item()
off = {"cmap": "RdBu_r", "vmin": -most, "vmax": most}
wrong = middle.imshow(error.T, origin="lower", extent=(0, 1, 0, 1), **off)
middle.set_title("error of what the sensors tell")
middle.plot(estimate["x"], estimate["y"], "x", color="black", ms=9, mew=2)
middle.set_xlabel("circle: true heater, cross: found")
for axes, image, colour in ((left, warmth, "white"), (middle, wrong, "black")):
    axes.plot(*grid[place], "s", color=colour, ms=4)
    axes.plot(truth["x"], truth["y"], "o", color="#56B4E9", mfc="none", ms=11, mew=2)
    figure.colorbar(image, ax=axes)
if options.out is not None:
    options.out.mkdir(parents=True, exist_ok=True)
    figure.savefig(options.out / "heat_plate.png", dpi=90)
torch.set_default_dtype(torch.float32)
