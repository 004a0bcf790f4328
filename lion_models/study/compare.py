"""Methods times seeds on one data set: run what is missing, then a table, JSON and a picture."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.table import Table

from lion_models.base.errors import UserError
from lion_models.base.files import make_folder, write_json
from lion_models.run.config import run_of
from lion_models.run.folder import read_config
from lion_models.run.run import Run
from lion_models.study.runner import CellRunner
from lion_models.study.trial import Cell, OnEvent, check_cells

__all__ = ["comparison_table", "run_comparison", "summarise"]


def run_comparison(
    folder: Path,
    base: Mapping[str, Any],
    methods: Sequence[str],
    seeds: Sequence[int],
    rates: Sequence[float] = (),
    *,
    runner: CellRunner,
    overwrite: bool = False,
    on_cells: Callable[[Sequence[Cell]], OnEvent] = lambda cells: lambda event: None,
) -> dict[str, Any]:
    """Train every method with every seed, test each once, and write compare.json and compare.png.

    A cell that is finished already is not run again; one that was interrupted goes on.

    Args:
        folder: holds one run per cell, `METHOD-sSEED` (and `-lrRATE` where rates are given).
        base: options that all cells share; its method and seed are replaced.
        methods: names of methods.
        seeds: one run per method and seed.
        rates: learning rates to try for each cell; validation chooses, and only the chosen one is
            tested. Empty means each method's default.
        runner: what runs the cells.
        overwrite: replace cells that were run with other options.
        on_cells: given the cells of a phase, gives what to call with their events.

    Returns:
        The content of compare.json: `options`, `cells` and `summary`.

    Raises:
        UserError: a folder holds something else, or a run failed.
    """
    # Imported here: worker processes, which load this module too, may draw nothing.
    from lion_models.run.plots import plot_comparison

    def run(cells: list[Cell]) -> None:
        check_cells(cells, overwrite)
        make_folder(folder)  # where nothing can be written, nothing is trained
        outcome = runner.run(cells, on_cells(cells))
        if outcome.failures:
            index, message = next(iter(outcome.failures.items()))
            others = f" (and {len(outcome.failures) - 1} more)" if len(outcome.failures) > 1 else ""
            raise UserError(f"{cells[index].folder.name}: {message}{others}")

    if any(not (folder / f"{methods[0]}-s{seed}").exists() for seed in seeds):
        for method in methods:  # fail on what does not go together before anything has run
            config = run_of(base, method=method, seed=seeds[0])
            Run(folder / method, config, bench=runner.bench).check(anew=True)
    groups = []
    for seed in seeds:
        for method in methods:
            group = []
            for lr in rates or (base.get("lr"),):
                config = run_of(base, method=method, seed=seed, lr=lr).resolved()
                name = f"{method}-s{seed}" + (f"-lr{lr:g}" if rates else "")
                group.append(Cell(folder / name, config, test=not rates))
            groups.append(group)
    run([cell for group in groups for cell in group])
    if rates:
        groups = [[replace(_best(group), test=True)] for group in groups]
        run([group[0] for group in groups])
    cells = [_read_cell(group[0].folder) for group in groups]
    options = {key: value for key, value in base.items() if key not in ("method", "seed")}
    summary = summarise(cells)
    written = {"options": options, "cells": cells, "summary": summary}
    write_json(folder / "compare.json", written)
    shots = f"{base['shots']} images a class" if base["shots"] else "all images"
    plural = "seed" if len(seeds) == 1 else "seeds"
    title = f"{base['data']}, {shots}, frozen {base['backbone']}, {len(seeds)} {plural}"
    plot_comparison(folder / "compare.png", title, cells)
    return written


def _best(cells: Sequence[Cell]) -> Cell:
    """The cell with the highest validation accuracy; the first of several."""
    return max(cells, key=lambda cell: (cell.result() or {})["validation_accuracy"])


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
    """Test accuracy, trained weights with and without the head, seconds, solver steps.

    Where a method pruned, a column shows the weights that are kept, without the head. VPT-deep is
    compared with the weights trained, not with those kept.
    """
    table = Table(title=title, title_justify="left")
    table.add_column("method", no_wrap=True)
    pruned = any(row["kept_without_head"] != row["without_head"] for row in summary)
    kept = ["kept"] if pruned else []  # all columns fit a terminal of 80 characters without it
    for heading in ("accuracy", "trained", "no head", *kept, "vs VPT-deep", "seconds", "steps"):
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
            *([f"{row['kept_without_head']:,}"] if pruned else []),
            relative,
            f"{row['seconds']:.1f}",
            steps,
        )
    return table
