"""Methods times seeds on one data set: run what is missing, then a table, JSON and a picture."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.table import Table

from lion_models.backbones import load_backbone
from lion_models.errors import UserError
from lion_models.training.config import RunConfig, build_model
from lion_models.training.plots import plot_comparison
from lion_models.training.run_data import open_data
from lion_models.training.runs import measure_run, prepare_folder, read_config, train_run
from lion_models.training.trainer import FitState

__all__ = ["comparison_table", "run_comparison", "summarise"]

OnEpoch = Callable[[RunConfig, FitState], None]


def run_comparison(
    folder: Path,
    base: RunConfig,
    methods: Sequence[str],
    seeds: Sequence[int],
    rates: Sequence[float] = (),
    *,
    overwrite: bool = False,
    device: str = "cpu",
    on_epoch: OnEpoch = lambda config, state: None,
) -> dict[str, Any]:
    """Train every method with every seed, test each once, and write compare.json and compare.png.

    A cell that is finished already is not run again; one that was interrupted goes on.

    Args:
        folder: holds one run per cell, `METHOD-sSEED` (and `-lrRATE` where rates are given).
        base: what all cells share; its method and seed are replaced.
        methods: names of methods.
        seeds: one run per method and seed.
        rates: learning rates to try for each cell; validation chooses, and only the chosen one is
            tested. Empty means each method's default.
        overwrite: replace cells that were run with other options.
        device: where to train.
        on_epoch: called after every epoch.

    Returns:
        The content of compare.json: `options`, `cells` and `summary`.
    """
    backbone = load_backbone(base.backbone)
    source = open_data(base, backbone)
    for method in methods:  # fail on what does not go together before anything has run
        build_model(replace(base, method=method), backbone, len(source.classes))
    cells = []
    for seed in seeds:
        for method in methods:
            best: tuple[float, Path] | None = None
            for lr in rates or (base.lr,):
                config = replace(base, method=method, seed=seed, lr=lr).resolved()
                name = f"{method}-s{seed}" + (f"-lr{lr:g}" if rates else "")
                _prepare_cell(folder / name, config, overwrite)

                def tell(state: FitState, config: RunConfig = config) -> None:
                    on_epoch(config, state)

                result = train_run(
                    folder / name,
                    config,
                    test=False,
                    device=device,
                    backbone=backbone,
                    source=source,
                    on_epoch=tell,
                )
                if best is None or result["validation_accuracy"] > best[0]:
                    best = result["validation_accuracy"], folder / name
            if best is not None:
                measure_run(best[1], device=device, backbone=backbone, source=source)
                cells.append(_read_cell(best[1]))
    options = base.to_dict()
    for key in ("method", "seed"):
        del options[key]
    summary = summarise(cells)
    written = {"options": options, "cells": cells, "summary": summary}
    partial = folder / "compare.part"
    partial.write_text(json.dumps(written, indent=2) + "\n")
    partial.replace(folder / "compare.json")
    shots = f"{base.shots} images a class" if base.shots else "all images"
    plural = "seed" if len(seeds) == 1 else "seeds"
    title = f"{base.data}, {shots}, frozen {base.backbone}, {len(seeds)} {plural}"
    plot_comparison(folder / "compare.png", title, cells)
    return written


def _prepare_cell(folder: Path, config: RunConfig, overwrite: bool) -> None:
    started = (folder / "config.json").is_file()
    if started and read_config(folder) == config:
        return
    if started and not overwrite:
        raise UserError(
            f"{folder} was run with other options; use --overwrite to replace it, or another --name"
        )
    prepare_folder(folder, config, resume=False, overwrite=overwrite)


def _read_cell(folder: Path) -> dict[str, Any]:
    result = json.loads((folder / "result.json").read_text())
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    test = result["test"]
    steps = [value for key, value in test.items() if key.startswith("steps_")]
    config = read_config(folder)
    return {
        "method": result["method"],
        "seed": result["seed"],
        "run": folder.name,
        "recipe": config.recipe._asdict(),
        "test_accuracy": test["accuracy"],
        "validation_accuracy": result["validation_accuracy"],
        "trained": result["parameters"]["trained"],
        "without_head": result["parameters"]["without_head"],
        **_kept_counts(result["parameters"]),
        "seconds": result["seconds"],
        "solver_steps": sum(steps) / len(steps) if steps else None,
        "curve": [row["validation_accuracy"] for row in rows],
        "traces": result["traces"],
    }


def _kept_counts(counts: dict[str, int]) -> dict[str, int]:
    """What pruning leaves; runs of versions without pruning kept everything."""
    return {
        "kept": counts.get("kept", counts["trained"]),
        "kept_without_head": counts.get("kept_without_head", counts["without_head"]),
        "nonzero_without_head": counts.get("nonzero_without_head", counts["without_head"]),
    }


def summarise(cells: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Mean and sample standard deviation over the seeds, one row per method."""
    by_method: dict[str, list[dict[str, Any]]] = {}
    for cell in cells:
        by_method.setdefault(cell["method"], []).append(cell)
    rows = []
    for method, own in by_method.items():
        values = [cell["test_accuracy"] for cell in own]
        steps = own[0]["solver_steps"] and statistics.fmean(c["solver_steps"] for c in own)
        rows.append(
            {
                "method": method,
                "seeds": len(own),
                "test_accuracy": statistics.fmean(values),
                "test_spread": statistics.stdev(values) if len(values) > 1 else None,
                "validation_accuracy": statistics.fmean(c["validation_accuracy"] for c in own),
                "without_head": own[0]["without_head"],
                "trained": own[0]["trained"],
                "kept": own[0]["kept"],
                "kept_without_head": own[0]["kept_without_head"],
                "nonzero_without_head": statistics.fmean(c["nonzero_without_head"] for c in own),
                "seconds": statistics.fmean(cell["seconds"] for cell in own),
                "solver_steps": steps,
            }
        )
    return rows


def comparison_table(summary: Sequence[dict[str, Any]], title: str) -> Table:
    """Test accuracy, trained weights with and without the head, kept ones, seconds, solver steps.

    Kept are the weights that pruning leaves, without the head. VPT-deep is compared with the
    weights trained, not with those kept.
    """
    table = Table(title=title, title_justify="left")
    table.add_column("method", no_wrap=True)
    for heading in ("accuracy", "trained", "no head", "kept", "vs VPT-deep", "seconds", "steps"):
        table.add_column(heading, justify="right", no_wrap=True)
    vpt = next((row["without_head"] for row in summary if row["method"] == "vpt-deep"), None)
    for row in summary:
        spread = f" ± {100 * row['test_spread']:.1f}" if row["test_spread"] is not None else ""
        relative = f"{100 * (row['without_head'] / vpt - 1):+.1f}%" if vpt else ""
        steps = f"{row['solver_steps']:.1f}" if row["solver_steps"] else "-"
        table.add_row(
            row["method"],
            f"{100 * row['test_accuracy']:.1f}%{spread}",
            f"{row['trained']:,}",
            f"{row['without_head']:,}",
            f"{row['kept_without_head']:,}",
            relative,
            f"{row['seconds']:.1f}",
            steps,
        )
    return table
