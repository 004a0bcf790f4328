"""The PNGs of a run: its curves and its confusion matrix; and what pictures of studies share."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

from lion_models.base.files import save_figure
from lion_models.run.balance import UNEQUAL, accuracy_text
from lion_models.run.config import RunConfig
from lion_models.run.lettering import drawn, lettering

__all__ = ["draw_traces", "dress", "middle_out", "new_figure", "plot_confusion", "plot_run",
           "quiet_grid", "write_numbers"]  # fmt: skip

MOST_CLASSES, SHOWN_CLASSES = 30, 20  # of a confusion matrix
TRAIN_COLOUR, VALIDATION_COLOUR = "#999999", "#0072B2"
SIDE_COLOURS = {"input": "#009E73", "output": "#CC79A7"}


@drawn
def plot_run(
    path: Path, config: RunConfig, history: Sequence[dict[str, Any]], result: dict[str, Any]
) -> None:
    """Draw accuracy per epoch and, for LION, the residual traces of its layers.

    Args:
        path: PNG to write.
        config: the run's.
        history: rows of metrics.jsonl.
        result: content of result.json.
    """
    traces = result["traces"]
    panels = 3 if traces["after"] else 2
    figure, [axes] = new_figure(4.6 * panels, 4.2, columns=panels)
    data = config.data
    shots = f"{data.shots} images a class" if data.shots else "all images"
    where = lettering(middle_out(data.data, 60))
    figure.suptitle(f"{config.method.name} on {where}, {shots}, seed {config.training.seed}")
    accuracy, loss = axes[:2]
    epochs = [row["epoch"] for row in history]

    def curve(axis: Axes, key: str, label: str, colour: str, scale: int = 1) -> None:
        axis.plot(epochs, [scale * row[key] for row in history], color=colour, label=label)

    curve(accuracy, "train_accuracy", "train", TRAIN_COLOUR, 100)
    curve(accuracy, "validation_accuracy", "validation", VALIDATION_COLOUR, 100)
    best, value = result["best_epoch"], 100 * result["validation_accuracy"]
    label = f"chosen epoch {best}: {accuracy_text(result, 'validation_')}"
    accuracy.plot(best, value, "o", color=VALIDATION_COLOUR, label=label)
    if "test" in result:
        value = 100 * result["test"]["accuracy"]
        accuracy.axhline(
            value, color="#D55E00", linestyle="--", label=f"test {accuracy_text(result['test'])}"
        )
    accuracy.set_ylim(top=101)
    dress(accuracy, "Accuracy", "epoch", "accuracy (%)")

    curve(loss, "loss", "train", TRAIN_COLOUR)
    curve(loss, "validation_loss", "validation", VALIDATION_COLOUR)
    _log_scale(loss)
    dress(loss, "Loss", "epoch", "cross-entropy (nats, log scale)")

    if traces["after"]:
        draw_traces(axes[2], traces)
    save_figure(path, figure)


def _log_scale(axis: Axes) -> None:
    """A logarithmic y axis with all of its numbers written in one way."""
    axis.set_yscale("log")
    low, high = axis.get_ylim()
    if high < 100 * low:  # else powers of ten alone are written
        axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axis.yaxis.set_minor_formatter(NullFormatter())
        if high < 2 * low:
            axis.yaxis.set_major_locator(MaxNLocator(5))


def draw_traces(axis: Axes, traces: dict[str, dict[str, list[list[float]]]]) -> None:
    """Residual against solver step: median and 10-90% band, trained and at the start.

    A median of exactly 0, which a logarithmic axis has no place for, is said in the legend.
    """
    for side, colour in SIDE_COLOURS.items():
        for moment, style in (("before", ":"), ("after", "-")):
            marks = traces[moment].get(side)
            if not marks:
                continue
            low, middle, high = zip(*marks, strict=True)
            steps = range(1, len(marks) + 1)
            label = f"{side} layer, {'trained' if moment == 'after' else 'untrained'}"
            exact = [step for step, value in zip(steps, middle, strict=True) if not value]
            if exact:
                label += f", 0 from step {exact[0]} on"
            shown = [value or math.nan for value in middle]
            axis.plot(steps, shown, style, color=colour, label=label)
            if moment == "after":
                lowest = [value or math.nan for value in low]
                axis.fill_between(steps, lowest, high, color=colour, alpha=0.2, linewidth=0)
    _log_scale(axis)
    dress(axis, "Equilibrium solves", "solver step", "residual, rms(f(z) - z), 10-90% of images")


@drawn
def plot_confusion(path: Path, report: dict[str, Any]) -> None:
    """Draw the confusion matrix of a report: a row is a true class, coloured by its share.

    Of more than 30 classes, the 20 that are most often mistaken are drawn, and a column for all
    others.

    Args:
        path: PNG to write.
        report: content of report.json.
    """
    names = [row["class"] for row in report["classes"]]
    counts = report["confusion"]
    every = len(names)
    if every > MOST_CLASSES:
        names, counts = _most_mistaken(names, counts)
    shares = [[value / max(1, sum(row)) for value in row] for row in counts]
    names = [lettering(middle_out(name)) for name in names]
    side = 2.4 + 0.4 * len(counts) + 0.09 * max(map(len, names))
    figure, [[axis]] = new_figure(side + 0.8, side + 0.3)
    image = axis.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    figure.colorbar(image, label="share of the true class", shrink=0.8)
    axis.set_xticks(range(len(names)), names, rotation=90 if max(map(len, names)) > 3 else 0)
    axis.set_yticks(range(len(counts)), names[: len(counts)])
    axis.set_xlabel("predicted")
    axis.set_ylabel("true")
    supports = [row["support"] for row in report["classes"] if row["support"]]
    unequal = max(supports) > UNEQUAL * min(supports)
    figures = report if unequal else {"accuracy": report["accuracy"]}
    title = f"{report['images']} images, accuracy {accuracy_text(figures)}"
    if every > len(counts):
        title += f"\nthe {len(counts)} of {every} classes that are most often mistaken"
    axis.set_title(title, fontsize=11)
    shown = [[str(value) if value else "" for value in row] for row in counts]
    write_numbers(axis, shown, [[share > 0.55 for share in row] for row in shares], fontsize=8)
    save_figure(path, figure)


def _most_mistaken(
    names: Sequence[str], counts: Sequence[Sequence[int]]
) -> tuple[list[str], list[list[int]]]:
    """The classes with most mistakes, as truth or as answer, and the other answers as one."""
    mistakes = [
        sum(row) + sum(other[label] for other in counts) - 2 * row[label]
        for label, row in enumerate(counts)
    ]
    worst = sorted(range(len(names)), key=lambda label: (-mistakes[label], label))[:SHOWN_CLASSES]
    worst.sort()
    rows = [[counts[truth][answer] for answer in worst] for truth in worst]
    rows = [[*row, sum(counts[truth]) - sum(row)] for truth, row in zip(worst, rows, strict=True)]
    return [*(names[label] for label in worst), "all others"], rows


def middle_out(name: str, most: int = 24) -> str:
    """A name without its middle where it is long, so that its beginning and end tell it."""
    if len(name) <= most:
        return name
    return f"{name[: most - most // 3 - 1]}…{name[-(most // 3) :]}"


def write_numbers(
    axis: Axes, texts: Sequence[Sequence[str]], dark: Sequence[Sequence[bool]], **style: Any
) -> None:
    """Write a text into each square of an image, white on what is dark."""
    for row, values in enumerate(texts):
        for column, text in enumerate(values):
            colour = "white" if dark[row][column] else "black"
            axis.text(column, row, text, ha="center", va="center", color=colour, **style)


def new_figure(
    width: float, height: float, rows: int = 1, columns: int = 1, dpi: int = 130, **shared: Any
) -> tuple[Figure, Any]:
    """A figure of so many inches and its panels, an array (rows, columns) of axes."""
    # Figure and canvas by hand: pyplot would pick a window system and keep every figure alive.
    figure = Figure(figsize=(width, height), dpi=dpi, layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.subplots(rows, columns, squeeze=False, **shared)


def dress(axis: Axes, title: str, x: str, y: str, legend: bool = True) -> None:
    """Title, labels and a quiet grid."""
    axis.set_title(title, fontsize=11)
    axis.set_xlabel(x)
    axis.set_ylabel(y)
    quiet_grid(axis)
    if x in ("epoch", "solver step"):
        axis.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
        low, high = axis.get_xlim()
        if high - low < 1:  # one epoch alone, which is no line and has no whole number beside it
            axis.set_xlim(low - 0.5, high + 0.5)
            for line in axis.lines:
                line.set_marker("o")
    if legend:
        axis.legend(fontsize=8, frameon=False)


def quiet_grid(axis: Axes, which: Literal["both", "x", "y"] = "both") -> None:
    """A pale grid behind what is drawn, and no frame on the right and above."""
    axis.grid(axis=which, color="#dddddd", linewidth=0.6)
    axis.set_axisbelow(True)
    axis.spines[["top", "right"]].set_visible(False)
