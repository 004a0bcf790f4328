"""Memory of a training step against solver steps: LION, explicit layers, VPT-deep.

    python -m benchmarks.lion_memory --output memory.json --png memory.png

Counts bytes of tensors, so the figures do not depend on the machine or its load.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

import deqcore
from lion_models import ImplicitPrompt, Lion, VPTDeep, load_backbone
from lion_models.base.files import save_figure, write_json
from lion_models.run.memory import kept_bytes

STEPS = (1, 2, 5, 10, 20, 30, 40, 50)
CLASSES = 10


def measure(backbone_name: str, batch: int, prompts: int, hidden: int) -> dict[str, Any]:
    """Kept bytes of one step of each method, by number of solver steps or explicit layers."""
    backbone = load_backbone(backbone_name)
    torch.manual_seed(0)
    images = torch.rand(batch, backbone.channels, backbone.image_size, backbone.image_size)
    figures: dict[str, list[dict[str, float]]] = {"lion": [], "explicit": [], "vpt-deep": []}
    for steps in STEPS:
        # So slow and so strict that it takes every step; what is kept is the same for any solver.
        solver = deqcore.Picard(damping=0.1, rtol=0.0, atol=0.0, max_steps=steps)
        lion = Lion(backbone, CLASSES, hidden=hidden, solver=solver)
        kept = kept_bytes(lion, images)
        taken = [mean_steps(prompt) for prompt in lion.implicit_layers.values()]
        figures["lion"].append({"steps": steps, "bytes": kept, "taken": min(taken)})
        explicit = Lion(backbone, CLASSES, hidden=hidden, iterations=steps)
        figures["explicit"].append({"steps": steps, "bytes": kept_bytes(explicit, images)})
    vpt = kept_bytes(VPTDeep(backbone, CLASSES, prompts), images)
    figures["vpt-deep"] = [{"steps": steps, "bytes": vpt} for steps in STEPS]
    options = {"backbone": backbone_name, "batch": batch, "prompts": prompts, "hidden": hidden}
    return {"options": options, "torch": torch.__version__, "figures": figures}


def mean_steps(prompt: ImplicitPrompt) -> float:
    """Of the last solve, over the images."""
    report = prompt.layer.report
    if report is None:
        raise RuntimeError("the prompt has solved nothing yet; call the model first")
    return report.steps.float().mean().item()


def table(result: dict[str, Any]) -> Table:
    options = result["options"]
    shown = Table(
        title=f"MiB kept for the backward pass, {options['backbone']}, batch {options['batch']}",
        title_justify="left",
    )
    for heading in ("solver steps", "LION", "explicit layers", "VPT-deep"):
        shown.add_column(heading, justify="right")
    rows = zip(*result["figures"].values(), strict=True)
    for row in rows:
        shown.add_row(str(row[0]["steps"]), *(f"{one['bytes'] / 2**20:.2f}" for one in row))
    return shown


def draw(path: Path, result: dict[str, Any]) -> None:
    figure = Figure(figsize=(6.4, 4.2), dpi=130, layout="constrained")
    FigureCanvasAgg(figure)
    axis = figure.subplots()
    styles = {
        "lion": ("LION (equilibrium)", "#D55E00", "o-"),
        "explicit": ("the same layers, unrolled", "#009E73", "s-"),
        "vpt-deep": (f"VPT-deep, {result['options']['prompts']} prompts", "#0072B2", "--"),
    }
    for name, (label, colour, style) in styles.items():
        own = result["figures"][name]
        axis.plot([one["steps"] for one in own], [one["bytes"] / 2**20 for one in own], style,
                  color=colour, label=label)  # fmt: skip
    options = result["options"]
    axis.set_title(f"Memory of a training step, {options['backbone']}, batch {options['batch']}")
    axis.set_xlabel("solver steps, or unrolled layers")
    axis.set_ylabel("kept for the backward pass (MiB)")
    axis.set_ylim(bottom=0)
    axis.grid(True, color="#dddddd", linewidth=0.6)
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(frameon=False)
    save_figure(path, figure)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--backbone", default="tiny-vit")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--prompts", type=int, default=10)
    parser.add_argument("--hidden", type=int, default=8)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--png", type=Path)
    options = parser.parse_args(arguments)
    result = measure(options.backbone, options.batch, options.prompts, options.hidden)
    print(json.dumps(result, indent=2))
    Console(file=sys.stderr).print(table(result))
    if options.output:
        write_json(options.output, result)
    if options.png:
        draw(options.png, result)


if __name__ == "__main__":
    main()
