"""The PNGs: curves of one run, and the comparison of methods."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, ScalarFormatter

from lion_models.base.files import save_figure
from lion_models.methods.registry import colour_of
from lion_models.run.config import RunConfig

__all__ = ["plot_comparison", "plot_confusion", "plot_run"]

SIDE_COLOURS = {"input": "#009E73", "output": "#CC79A7"}


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
    figure, axes = _figure(panels)
    shots = f"{config.data.shots} images a class" if config.data.shots else "all images"
    about = f"{config.method.name} on {config.data.data}, {shots}, seed {config.training.seed}"
    figure.suptitle(about)
    epochs = [row["epoch"] for row in history]

    accuracy = axes[0]
    accuracy.plot(
        epochs, [100 * row["train_accuracy"] for row in history], color="#999999", label="train"
    )
    accuracy.plot(
        epochs,
        [100 * row["validation_accuracy"] for row in history],
        color="#0072B2",
        label="validation",
    )
    best = result["best_epoch"]
    accuracy.plot(
        best,
        100 * result["validation_accuracy"],
        "o",
        color="#0072B2",
        label=f"chosen epoch {best}: {100 * result['validation_accuracy']:.1f}%",
    )
    if "test" in result:
        value = 100 * result["test"]["accuracy"]
        accuracy.axhline(value, color="#D55E00", linestyle="--", label=f"test {value:.1f}%")
    accuracy.set_ylim(top=101)
    _dress(accuracy, "Accuracy", "epoch", "accuracy (%)")

    loss = axes[1]
    loss.plot(epochs, [row["loss"] for row in history], color="#999999", label="train")
    loss.plot(
        epochs, [row["validation_loss"] for row in history], color="#0072B2", label="validation"
    )
    loss.set_yscale("log")
    loss.yaxis.set_major_formatter(ScalarFormatter())
    _dress(loss, "Loss", "epoch", "cross-entropy (nats, log scale)")

    if traces["after"]:
        draw_traces(axes[2], traces)
    save_figure(path, figure)


def draw_traces(axis: Axes, traces: dict[str, dict[str, list[list[float]]]]) -> None:
    """Residual against solver step: median and 10-90% band, trained and at the start."""
    for side, colour in SIDE_COLOURS.items():
        for moment, style in (("before", ":"), ("after", "-")):
            marks = traces[moment].get(side)
            if not marks:
                continue
            low, middle, high = zip(*marks, strict=True)
            steps = range(1, len(marks) + 1)
            label = f"{side} layer, {'trained' if moment == 'after' else 'untrained'}"
            axis.plot(steps, middle, style, color=colour, label=label)
            if moment == "after":
                axis.fill_between(steps, low, high, color=colour, alpha=0.2, linewidth=0)
    axis.set_yscale("log")
    _dress(axis, "Equilibrium solves", "solver step", "residual, rms(f(z) - z), 10-90% of images")


def plot_comparison(path: Path, title: str, cells: Sequence[dict[str, Any]]) -> None:
    """Draw accuracy per method, accuracy against trained weights, and validation curves.

    Args:
        path: PNG to write.
        title: above the panels.
        cells: one per run: `method`, `seed`, `test_accuracy`, `without_head`, `curve` (validation
            accuracy per epoch) and `traces`.
    """
    methods = list(dict.fromkeys(cell["method"] for cell in cells))
    figure, axes = _figure(3)
    figure.suptitle(title)
    points, curves, last = axes
    for position, method in enumerate(methods):
        own = [cell for cell in cells if cell["method"] == method]
        values = [100 * cell["test_accuracy"] for cell in own]
        mean = sum(values) / len(values)
        colour = colour_of(method)
        # Dots, not bars: the axis does not begin at zero, where a bar's length would mislead.
        points.hlines(mean, position - 0.25, position + 0.25, color=colour, linewidth=4)
        points.plot([position] * len(values), values, "o", color="black", markersize=5, alpha=0.6)
        points.annotate(
            f"{mean:.1f}",
            (position + 0.3, mean),
            xytext=(2, 0),
            textcoords="offset points",
            va="center",
            fontweight="bold",
            color=colour,
        )
        epochs = list(zip(*(cell["curve"] for cell in own), strict=True))
        means = [100 * sum(epoch) / len(epoch) for epoch in epochs]
        curves.plot(range(1, len(means) + 1), means, color=colour, label=method)
        if len(own) > 1:
            curves.fill_between(
                range(1, len(means) + 1),
                [100 * min(epoch) for epoch in epochs],
                [100 * max(epoch) for epoch in epochs],
                color=colour,
                alpha=0.15,
                linewidth=0,
            )
    labels = []
    for method in methods:
        count = next(cell["without_head"] for cell in cells if cell["method"] == method)
        labels.append(f"{method}\n{count:,} weights\n+ head")
    points.set_xticks(range(len(methods)), labels)
    points.set_xlim(-0.5, len(methods) - 0.3)
    everything = [100 * cell["test_accuracy"] for cell in cells]
    points.set_ylim(max(0.0, min(everything) - 5), min(101.0, max(everything) + 5))
    _dress(
        points,
        "Test accuracy (a dot is a seed, a line their mean)",
        "",
        "accuracy (%)",
        legend=False,
    )
    points.grid(axis="x", visible=False)
    _dress(curves, "Validation while training (band: all seeds)", "epoch", "accuracy (%)")
    traced = [cell for cell in cells if cell["traces"]["after"]]
    if traced:
        draw_traces(last, traced[0]["traces"])
    else:
        last.set_axis_off()
    save_figure(path, figure)


def plot_confusion(path: Path, report: dict[str, Any]) -> None:
    """Draw the confusion matrix of a report: a row is a true class, coloured by its share.

    Args:
        path: PNG to write.
        report: content of report.json.
    """
    names = [row["class"] for row in report["classes"]]
    counts = report["confusion"]
    shares = [[value / max(1, sum(row)) for value in row] for row in counts]
    side = min(16.0, 2.4 + 0.5 * len(names))
    figure = Figure(figsize=(side + 0.8, side), dpi=130, layout="constrained")
    FigureCanvasAgg(figure)
    axis = figure.subplots()
    image = axis.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    figure.colorbar(image, label="share of the true class", shrink=0.8)
    ticks = range(len(names))
    axis.set_xticks(ticks, names, rotation=90 if max(map(len, names)) > 3 else 0)
    axis.set_yticks(ticks, names)
    axis.set_xlabel("predicted")
    axis.set_ylabel("true")
    axis.set_title(f"{report['images']} images, accuracy {100 * report['accuracy']:.1f}%")
    if len(names) <= 30:
        for row, values in enumerate(counts):
            for column, value in enumerate(values):
                if value:
                    colour = "white" if shares[row][column] > 0.55 else "black"
                    axis.text(
                        column, row, str(value), ha="center", va="center", color=colour, fontsize=8
                    )
    save_figure(path, figure)


def _figure(panels: int) -> tuple[Figure, list[Axes]]:
    # Figure and canvas by hand: pyplot would pick a window system and keep every figure alive.
    figure = Figure(figsize=(4.6 * panels, 4.2), dpi=130, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, panels, squeeze=False)
    return figure, list(axes[0])


def _dress(axis: Axes, title: str, x: str, y: str, legend: bool = True) -> None:
    axis.set_title(title, fontsize=11)
    axis.set_xlabel(x)
    axis.set_ylabel(y)
    axis.grid(True, color="#dddddd", linewidth=0.6)
    axis.set_axisbelow(True)
    axis.spines[["top", "right"]].set_visible(False)
    if x in ("epoch", "solver step"):
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    if legend:
        axis.legend(fontsize=8, frameon=False)
