"""What a run or a backbone is: parameters, licence, memory of a step, solver steps."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import rich_click as click
import torch
from rich.table import Table

from lion_models.backbones import TINY_VIT, load_backbone, read_vit, tiny_vit_path
from lion_models.backbones.config import BackboneConfig
from lion_models.base.errors import few
from lion_models.base.options import kinds_of
from lion_models.cli import options
from lion_models.cli.console import out
from lion_models.run import load_run
from lion_models.run.memory import kept_bytes

__all__ = ["command"]


@click.command("info", help=__doc__)
@options.path_argument(
    "run", "A run's folder or checkpoint; without it, the backbone alone.", required=False
)
@options.option_of(*kinds_of(BackboneConfig)[0])
def command(run: Path | None, backbone: str) -> None:
    facts = _backbone_facts(backbone) if run is None else _run_facts(run)
    table = Table(show_header=False)
    table.add_column()
    table.add_column(overflow="fold")
    for key, value in facts.items():
        table.add_row(key, str(value))
    out.print(table)


def _backbone_facts(name: str) -> dict[str, Any]:
    facts = load_backbone(name).describe()
    if name == TINY_VIT:
        facts |= read_vit(tiny_vit_path())[1]["training"]
    return facts


def _run_facts(run: Path) -> dict[str, Any]:
    loaded = load_run(run)
    model, config = loaded.model, loaded.config
    facts: dict[str, Any] = {
        "classes": few(loaded.classes, 40),
        "weights sha256": loaded.weights,
        **config.to_dict(),
    }
    result = run / "result.json"
    if result.is_file():
        figures = json.loads(result.read_text())
        facts |= figures["parameters"]
        facts |= {key: figures.get(key) for key in ("best_epoch", "validation_accuracy", "test")}
        for side, solve in figures["solver"].items():
            shown = ", ".join(f"{name} {value:.4g}" for name, value in solve.items())
            facts[f"solver, {side}"] = shown
    side = model.backbone.image_size
    images = torch.rand(config.training.batch, model.backbone.channels, side, side)
    facts[f"memory, batch of {config.training.batch}"] = (
        f"{kept_bytes(model, images) / 2**20:.2f} MiB kept for the backward pass"
    )
    return facts
