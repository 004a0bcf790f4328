"""The pictures of `benchmarks.lion_fixed_point`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from lion_models.base.files import make_folder, save_figure

COLOURS = {"equilibrium": "#D55E00", "1": "#0072B2", "2": "#009E73", "4": "#CC79A7"}
LABELS = {
    "equilibrium": "equilibrium",
    "1": "1 application",
    "2": "2 applications",
    "4": "4 applications",
}


def draw(folder: Path, results: list[dict[str, Any]], means: dict[str, Any]) -> None:
    """Write lion_fixed_point_{accuracy,memory,steps,unsure}.png."""
    make_folder(folder)
    pictures = {"accuracy": _accuracy, "memory": _memory, "steps": _steps, "unsure": _unsure}
    for name, paint in pictures.items():
        figure = Figure(figsize=(6.8, 4.2), dpi=130, layout="constrained")
        FigureCanvasAgg(figure)
        axis = figure.subplots()
        axis.grid(True, color="#dddddd", linewidth=0.6)
        axis.set_axisbelow(True)
        axis.spines[["top", "right"]].set_visible(False)
        paint(axis, results, means)
        figure.legend(frameon=False, loc="outside lower center", ncols=4)
        save_figure(folder / f"lion_fixed_point_{name}.png", figure)


def _accuracy(axis: Axes, results: list[dict[str, Any]], means: dict[str, Any]) -> None:
    conditions = sorted({(one["data"], one["shots"]) for one in results})
    for at, condition in enumerate(conditions):
        for offset, (form, colour) in enumerate(COLOURS.items()):
            own = [100 * one["accuracy"] for one in results
                   if (one["data"], one["shots"]) == condition and one["form"] == form]  # fmt: skip
            x = at + (offset - 1.5) * 0.18
            axis.plot([x] * len(own), own, "o", color=colour, alpha=0.35, markersize=4)
            label = LABELS[form] if at == 0 else None
            mean = sum(own) / len(own)
            axis.plot([x - 0.07, x + 0.07], [mean] * 2, color=colour, linewidth=3, label=label)
    axis.set_xticks(
        range(len(conditions)), [f"{data}\n{shots} a class" for data, shots in conditions]
    )
    axis.set_ylabel("test accuracy (%)")
    axis.set_title("Equilibrium and explicit applications, seeds and their mean")


def _memory(axis: Axes, results: list[dict[str, Any]], means: dict[str, Any]) -> None:
    for form, colour in COLOURS.items():
        own = means[form]
        gap = own["equilibrium_minus_this"]
        axis.errorbar(own["kept_mib"], -100 * gap["mean"], 100 * gap["error"], fmt="o",
                      color=colour, label=LABELS[form], capsize=3)  # fmt: skip
    axis.axhline(0, color=COLOURS["equilibrium"], linewidth=1, linestyle="--")
    axis.set_xlabel("kept for the backward pass, batch 64 (MiB)")
    axis.set_ylabel("accuracy against the equilibrium's (points)")
    axis.set_title("Accuracy and memory of a training step")


def _steps(axis: Axes, results: list[dict[str, Any]], means: dict[str, Any]) -> None:
    names = list(means["equilibrium"]["by_steps"])
    for form, colour in COLOURS.items():
        gains = means[form]["gain_by_steps"]
        axis.errorbar(range(len(names)), [100 * gains[name]["mean"] for name in names],
                      [100 * gains[name]["error"] for name in names], fmt="o-", color=colour,
                      label=LABELS[form], capsize=2)  # fmt: skip
    axis.set_xticks(range(len(names)), names)
    axis.set_xlabel("applications of the cell at test")
    axis.set_ylabel("accuracy against that as trained (points)")
    axis.set_title("More steps at test than in training, by what was trained")


def _unsure(axis: Axes, results: list[dict[str, Any]], means: dict[str, Any]) -> None:
    questions = {"wrong": "wrong answers", "other": "pictures of another data set"}
    signs = list(means["wrong"]["equilibrium"])
    for row, (question, label) in enumerate(questions.items()):
        own = means[question]["equilibrium"]
        places = [at + (row - 0.5) * 0.36 for at in range(len(signs))]
        axis.barh(places, [own[sign]["mean"] for sign in signs], 0.34,
                  xerr=[own[sign]["error"] for sign in signs],
                  color=("#D55E00", "#0072B2")[row], label=label)  # fmt: skip
    axis.axvline(0.5, color="#000000", linewidth=1, linestyle="--")
    axis.set_yticks(
        range(len(signs)), [sign.replace("second residual", "residual of step 2") for sign in signs]
    )
    axis.invert_yaxis()
    axis.set_xlim(0, 1)
    axis.set_xlabel("AUROC (0.5 knows nothing)")
    axis.set_title("What tells answers that are not to be trusted")
