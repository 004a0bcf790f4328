"""The pictures of docs/performance.md, each labelled with device, torch, commit and units."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.report.results import Results, Run, Training
from benchmarks.report.roofline import dense_peaks, points

_SHAPE = re.compile(r"(?P<what>.*?),? (?P<shape>\d+x\d+)(?P<rest>.*)$")
_SPARSITY = re.compile(r"(?P<what>.*?),? (?P<sparsity>\d+)%(?P<rest>.*)$")
_STEPS = re.compile(r"training step memory, (?P<steps>\d+) steps$")
_DENSE = ("F.linear(x, W*M)", "dense weight gradient")


def draw_all(results: Results, folder: Path) -> Iterator[Path]:
    """Draw every picture into the folder; their paths, one after the other."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, draw in PICTURES.items():
        figure = draw(results)
        path, temporary = folder / f"{name}.png", folder / f".{name}.tmp"
        figure.savefig(temporary, dpi=120, format="png", metadata={"Software": None})
        plt.close(figure)
        os.replace(temporary, path)
        yield path


def _figure(title: str, label: str, columns: int = 1) -> tuple[Figure, Any]:
    figure, axes = plt.subplots(1, columns, figsize=(9, 5), layout="constrained")
    figure.suptitle(title, fontsize=12)
    figure.supxlabel(label, fontsize=8, color="0.35")
    return figure, axes


def _grid(axes: Axes, **settings: Any) -> None:
    axes.set(**settings)
    axes.grid(alpha=0.3, which="major")


def _plain(axes: Axes, ticks: tuple[float, ...], way: str = "y") -> None:
    """Numbers as they are written, on an axis of logarithms."""
    set_ticks = axes.set_yticks if way == "y" else axes.set_xticks
    set_ticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.minorticks_off()


def _bars(axes: Axes, cells: dict[str, dict[str, dict[str, Any]]]) -> None:
    """Ratios of each shape and peer, from p10 to p90."""
    peers = list(dict.fromkeys(peer for line in cells.values() for peer in line))
    width = 0.8 / len(peers)
    for i, peer in enumerate(peers):
        at = [(k, line[peer]) for k, line in enumerate(cells.values()) if peer in line]
        x = [k + (i - (len(peers) - 1) / 2) * width for k, _ in at]
        y = np.array([row["ratio"] for _, row in at])
        spread = [y - [row["p10"] for _, row in at], [row["p90"] for _, row in at] - y]
        axes.bar(x, y, width, label=peer, yerr=np.maximum(spread, 0), capsize=2)
        for left, height, (_, row) in zip(x, y, at, strict=True):
            axes.annotate(f"{height:.1f}", (left, max(height, row["p90"])), xytext=(0, 2),
                          textcoords="offset points", ha="center", fontsize=7)  # fmt: skip
    axes.axhline(1, color="0.4", linewidth=1)
    axes.set_xticks(range(len(cells)), list(cells), fontsize=8)
    axes.set_yscale("log")
    axes.grid(alpha=0.3, axis="y")
    axes.set_ylim(0.8, 130)  # with room for a legend
    axes.set_xlabel("batch x elements of a row, float32")
    if len(peers) > 1:
        axes.legend(fontsize=8, loc="upper right")


def _by_shape(run: Run, pattern: str) -> dict[str, dict[str, dict[str, Any]]]:
    cells: dict[str, dict[str, dict[str, Any]]] = {}
    for (work, against), row in run.rows.items():
        if against == "copy bandwidth":
            continue  # no contestant
        if re.match(pattern, work) and (found := _SHAPE.match(work)):
            extra = found["rest"].strip().removeprefix("(").removesuffix(")")
            name = f"{found['shape']}\n{extra}" if extra else found["shape"]
            cells.setdefault(name, {})[against] = row
    return cells


def solvers_cpu(results: Results) -> Figure:
    run = results.cpu
    figure, (left, right) = _figure(
        "One step of the solvers: times as fast as the peer (bars: median; lines: p10 to p90)",
        run.label(), 2,
    )  # fmt: skip
    _bars(left, _by_shape(run, "Anderson step"))
    left.set_title("Anderson, history of 5", fontsize=10)
    _plain(left, (1, 2, 5, 10, 20, 50, 100))
    left.tick_params("x", rotation=20)
    cells: dict[str, dict[str, dict[str, Any]]] = {}
    for stored in (10, 20, 30):
        for shape, line in _by_shape(run, f"Broyden step k={stored} ").items():
            cells.setdefault(shape, {})[f"torchdeq, history of {stored}"] = line["torchdeq"]
    _bars(right, cells)
    right.set_title("Broyden", fontsize=10)
    _plain(right, (1, 2, 5, 10, 20, 50, 100))
    return figure


def solvers_gpu(results: Results) -> Figure:
    run = results.gpu[-1]
    title = "30 steps: times as fast as torchdeq (bars: median; lines: p10 to p90)"
    figure, (left, right) = _figure(title, run.label(), 2)
    for axes, solver in ((left, "Anderson"), (right, "Broyden")):
        _bars(axes, _by_shape(run, f"30 {solver} steps"))
        axes.set_title(solver, fontsize=10)
        _plain(axes, (1, 2, 5, 10, 20, 50, 100))
    return figure


def _times(axes: Axes, run: Run, pattern: str, ours: str) -> None:
    """Time of ours and of each peer against sparsity, in the pattern's rows."""
    lines: dict[str, list[tuple[int, float]]] = {}
    for (work, against), row in run.rows.items():
        if re.match(pattern, work) and (found := _SPARSITY.match(work)):
            sparsity = int(found["sparsity"])
            lines.setdefault(against, []).append((sparsity, row["peer"]))
            if against in _DENSE:
                lines.setdefault(ours, []).append((sparsity, row["ours"]))
    for name, line in sorted(lines.items(), key=lambda item: item[0] != ours):
        x, y = zip(*sorted(line), strict=True)
        axes.plot(x, np.array(y) / 1e3, "o-" if name == ours else "s--", label=name)
    _grid(axes, xlabel="sparsity, %", ylabel="ms", yscale="log")
    axes.set_xticks(sorted({sparsity for line in lines.values() for sparsity, _ in line}))
    axes.legend(fontsize=8)


def sparsity_cpu(results: Results) -> Figure:
    run = results.cpu
    title = "Masked products of 768 x 768 weights, 1576 tokens, float32: time against sparsity"
    figure, (left, right) = _figure(title, run.label(), 2)
    _times(left, run, "masked linear", "deqcore")
    left.set_title("x W", fontsize=10)
    _plain(left, (1, 2, 5, 10, 20, 50))
    _times(right, run, r"values' gradient", "deqcore")
    right.set_title("gradient of the kept values", fontsize=10)
    _plain(right, (1, 2, 5, 10, 20))
    return figure


def sparsity_gpu(results: Results) -> Figure:
    run = results.gpu[-1]
    title = "Masked products of 4096 x 4096 weights, 8192 tokens: time against sparsity"
    figure, (left, right) = _figure(title, run.label(), 2)
    _times(left, run, "unstructured float32", "deqcore")
    left.set_title("unstructured, float32", fontsize=10)
    _plain(left, (1, 2, 5, 10, 20, 50, 100))
    _times(right, run, "blocks of 64 bfloat16", "deqcore")
    right.set_title("blocks of 64, bfloat16", fontsize=10)
    _plain(right, (0.2, 0.5, 1, 2))
    return figure


def speed_up_gpu(results: Results) -> Figure:
    """At each commit, with the gates of the last."""
    runs = results.gpu
    commits = " and ".join(run.commit for run in runs)
    title = "Masked products of 4096 x 4096 weights, 8192 tokens (bars: gates)"
    last = runs[-1]
    label = f"{last.device} · torch {last.machine['deqcore']['torch']} · commits {commits}"
    figure, axes = _figure(title, label)
    colours: dict[str, str] = {}
    for run, style in zip(runs, (":", "--", "-")[-len(runs) :], strict=True):
        lines: dict[str, list[tuple[int, float, float | None]]] = {}
        for (work, against), row in run.rows.items():
            if against not in _DENSE or not re.match("unstr|blocks|values", work):
                continue
            found = _SPARSITY.match(work)
            if found is not None:
                kind = re.sub(r"^(values' gradient) (.*)", r"\2, \1", found["what"])
                lines.setdefault(kind, []).append(
                    (int(found["sparsity"]), row["ratio"], row["gate"])
                )
        for kind, line in lines.items():
            colour = colours.setdefault(kind, f"C{len(colours)}")
            x, y, gates = zip(*sorted(line), strict=True)
            axes.plot(x, y, style, marker="o", color=colour, label=f"{kind}, {run.commit}")
            if run is last:
                gated = [(s, g) for s, g in zip(x, gates, strict=True) if g is not None]
                axes.plot(*zip(*gated, strict=True), "_", color=colour, markersize=16)
    axes.axhline(1, color="0.4", linewidth=1)
    _grid(axes, xlabel="sparsity, %", ylabel="times as fast as the dense product", yscale="log")
    _plain(axes, (0.25, 0.5, 1, 2, 4, 8))
    axes.legend(fontsize=8)
    return figure


def roofline_gpu(results: Results) -> Figure:
    run = results.gpu[-1]
    bandwidth = run.facts["copy bandwidth, GB/s"] * 1e9
    title = f"Below the roof: a copy of {bandwidth / 1e12:.2f} TB/s, and dense products"
    figure, axes = _figure(title, run.label())
    intensity = np.logspace(-1, 4, 200)
    for (dtype, peak), colour in zip(sorted(dense_peaks(run).items()), ("C0", "C1"), strict=False):
        axes.plot(intensity, np.minimum(intensity * bandwidth, peak) / 1e12, color=colour)
        name = f"dense {dtype}: {peak / 1e12:.0f} TFLOP/s"
        below = colour == "C1"
        axes.annotate(name, (1e4, peak / 1e12), xytext=(0, -12 if below else 3),
                      textcoords="offset points", ha="right", color=colour)  # fmt: skip
    seen: set[str] = set()
    for point in points(run):
        if point.label in seen:
            continue
        seen.add(point.label)
        x, y = point.operations / point.bytes, point.operations / point.seconds / 1e12
        axes.plot(x, y, "o", color="C3")
        left = len(seen) % 2 == 0 and x > 1  # neighbours' labels at two sides
        shift = (-6, 5) if left else (6, -10 if len(seen) % 2 else 3)
        axes.annotate(point.label, (x, y), xytext=shift, textcoords="offset points", fontsize=8,
                      ha="right" if left else "left")  # fmt: skip
    _grid(axes, xscale="log", yscale="log", ylabel="TFLOP/s",
          xlabel="operations for each byte that has to be moved")  # fmt: skip
    return figure


def memory_steps(results: Results) -> Figure:
    run = results.memory
    lines: dict[str, list[tuple[int, float]]] = {}
    for (work, against), row in run.rows.items():
        if found := _STEPS.match(work):
            steps = int(found["steps"])
            lines.setdefault(against, []).append((steps, row["peer"]))
            if against == "Unrolled":
                lines.setdefault("Implicit", []).append((steps, row["ours"]))
    label = f"counted, the same on every processor · commit {run.commit} · {run.machine['date']}"
    title = "Memory of a training step against the steps of its solves (Anderson)"
    figure, axes = _figure(title, label)
    for name in ("Unrolled", "torchdeq m=6, implicit", "Implicit"):
        x, y = zip(*lines[name], strict=True)
        own = "" if name.startswith("torchdeq") else "deqcore, m=5, "
        axes.plot(x, y, "s--" if not own else "o-", label=own + name)
        axes.annotate(f"{y[-1]:.0f}", (x[-1], y[-1]), xytext=(6, -3), textcoords="offset points")
    _grid(axes, xscale="log", yscale="log", xlabel="steps forward, and as many backward",
          ylabel="peak of live tensors, in states (batch x elements)")  # fmt: skip
    _plain(axes, (10, 20, 50, 100, 200, 500, 1000, 2000, 5000))
    _plain(axes, tuple(x for x, _ in lines["Implicit"]), "x")
    axes.set_xlim(right=110)  # for the last figures
    axes.legend()
    return figure


def training_gpu(results: Results) -> Figure:
    found: Training = results.training
    figure, axes = _figure("A whole training step: forward, loss, backward", found.label())
    names = []
    for k, row in enumerate(found.rows):
        batch, dim = row["shape"]
        forward, backward = row["eager steps"]
        names.append(f"MLP {batch}x{dim}\n{forward} + {backward} evaluations")
        for i, (key, name) in enumerate(
            (("torchdeq", "torchdeq"), ("eager", "deqcore, eager"), ("auto", "deqcore, captured"))
        ):
            label = name if k == 0 else None
            bar = axes.bar(k + (i - 1) * 0.27, row[key][0], 0.27, color=f"C{i}", label=label)
            axes.bar_label(bar, fmt="%#.3g", fontsize=8)
    axes.set_xticks(range(len(names)), names)
    _grid(axes, ylabel="ms (median)", yscale="log")
    _plain(axes, (1, 2, 5, 10, 20, 50, 100))
    axes.set_ylim(0.8, 130)
    axes.legend()
    return figure


PICTURES: dict[str, Callable[[Results], Figure]] = {
    "cpu_solvers": solvers_cpu,
    "cpu_sparsity": sparsity_cpu,
    "memory_steps": memory_steps,
    "h200_solvers": solvers_gpu,
    "h200_training": training_gpu,
    "h200_sparsity": sparsity_gpu,
    "h200_speed_up": speed_up_gpu,
    "h200_roofline": roofline_gpu,
}
