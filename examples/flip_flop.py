"""A DEQ sequence model against an explicit stack of the same cell: what depth buys, and its price.

The task is flip-flop language (Liu et al. 2023, arXiv 2306.00946): each symbol writes a bit or is
noise that must be ignored, and the model names the bit written last, however long ago.

The cell is a gated, causal, weight-tied convolution of width 2 like that of TrellisNet (Bai et al.
2019, arXiv 1810.06682). Each application sees one symbol further back: a stack of L cells knows
nothing of what is L or more symbols away, while the equilibrium has the whole past. Both have the
same parameters. The equilibrium is one problem a sequence, which takes more evaluations the
longer its stretches of noise, and its training keeps one application in memory.

A recurrent network would do the task in as many steps as there are symbols, one after the other.

    python examples/flip_flop.py [--small] [--out FOLDER]
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

import deqcore

WRITES = 0.15  # of the symbols; the others are noise


def flip_flop(count: int, length: int) -> tuple[Tensor, Tensor, Tensor]:
    """Symbols (count, length) in 0..3, the bit written last, and how many symbols ago."""
    bit = torch.randint(0, 2, (count, length))
    write = torch.rand(count, length) < WRITES
    write[:, 0] = True
    place = torch.where(write, torch.arange(length), 0).cummax(1).values
    return bit + 2 * write, bit.gather(1, place), torch.arange(length) - place


class Cell(nn.Module):
    """z_t <- gate * tanh(...) + (1 - gate) * z_{t-1}, both of x_t and z_{t-1}."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.mix = nn.Linear(2 * width, 2 * width)

    def forward(self, z: Tensor, x: Tensor) -> Tensor:  # (B, T, C), (B, T, C) -> (B, T, C)
        before = F.pad(z, (0, 0, 1, -1))
        gate, new = self.mix(torch.cat([before, x], -1)).chunk(2, -1)
        return torch.lerp(before, torch.tanh(new), torch.sigmoid(gate))


class Stack(nn.Module):
    """The same cell, applied ``depth`` times from zero."""

    def __init__(self, cell: Cell, depth: int) -> None:
        super().__init__()
        self.cell, self.depth = cell, depth

    def forward(self, x: Tensor) -> Tensor:
        z = torch.zeros_like(x)
        for _ in range(self.depth):
            z = self.cell(z, x)
        return z


class Model(nn.Module):
    """Embedding, body, a linear read-out at each place."""

    def __init__(self, depth: int | None, width: int = 16) -> None:
        super().__init__()
        self.embed = nn.Embedding(4, width)
        # A bit that travels through noise moves at a steady residual: patience, that is no stall.
        solver = deqcore.Picard(rtol=1e-3, max_steps=200, patience=200)
        cell = Cell(width)
        implicit = deqcore.ImplicitLayer(cell, solver, deqcore.Implicit(solver=solver))
        self.body = Stack(cell, depth) if depth else implicit
        self.read = nn.Linear(width, 2)

    def forward(self, symbols: Tensor) -> Tensor:  # (B, T) -> (B, T, 2)
        return self.read(self.body(self.embed(symbols)))


def train(model: Model, steps: int, label: str) -> None:
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in tqdm(range(steps), desc=label, leave=False):
        symbols, bits, _ = flip_flop(32, 32)
        optimizer.zero_grad()
        F.cross_entropy(model(symbols).flatten(0, 1), bits.flatten()).backward()
        optimizer.step()


def kept_bytes(model: Model, length: int) -> int:
    """Of what autograd keeps between forward and backward, without parameters; one sequence."""
    kept: dict[int, int] = {}
    parameters = {p.data_ptr() for p in model.parameters()}

    def pack(x: Tensor) -> Tensor:
        storage = x.untyped_storage()
        if storage.data_ptr() not in parameters:
            kept[storage.data_ptr()] = storage.nbytes()
        return x

    symbols, _, _ = flip_flop(1, length)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        logits = model(symbols)  # alive here, so that no address is used twice
    del logits
    return sum(kept.values())


def by_distance(right: Tensor, distance: Tensor) -> Tensor:
    """Share of right answers among places 0, 1, ... symbols after the last write."""
    distance = distance.flatten()
    return torch.bincount(distance, right.flatten()) / torch.bincount(distance)


def draw(folder: Path, curves: dict[str, Tensor], steps: Tensor, longest: Tensor) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    for (name, curve), colour in zip(
        curves.items(), ("#E69F00", "#0072B2", "#009E73"), strict=True
    ):
        left.plot(100 * curve[:31], label=name, color=colour, lw=2)
    left.axhline(50, color="grey", ls=":", label="guessing")
    left.set(xlabel="symbols since the last write", ylabel="right answers (%)", ylim=(0, 104))
    left.legend(loc="lower left", frameon=False)
    right.plot(longest, steps, "o", color="#009E73", alpha=0.4, mew=0)
    right.axline((0, 0), slope=1, color="grey", ls=":")
    right.set(xlabel="longest stretch of noise in a sequence", ylabel="evaluations of its solve")
    right.set(xlim=(0, None), ylim=(0, None))
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
    folder.mkdir(parents=True, exist_ok=True)
    figure.savefig(folder / "flip_flop.png", dpi=110)


def main(arguments: list[str] | None = None) -> dict[str, dict[str, float]]:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--small", action="store_true", help="fewer steps, a few seconds")
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="for flip_flop.png")
    options = parser.parse_args(arguments)

    torch.manual_seed(1)
    symbols, bits, distance = flip_flop(256, 128)
    curves, figures, report = {}, {}, None
    for name, depth in (("stack of 4", 4), ("stack of 8", 8), ("equilibrium", None)):
        torch.manual_seed(0)
        model = Model(depth)
        train(model, 30 if options.small else 200, name)
        with torch.no_grad():
            right = (model(symbols).argmax(-1) == bits).double()
        if isinstance(model.body, deqcore.ImplicitLayer):
            report = model.body.report  # of this solve
        curves[name] = by_distance(right, distance)
        figures[name] = {
            "accuracy": float(right.mean()),
            "far": float(right[distance >= 8].mean()),
            "kilobytes": kept_bytes(model, 128) / 1e3,
            "parameters": sum(p.numel() for p in model.parameters()),
        }
        print(
            f"{name:12} {figures[name]['parameters']} parameters, "
            f"{figures[name]['kilobytes']:3.0f} kB kept for a sequence of 128; right answers "
            f"{figures[name]['accuracy']:.1%}, 8 or more symbols after a write "
            f"{figures[name]['far']:.1%}"
        )
    assert report is not None
    report.raise_for_status()
    print(f"its solves take {report.steps.min()} to {report.steps.max()} evaluations a sequence")
    if options.out is not None:
        draw(options.out, curves, report.steps, distance.max(1).values)
    return figures


if __name__ == "__main__":
    main()
