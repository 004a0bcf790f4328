"""The picture of a diagnosis: each solver's residual, and what to make of it."""

from __future__ import annotations

import math
import os
import textwrap
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from deqcore.diagnosis._traces import Trace

if TYPE_CHECKING:
    from deqcore.diagnosis._diagnose import Diagnosis

# Okabe and Ito's, which the colour-blind can tell apart.
COLOURS = {
    "Picard": "#0072B2",
    "damped": "#56B4E9",
    "Anderson": "#D55E00",
    "Broyden": "#009E73",
    "NewtonKrylov": "#CC79A7",
}
INK, QUIET, BAD, GOOD = "#222222", "#767676", "#B3261E", "#1B7F4B"
LABEL = 0.05  # height of a label, as a share of the axis
WIDTH, HEIGHT, TOP, BOTTOM = 14.2, 6.4, 0.95, 0.65  # inches: the picture, and its margins
LINE = 0.185  # inches of a line of text


def draw(diagnosis: Diagnosis, path: str | os.PathLike[str]) -> None:
    """Write the PNG."""
    # Figure and canvas by hand: pyplot would pick a window system and keep every figure alive.
    lines = _text(diagnosis)
    height = max(HEIGHT, TOP + BOTTOM + sum(line.advance for line in lines))
    figure = Figure(figsize=(WIDTH, height), dpi=130)
    FigureCanvasAgg(figure)
    axis, panel = figure.subplots(1, 2, width_ratios=(1.4, 1))
    top, bottom = 1 - TOP / height, BOTTOM / height
    figure.subplots_adjust(left=0.06, right=0.99, top=top, bottom=bottom, wspace=0.36)
    title: dict[str, Any] = {"size": 15, "weight": "bold", "color": INK}
    figure.text(0.06, top + 0.52 / height, "How each solver goes on z = f(z)", **title)
    figure.text(0.06, top + 0.2 / height, _subtitle(diagnosis), size=10, color=QUIET)
    _draw_traces(axis, diagnosis)
    _write(panel, lines, height - TOP - BOTTOM)
    figure.savefig(path, format="png")


def _subtitle(diagnosis: Diagnosis) -> str:
    rows = "the worst row; " if len(diagnosis.traces[0].residual) > 1 else ""
    return f"{diagnosis.title}; {rows}thin: each evaluation, thick: the smallest so far"


def _colour(trace: Trace) -> str:
    kind = type(trace.solver).__name__
    return COLOURS["damped" if kind == "Picard" and "damping" in trace.name else kind]


def _draw_traces(axis: Axes, diagnosis: Diagnosis) -> None:
    low, high = _limits(diagnosis)
    longest = max(len(trace.worst) for trace in diagnosis.traces)
    right = max(longest * 1.02, 2)
    ends: list[tuple[Trace, float]] = []
    for trace in diagnosis.traces:
        calls = range(1, len(trace.worst) + 1)
        each = trace.residual.amax(0).clamp(min=low).tolist()  # clipped above by the axis
        best = trace.worst.clamp(min=low).tolist()
        colour, width = _colour(trace), 3.4 if trace.solver is diagnosis.solver else 1.9
        axis.plot(calls, each, color=colour, linewidth=0.9, alpha=0.4)
        axis.plot(calls, best, color=colour, linewidth=width, zorder=3)
        # It has stopped; its name is at the right.
        axis.plot([calls[-1], right], [best[-1]] * 2, ":", color=colour, linewidth=1, zorder=2)
        if trace.evaluations:
            axis.plot(trace.evaluations, best[trace.evaluations - 1], "o", color=colour,
                      markersize=7, zorder=4, markeredgecolor="white")  # fmt: skip
        ends.append((trace, min(best[-1], high)))
    axis.set_yscale("log")
    axis.set_ylim(low, high)
    axis.set_xlim(1, right)
    _mark_levels(axis, diagnosis, low)
    _label(axis, ends, diagnosis)
    axis.xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10]))
    axis.set_xlabel("calls of f", color=INK)
    axis.set_ylabel("relative residual, rms(f(z) - z) / rms(f(z))", color=INK)
    axis.grid(axis="y", color="#E4E4E4", linewidth=0.8)
    axis.set_axisbelow(True)
    axis.spines[["top", "right"]].set_visible(False)


def _mark_levels(axis: Axes, diagnosis: Diagnosis, low: float) -> None:
    """The tolerance, and what rounding makes of f."""
    tolerance = diagnosis.traces[0].tolerance
    at_right: dict[str, Any] = {
        "xycoords": ("axes fraction", "data"),
        "textcoords": "offset points",
        "ha": "right",
        "size": 9.5,
        "zorder": 5,
    }
    axis.axhline(tolerance, color=INK, linewidth=1.1, linestyle=(0, (5, 3)))
    axis.annotate(f"tolerance {tolerance:.0e}", (1, tolerance), (-4, 3), va="bottom", color=INK,
                  **at_right)  # fmt: skip
    if diagnosis.floor > low:
        axis.axhspan(low, diagnosis.floor, color="#EEEEEE", zorder=0)
        axis.annotate("rounding", (1, low), (-4, 4), va="bottom", color=QUIET,
                      **at_right)  # fmt: skip


def _limits(diagnosis: Diagnosis) -> tuple[float, float]:
    """Of the vertical axis: what is there, tolerance and floor, and no more than 20 decades."""
    values = [diagnosis.traces[0].tolerance, diagnosis.floor]
    for trace in diagnosis.traces:
        values += [v for v in trace.worst.tolist() if 0 < v < math.inf]
        values += [v for v in trace.residual[:, :1].flatten().tolist() if 0 < v < math.inf]
    high = max(values) * 3
    return max(min(values) / 3, high * 1e-20), high


def _label(axis: Axes, ends: list[tuple[Trace, float]], diagnosis: Diagnosis) -> None:
    """Names and calls at the lines' ends, moved apart, right of the axis."""
    low, high = (math.log10(v) for v in axis.get_ylim())
    ends = sorted(ends, key=lambda end: end[1])
    heights: list[float] = []
    for _, y in ends:
        height = (math.log10(y) - low) / (high - low)
        heights.append(max(height, heights[-1] + LABEL if heights else 0.01))
    over = max(0.0, heights[-1] - 0.99)
    for (trace, y), height in zip(ends, [h - over for h in heights], strict=True):
        colour = _colour(trace)
        weight = "bold" if trace.solver is diagnosis.solver else "normal"
        calls = str(trace.evaluations or "–")
        axis.annotate(
            f"{trace.name.replace('()', '')}  {calls}", (1, y), (1.025, height),
            xycoords=("axes fraction", "data"), textcoords="axes fraction", va="center", size=10,
            color=colour, weight=weight, annotation_clip=False,
            arrowprops={"arrowstyle": "-", "color": colour, "linewidth": 0.8, "shrinkA": 1,
                        "shrinkB": 0, "relpos": (0, 0.5)},
        )  # fmt: skip


@dataclass(frozen=True)
class _Line:
    """A line of the text, or a part of one that moves nothing down."""

    text: str
    left: float  # share of the panel
    advance: float  # inches
    style: dict[str, Any]


def _text(diagnosis: Diagnosis) -> list[_Line]:
    lines: list[_Line] = []

    def put(text: str, left: float, width: int, **style: Any) -> None:
        lines.extend(_Line(line, left, LINE, style) for line in textwrap.wrap(text, width))

    for finding in diagnosis.findings:
        colour = GOOD if finding.ok else BAD
        head: dict[str, Any] = {"size": 9.5, "color": colour, "weight": "bold"}
        lines.append(_Line("✓" if finding.ok else "✗", 0.0, 0.0, head))
        lines.append(_Line(finding.name, 0.045, 0.0, head))
        put(finding.text, 0.25, 55, size=8.3, color=QUIET if finding.ok else INK)
        lines.append(_Line("", 0, LINE / 2, {}))
    put(diagnosis.advice, 0.0, 58, size=10.2, color=INK, weight="bold")
    lines.append(_Line("", 0, LINE / 2, {}))
    style: dict[str, Any] = {
        "size": 8.4,
        "color": INK,
        "family": "monospace",
        "backgroundcolor": "#F2F2F2",
    }
    code = textwrap.wrap(diagnosis.call, 60, subsequent_indent="    ")
    width = max(map(len, code))
    lines += [_Line(line.ljust(width), 0.01, LINE * 1.15, style) for line in code]
    return lines


def _write(panel: Axes, lines: list[_Line], height: float) -> None:
    panel.set_axis_off()
    panel.set_xlim(0, 1)
    panel.set_ylim(height, 0)
    top = 0.0
    for line in lines:
        panel.text(line.left, top, line.text, va="top", **line.style)
        top += line.advance
