"""Memory of a process over 10,000 solves with gradients: it should not grow.

    python -m benchmarks.memory_growth --out benchmarks/results/memory_growth

Each round is one solve and one backward pass, of solvers, adjoints and ways of taking a batch in
turn; every tenth fails inside f. Written down are the memory that the operating system counts
(VmRSS), what Python has allocated (tracemalloc) and the objects that its collector knows.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import itertools
import platform
import tracemalloc
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

import deqcore
from deqcore import Anderson, Broyden, Implicit, Phantom, Picard, Unrolled
from lion_models.base.files import save_figure, write_json

ROUNDS = 10_000
POINTS = 200
WARM_UP = 1000  # rounds, after which everything that is kept has been made
BATCH, DIM = 8, 64


class _FailedError(Exception):
    """Raised inside f, on purpose."""


class Cell(nn.Module):
    """tanh(W z + x), with a norm whose statistics are updated."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(DIM, DIM)
        self.norm = nn.BatchNorm1d(DIM)
        nn.init.normal_(self.linear.weight, std=0.3 / DIM**0.5)

    def forward(self, z: Tensor, x: Tensor) -> Tensor:
        return torch.tanh(self.norm(self.linear(z)) * 0.3 + x)


def rounds() -> Iterator[Callable[[], None]]:
    """Rounds without end."""
    torch.manual_seed(0)
    cell, x = Cell(), torch.randn(BATCH, DIM)
    z0 = torch.zeros(BATCH, DIM)
    ways: list[dict[str, Any]] = [
        {"solver": Anderson()},
        {"solver": Broyden(), "adjoint": Implicit(reuse_forward=True)},
        {"solver": Picard(), "adjoint": Phantom()},
        {"solver": Anderson(max_steps=10), "adjoint": Unrolled()},
        {"solver": Anderson(), "batch": "coupled"},
    ]

    def solve(way: dict[str, Any], fails: bool) -> None:
        cell.train(way.get("batch") == "coupled")
        cell.zero_grad()
        calls = 0

        def f(z: Tensor, x: Tensor) -> Tensor:
            nonlocal calls
            calls += 1
            if fails and calls == 3:
                raise _FailedError
            return cell(z, x)

        with contextlib.suppress(_FailedError):
            deqcore.fixed_point(f, z0, x, **way).value.square().mean().backward()

    for number, way in enumerate(itertools.cycle(ways)):
        yield partial(solve, way, number % 10 == 9)


def resident() -> int:
    """VmRSS of this process in bytes; Linux alone tells."""
    text = Path("/proc/self/status").read_text()
    return 1024 * int(text.split("VmRSS:")[1].split()[0])


def measure(count: int = ROUNDS, points: int = POINTS, bar: bool = True) -> dict[str, list[int]]:
    """`round`, `resident`, `python` (bytes) and `objects` at so many points of ``count`` rounds."""
    figures: dict[str, list[int]] = {"round": [], "resident": [], "python": [], "objects": []}
    every = max(1, count // points)
    tracemalloc.start()
    try:
        work = tqdm(itertools.islice(rounds(), count), total=count, disable=None if bar else True)
        for number, solve in enumerate(work, 1):
            solve()
            if number % every:
                continue
            gc.collect()
            figures["round"].append(number)
            figures["resident"].append(resident())
            figures["python"].append(tracemalloc.get_traced_memory()[0])
            figures["objects"].append(len(gc.get_objects()))
    finally:
        tracemalloc.stop()
    return figures


def warm_up(figures: dict[str, list[int]]) -> int:
    return min(WARM_UP, figures["round"][-1] // 4)


def growth(figures: dict[str, list[int]], what: str, after: int) -> float:
    """By least squares, for each round after so many."""
    pairs = [(n, y) for n, y in zip(figures["round"], figures[what], strict=True) if n > after]
    n, y = (torch.tensor(column, dtype=torch.float64) for column in zip(*pairs, strict=True))
    return float(((n - n.mean()) * (y - y.mean())).sum() / (n - n.mean()).square().sum())


def draw(figures: dict[str, list[int]], path: Path) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8.6, 5.2), dpi=130, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(2, 1, sharex=True)
    count = figures["round"][-1]
    figure.suptitle(f"Memory over {count:,} solves with gradients, every tenth of which fails")
    for axis, what, label, colour, unit in (
        (axes[0], "resident", "of the process (VmRSS), MB", "#0072B2", 1e6),
        (axes[1], "python", "Python's own (tracemalloc), kB", "#D55E00", 1e3),
    ):
        values = [value / unit for value in figures[what]]
        after = warm_up(figures)
        slope = growth(figures, what, after)
        axis.plot(figures["round"], values, color=colour, linewidth=1.8)
        axis.set_ylim(0, 1.25 * max(values))
        axis.set_ylabel(label)
        axis.grid(color="#E4E4E4")
        axis.spines[["top", "right"]].set_visible(False)
        text = f"{slope:+.1f} bytes a solve after {after}"
        axis.text(0.99, 0.08, text, transform=axis.transAxes, ha="right", color=colour)
    axes[1].set_xlabel("solves")
    save_figure(path, figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--out", type=Path, help="where to write OUT.json and OUT.png")
    options = parser.parse_args()
    torch.set_num_threads(1)
    figures = measure(options.rounds)
    after = warm_up(figures)
    slopes = {what: growth(figures, what, after) for what in ("resident", "python", "objects")}
    for what, slope in slopes.items():
        unit = "" if what == "objects" else " bytes"
        print(f"{what:9} {figures[what][-1]:,}{unit}, {slope:+.3f} a solve after {after}")
    if options.out is not None:
        about = {"torch": torch.__version__, "machine": platform.machine(), "batch": BATCH,
                 "dim": DIM, "growth_a_solve": slopes}  # fmt: skip
        write_json(options.out.with_suffix(".json"), about | {"figures": figures})
        draw(figures, options.out.with_suffix(".png"))
        print(f"written to {options.out}.json and {options.out}.png")


if __name__ == "__main__":
    main()
