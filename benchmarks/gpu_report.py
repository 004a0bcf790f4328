"""`python -m benchmarks.gpu_report FILE ... [--out FOLDER]`: a table and pictures of results.

FILE: what `benchmarks.gpu` wrote on one kind of GPU, older ones first. Prints a Markdown table with
a column of ratios for each commit, and draws two pictures into FOLDER: the roofline, and the
speed-up of masked products against their sparsity.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.harness import without_gate

SIZES = {"float32": 4, "bfloat16": 2}
PRODUCT = re.compile(
    r"(?P<kind>blocks of 64|unstructured) (?P<dtype>\w+) (?P<sparsity>\d+)% "
    r"(?P<tokens>\d+)x(?P<size>\d+)$"
)
GRADIENT = re.compile(r"values' gradient (?P<kind>unstructured|blocks of 64) (?P<sparsity>\d+)%$")
STEP = re.compile(
    r"(?P<solver>Anderson|Broyden) step (?:k=(?P<stored>\d+) )?(?P<batch>\d+)x(?P<dim>\d+)$"
)
MEMORY = 5  # of the Anderson steps


@dataclass(frozen=True)
class Run:
    """The results of one commit, by work and peer, in their order."""

    commit: str
    facts: dict[str, Any]
    rows: dict[tuple[str, str], dict[str, Any]]

    @classmethod
    def read(cls, path: Path) -> Run:
        found = json.loads(path.read_text())
        rows = {(without_gate(row["work"]), row["against"]): row for row in found["results"]}
        return cls(found["machine"]["commit"], found["facts"], rows)


def table(runs: list[Run]) -> Iterator[str]:
    """Every line that the last run has, and what the others had there."""
    heads = [f"ratio at {run.commit}" for run in runs]
    yield f"| work | against | {' | '.join(heads)} | gate | verdict | ours |"
    yield "| --- " * (len(runs) + 5) + "|"
    for key, row in runs[-1].rows.items():
        ratios = [f"{run.rows[key]['ratio']:.2f}x" if key in run.rows else "-" for run in runs]
        gate = "-" if row["gate"] is None else f"{row['gate']:g}x"
        yield (
            f"| {row['work']} | {row['against']} | {' | '.join(ratios)} | {gate} | "
            f"{row['verdict']} | {row['ours']:,.1f} {row['unit']} |"
        )


@dataclass(frozen=True)
class Point:
    """Work on the roofline: operations, the fewest bytes, seconds."""

    label: str
    operations: float
    bytes: float
    seconds: float


def points(run: Run) -> Iterator[Point]:
    for (work, _), row in run.rows.items():
        if found := PRODUCT.match(work):
            size, tokens = int(found["size"]), int(found["tokens"])
            kept = size * size * (100 - int(found["sparsity"])) / 100
            moved = SIZES[found["dtype"]] * (2 * size * tokens + kept)
            label = f"{found['kind']} {found['dtype']} {found['sparsity']}%"
            yield Point(label, 2 * kept * tokens, moved, row["ours"] * 1e-6)
        elif found := STEP.match(work):
            elements = int(found["batch"]) * int(found["dim"])
            if found["solver"] == "Anderson":
                moved, operations = 2 * MEMORY + 4, 4 * MEMORY + 4
            else:
                moved, operations = 2 * int(found["stored"]) + 12, 4 * int(found["stored"]) + 8
            label = f"{found['solver']} step {found['batch']}x{found['dim']}"
            yield Point(label, operations * elements, 4 * moved * elements, row["ours"] * 1e-6)


def dense_peaks(run: Run) -> dict[str, float]:
    """Operations a second of the dense product that stood beside ours, by dtype."""
    peaks: dict[str, float] = {}
    for (work, against), row in run.rows.items():
        if (found := PRODUCT.match(work)) and against == "F.linear(x, W*M)":
            operations = 2 * int(found["size"]) ** 2 * int(found["tokens"])
            peaks[found["dtype"]] = max(
                peaks.get(found["dtype"], 0.0), operations / (row["peer"] * 1e-6)
            )
    return peaks


def draw_roofline(run: Run, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    import numpy as np

    figure, axes = plt.subplots(figsize=(8, 5), layout="constrained")
    bandwidth = run.facts["copy bandwidth, GB/s"] * 1e9
    intensity = np.logspace(-1, 4, 200)
    for (dtype, peak), colour in zip(sorted(dense_peaks(run).items()), ("C0", "C1"), strict=False):
        axes.plot(intensity, np.minimum(intensity * bandwidth, peak) / 1e12, color=colour)
        name = f"dense {dtype}: {peak / 1e12:.0f} TFLOP/s"
        axes.annotate(name, (1e4, peak / 1e12), ha="right", va="bottom", color=colour)
    seen: set[str] = set()
    for point in points(run):
        if point.label in seen:
            continue
        seen.add(point.label)
        x, y = point.operations / point.bytes, point.operations / point.seconds / 1e12
        axes.plot(x, y, "o", color="C3")
        shift = (6, 4 if len(seen) % 2 else -10)  # neighbours above and below
        axes.annotate(point.label, (x, y), xytext=shift, textcoords="offset points", fontsize=8)
    axes.set(xscale="log", yscale="log", ylabel="TFLOP/s")
    axes.set_xlabel("operations for each byte that has to be moved")
    roof = f"the roof is a copy of {bandwidth / 1e12:.2f} TB/s"
    axes.set_title(f"{run.facts['device']}, commit {run.commit}: {roof}")
    axes.grid(alpha=0.3, which="major")
    figure.savefig(path, dpi=120)
    plt.close(figure)


def draw_speed_up(runs: list[Run], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(8, 5), layout="constrained")
    names: dict[str, str] = {}
    for run, style in zip(runs, (":", "--", "-")[-len(runs) :], strict=True):
        lines: dict[str, list[tuple[int, float, float | None]]] = {}
        for (work, against), row in run.rows.items():
            found = PRODUCT.match(work) or GRADIENT.match(work)
            if found and against in ("F.linear(x, W*M)", "dense weight gradient"):
                kind = (
                    found["kind"] if "dtype" in found.groupdict() else f"{found['kind']}, gradient"
                )
                at = (int(found["sparsity"]), row["ratio"], row["gate"])
                lines.setdefault(kind, []).append(at)
        for kind, line in lines.items():
            colour = names.setdefault(kind, f"C{len(names)}")
            x, y, gates = zip(*sorted(line), strict=True)
            axes.plot(x, y, style, marker="o", color=colour, label=f"{kind}, {run.commit}")
            if run is runs[-1]:
                with_gate = [(s, g) for s, g in zip(x, gates, strict=True) if g is not None]
                axes.plot(*zip(*with_gate, strict=True), "_", color=colour, markersize=16)
    axes.axhline(1, color="grey", linewidth=1)
    axes.set(xlabel="sparsity, %", ylabel="times as fast as the dense product", yscale="log")
    work = "masked products of 4096 x 4096, 8192 tokens (bars: gates)"
    axes.set_title(f"{runs[-1].facts['device']}: {work}")
    axes.set_yticks([0.5, 1, 2, 4, 8], ["0.5", "1", "2", "4", "8"])
    axes.legend(fontsize=8)
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu_report", description=__doc__)
    parser.add_argument("files", nargs="+", type=Path, metavar="FILE")
    parser.add_argument("--out", type=Path, help="folder for the pictures; none without it")
    options = parser.parse_args()
    runs = [Run.read(path) for path in options.files]
    print("\n".join(table(runs)))
    if options.out is not None:
        options.out.mkdir(parents=True, exist_ok=True)
        name = runs[-1].facts["device"].split()[-1].lower()
        draw_roofline(runs[-1], options.out / f"{name}_roofline.png")
        draw_speed_up(runs, options.out / f"{name}_speed_up.png")


if __name__ == "__main__":
    main()
