# %% [markdown]
# # An implicit layer on two moons
#
# A layer that is defined by an equation, z = tanh(W z + U x + b), instead of by a number of steps.
# It separates scikit-learn's two moons, which no linear classifier does. The solver finds z for
# each point by itself and says how near it came and in how many steps; gradients come from the
# implicit function theorem, so training keeps one application of the cell in memory, not one for
# each step.
#
# As a script: `python examples/two_moons.py [--small] [--out FOLDER]`

# %%
import argparse
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from matplotlib import pyplot as plt
from sklearn.datasets import make_moons
from torch import Tensor, nn

import deqcore
from deqcore.normalization import spectral_normalize

parser = argparse.ArgumentParser(description="An implicit layer on two moons")
parser.add_argument("--small", action="store_true", help="fewer steps, a second or two")
parser.add_argument("--out", type=Path, metavar="FOLDER", help="for two_moons.png")
options = parser.parse_args(sys.argv[1:] if "__file__" in globals() else [])  # not in a notebook

# %% [markdown]
# The cell is any module of the state and the input; `ImplicitLayer` does the rest. With a norm of W
# below 1 the cell is a contraction, so that there is one solution and every solver finds it.


# %%
class Cell(nn.Module):
    """z -> tanh(W z + U x + b)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.state = spectral_normalize(nn.Linear(width, width, bias=False), bound=0.95)
        self.input = nn.Linear(2, width)

    def forward(self, z: Tensor, x: Tensor) -> Tensor:  # (B, width), (B, 2) -> (B, width)
        return torch.tanh(self.state(z) + self.input(x))


class Classifier(nn.Module):
    def __init__(self, width: int = 24) -> None:
        super().__init__()
        self.layer = deqcore.ImplicitLayer(Cell(width), solver=deqcore.Anderson(rtol=1e-4))
        self.read = nn.Linear(width, 1)
        self.width = width

    def forward(self, x: Tensor) -> Tensor:  # (B, 2) -> (B,), the logit of the second moon
        return self.read(self.layer(x, z0=x.new_zeros(len(x), self.width))).squeeze(1)


def moons(seed: int) -> tuple[Tensor, Tensor]:
    points, labels = make_moons(300, noise=0.15, random_state=seed)
    return torch.tensor(points).float(), torch.tensor(labels).float()


# %% [markdown]
# Training is PyTorch's own loop.

# %%
torch.manual_seed(0)
model = Classifier()
optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
x, y = moons(seed=0)
for _ in range(40 if options.small else 200):
    optimizer.zero_grad()
    F.binary_cross_entropy_with_logits(model(x), y).backward()
    optimizer.step()
report = model.layer.report  # of the last solve, and of its backward
assert report
assert report.backward
print(f"last step: {report.steps.float().mean():.1f} evaluations a point forward,", end=" ")
print(f"{report.backward.steps.float().mean():.1f} backward")

# %%
x_test, y_test = moons(seed=1)
with torch.no_grad():
    accuracy = ((model(x_test) > 0) == y_test.bool()).double().mean().item()
assert model.layer.report
model.layer.report.raise_for_status()  # each point's equation is solved, or this says why not
print(f"right on {accuracy:.1%} of 300 new points")

# %% [markdown]
# What each solver makes of the trained layer: the residuals of 300 points, and, over the plane, how
# many evaluations a point takes. Each point is a problem of its own and stops when it is done.

# %%
solvers = {
    "Picard": deqcore.Picard(rtol=1e-6, max_steps=200, record_trace=True),
    "Anderson": deqcore.Anderson(rtol=1e-6, max_steps=200, record_trace=True),
    "Broyden": deqcore.Broyden(rtol=1e-6, max_steps=200, record_trace=True),
}
traces: dict[str, Tensor] = {}
steps = {}
with torch.no_grad():
    for name, solver in solvers.items():
        z0 = torch.zeros(300, model.width)
        solution = deqcore.fixed_point(model.layer.cell, z0, x_test, solver=solver)
        assert solution.trace is not None  # record_trace asks for it
        traces[name], steps[name] = solution.trace, solution.steps.double().mean().item()
        print(f"{name:8} {int(solution.converged.sum())} of 300 points, {steps[name]:.1f} steps")

    side = 60 if options.small else 160
    across, up = torch.linspace(-1.7, 2.7, side), torch.linspace(-1.2, 1.7, side)
    plane = torch.cartesian_prod(across, up)
    logits = model(plane).view(side, side).T
    taken = model.layer.report.steps.view(side, side).T

# %%
figure, (left, middle, right) = plt.subplots(1, 3, figsize=(12, 3.7), layout="constrained")
left.contourf(across, up, logits.sigmoid(), levels=11, cmap="RdBu_r", alpha=0.45)
left.contour(across, up, logits, levels=[0], colors="black")
left.scatter(*x_test.T, c=y_test, cmap="RdBu_r", s=14, edgecolors="white", linewidths=0.5)
left.set_title(f"decision, {accuracy:.1%} of new points right")

drawn = middle.pcolormesh(across, up, taken, cmap="viridis", rasterized=True)
middle.contour(across, up, logits, levels=[0], colors="white", linewidths=1)
figure.colorbar(drawn, ax=middle)
middle.set_title("evaluations by Anderson, to 1e-4")

styles = (("#E69F00", "-"), ("#0072B2", "-"), ("#009E73", "--"))
for (name, trace), (colour, line) in zip(traces.items(), styles, strict=True):
    low, half, high = trace.quantile(torch.tensor([0.1, 0.5, 0.9]), dim=0)
    count = range(1, len(half) + 1)
    right.semilogy(count, half, color=colour, ls=line, lw=2, label=name)
    right.fill_between(count, low, high, color=colour, alpha=0.2, lw=0)
right.set(xlabel="evaluations", xlim=(0, 40), title="residual: median, and 80% of points")
right.legend(frameon=False)
if options.out is not None:
    options.out.mkdir(parents=True, exist_ok=True)
    figure.savefig(options.out / "two_moons.png", dpi=90)
