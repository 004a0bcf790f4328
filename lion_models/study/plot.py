"""The PNGs of studies: a comparison of methods, a sweep's grid, and what the test set gave."""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes

from lion_models.base.files import save_figure
from lion_models.methods.registry import colour_of
from lion_models.run.lettering import drawn, lettering
from lion_models.run.plots import (
    draw_traces,
    dress,
    middle_out,
    new_figure,
    quiet_grid,
    write_numbers,
)

__all__ = ["plot_comparison", "plot_sweep", "plot_tested"]

SHOWN_SETTINGS = 15


@drawn
def plot_comparison(path: Path, title: str, cells: Sequence[dict[str, Any]]) -> None:
    """Draw accuracy per method, accuracy against trained weights, and validation curves.

    Args:
        path: PNG to write.
        title: above the panels.
        cells: one per run: `method`, `seed`, `test_accuracy`, `without_head`, `curve` (validation
            accuracy per epoch) and `traces`; `fold` in a cross-validation.
    """
    by_method: dict[str, list[dict[str, Any]]] = {}
    for cell in cells:
        by_method.setdefault(cell["method"], []).append(cell)
    traced = [cell["traces"] for cell in cells if cell["traces"]["after"]]
    count = 2 + bool(traced)
    # One below the other, to be read on a phone and in a column of a page.
    figure, grid = new_figure(max(5.6, 1.3 * len(by_method)), 3.6 * count, rows=count)
    points, curves, *below = [axis for [axis] in grid]
    figure.suptitle(lettering(middle_out(title, 64)), fontsize=10)
    labels = []
    for at, (method, own) in enumerate(by_method.items()):
        labels.append(f"{method}\n{own[0]['without_head']:,} weights\n+ head")
        values, colour = [100 * cell["test_accuracy"] for cell in own], colour_of(method)
        mean = sum(values) / len(values)
        # Dots, not bars: the axis does not begin at zero, where a bar's length would mislead.
        points.hlines(mean, at - 0.25, at + 0.25, color=colour, linewidth=4)
        points.plot([at] * len(values), values, "o", color="black", markersize=5, alpha=0.6)
        style = {"textcoords": "offset points", "va": "center", "fontweight": "bold"}
        points.annotate(f"{mean:.1f}", (at + 0.3, mean), (2, 0), color=colour, **style)
        # A run that stopped early has no more to say.
        columns = itertools.zip_longest(*(cell["curve"] for cell in own))
        epochs = [[100 * one for one in column if one is not None] for column in columns]
        numbers = range(1, len(epochs) + 1)
        means = [sum(epoch) / len(epoch) for epoch in epochs]
        curves.plot(numbers, means, color=colour, label=method)
        if len(own) > 1:
            low, high = [min(epoch) for epoch in epochs], [max(epoch) for epoch in epochs]
            curves.fill_between(numbers, low, high, color=colour, alpha=0.15, linewidth=0)
    points.set_xticks(range(len(labels)), labels, fontsize=8)
    points.set_xlim(-0.5, len(labels) - 0.3)
    everything = [100 * cell["test_accuracy"] for cell in cells]
    points.set_ylim(max(0.0, min(everything) - 5), min(101.0, max(everything) + 5))
    draw = "fold" if "fold" in cells[0] else "seed"
    about = f"Test accuracy (a dot is a {draw}, a line their mean)"
    dress(points, about, "", "accuracy (%)", legend=False)
    points.grid(axis="x", visible=False)
    dress(curves, f"Validation while training (band: all {draw}s)", "epoch", "accuracy (%)")
    if traced:
        draw_traces(below[0], traced[0])
    save_figure(path, figure)


@drawn
def plot_sweep(path: Path, content: dict[str, Any]) -> None:
    """Draw validation accuracy over the grid, a panel for each condition and method.

    A panel is a heat map where two options vary, else a row of dots for each setting; what is
    chosen is bold.

    Args:
        path: PNG to write.
        content: of sweep.json.
    """
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for setting in content["settings"]:
        if setting["validation_accuracy"] is not None:
            condition = ", ".join(f"{k} {v}" for k, v in setting["condition"].items())
            groups.setdefault((condition, setting["method"]), []).append(setting)
    if not groups:
        return
    # In the order of the grid, not of the accuracies.
    conditions = sorted({condition for condition, _ in groups})
    methods = sorted({method for _, method in groups})
    size = (5.6 * len(methods), 4.0 * len(conditions) + 0.4)
    figure, panels = new_figure(*size, len(conditions), len(methods), dpi=110)
    seeds = content["seeds"]
    varied = "data" in content["settings"][0]["condition"]
    where = "" if varied else f" on {content['options']['data']}"
    about = f"seed{'s' * (len(seeds) > 1)} {', '.join(map(str, seeds))}; bold is chosen"
    figure.suptitle(f"Validation accuracy (%){lettering(where)}, {about}")
    by_run = {cell["run"]: cell.get("validation_accuracy") for cell in content["cells"]}
    for row, condition in enumerate(conditions):
        dotted: list[Axes] = []  # on one scale, so that methods can be compared
        for column, method in enumerate(methods):
            axis = panels[row][column]
            settings = groups.get((condition, method))
            if settings is None:
                axis.set_axis_off()
                continue
            title = f"{method}, {condition}" if condition else method
            axis.set_title(lettering(middle_out(title, 50)), fontsize=11)
            keys = _varying(settings)
            if len(keys) == 2:
                _heat_map(axis, settings, keys)
                continue
            if dotted:
                axis.sharex(dotted[0])
            dotted.append(axis)
            _dots(axis, settings, keys, by_run)
    save_figure(path, figure)


@drawn
def plot_tested(path: Path, tested: Mapping[str, tuple[int, dict[str, list[float]]]]) -> None:
    """Draw test accuracy of each method, a panel for each condition and one for their mean.

    Args:
        path: PNG to write.
        tested: by method, in the order of the rows: trained parameters without the head, and the
            accuracies of each condition, one for each seed.
    """
    conditions = list(next(iter(tested.values()))[1])
    titles = [*conditions, "mean"] if len(conditions) > 1 else conditions
    columns = min(len(titles), 3)
    rows = -(-len(titles) // columns)
    size = (1.6 + 3.6 * columns, 0.6 + (1.2 + 0.26 * len(tested)) * rows)
    figure, panels = new_figure(*size, rows, columns, dpi=110, sharey=True)
    for position, axis in enumerate(panels.flat):
        if position >= len(titles):
            axis.set_axis_off()
            continue
        title = titles[position]
        axis.set_title(lettering(middle_out(title, 34)), fontsize=11)
        for row, (method, (_, accuracies)) in enumerate(tested.items()):
            seeds = zip(*accuracies.values(), strict=True)
            values = accuracies.get(title) or [statistics.fmean(seed) for seed in seeds]
            colour = colour_of(method)
            if method == "lion":
                axis.axhspan(row - 0.5, row + 0.5, color=colour, alpha=0.08, linewidth=0)
            _dots_of_seeds(axis, row, [100 * value for value in values], colour)
        quiet_grid(axis, "x")
    labels = [f"{method}  {count:,}" for method, (count, _) in tested.items()]
    panels[0][0].set_yticks(range(len(labels)), labels, fontsize=9)
    panels[0][0].set_ylim(len(labels) - 0.5, -0.5)
    figure.supxlabel("test accuracy (%); a dot is a seed, the bar their mean", fontsize=10)
    figure.suptitle(
        "method, and its trained parameters without the head", fontsize=10, x=0.01, ha="left"
    )
    save_figure(path, figure)


def _dots_of_seeds(axis: Axes, row: int, values: Sequence[float], colour: str) -> None:
    """A dot for each seed and a bar at their mean."""
    axis.plot(values, [row] * len(values), "o", color=colour, alpha=0.5, markersize=5)
    mean = statistics.fmean(values)
    axis.plot([mean], [row], "|", color="black", markersize=14, markeredgewidth=2)


def _varying(settings: list[dict[str, Any]]) -> list[str]:
    keys = settings[0]["setting"]
    return [key for key in keys if len({str(s["setting"][key]) for s in settings}) > 1]


def _heat_map(axis: Axes, settings: list[dict[str, Any]], keys: list[str]) -> None:
    across, down = keys
    columns = _sorted({s["setting"][across] for s in settings})
    rows = _sorted({s["setting"][down] for s in settings})
    best: dict[tuple[Any, Any], dict[str, Any]] = {}
    for one in settings:  # best first
        best.setdefault((one["setting"][down], one["setting"][across]), one)
    cells = [[best.get((row, column)) for column in columns] for row in rows]
    means = [[100 * one["validation_accuracy"] if one else math.nan for one in r] for r in cells]
    image = axis.imshow(means, cmap="cividis", aspect="auto")
    middle = sum(image.get_clim()) / 2
    shown = [["" if math.isnan(mean) else f"{mean:.1f}" for mean in row] for row in means]
    write_numbers(axis, shown, [[mean < middle for mean in row] for row in means])
    # The panel's first setting is its best: what validation chose.
    chosen = settings[0]["setting"]
    at = rows.index(chosen[down]) * len(columns) + columns.index(chosen[across])
    axis.texts[at].set_fontweight("bold")
    axis.set_xticks(
        range(len(columns)), [lettering(middle_out(str(value), 20)) for value in columns]
    )
    axis.set_yticks(range(len(rows)), [lettering(middle_out(str(value), 20)) for value in rows])
    axis.set_xlabel(across)
    axis.set_ylabel(down)


def _dots(
    axis: Axes, settings: list[dict[str, Any]], keys: list[str], by_run: dict[str, float | None]
) -> None:
    shown = settings[:SHOWN_SETTINGS]
    for position, one in enumerate(shown):
        values = [100 * value for run in one["runs"] if (value := by_run.get(run)) is not None]
        _dots_of_seeds(axis, position, values, "#0072B2")
    labels = [
        lettering(middle_out(", ".join(f"{key} {one['setting'][key]}" for key in keys) or "-", 40))
        for one in shown
    ]
    axis.set_yticks(range(len(shown)), labels, fontsize=8)
    for label, one in zip(axis.get_yticklabels(), shown, strict=True):
        label.set_fontweight("bold" if one["chosen"] else "normal")
    axis.set_ylim(len(shown) - 0.5, -0.5)
    axis.set_xlabel("a dot is a seed, the bar their mean")
    quiet_grid(axis, "x")
    if len(settings) > len(shown):
        axis.annotate(f"best {len(shown)} of {len(settings)}", (1, 0), xycoords="axes fraction",
                      ha="right", va="bottom", fontsize=8)  # fmt: skip


def _sorted(values: set[Any]) -> list[Any]:
    return sorted(values, key=lambda value: (isinstance(value, str), value is None, value or 0))
