"""Runs in a folder: data, method, accuracy, trained weights, age."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import rich_click as click
from rich import box
from rich.table import Table

from lion_models.base.errors import UserError
from lion_models.cli import options
from lion_models.cli.console import out
from lion_models.cli.text import fit_table, short_name
from lion_models.run.folder import RESULT, read_config
from lion_models.run.log import METRICS

__all__ = ["command"]

UNITS = ((86_400, "days"), (3_600, "hours"), (60, "minutes"), (1, "seconds"))


@click.command("list", help=__doc__)
@options.RUNS
def command(runs: Path) -> None:
    if not runs.is_dir():
        raise UserError(f"--runs: {runs} does not exist; 'lion train' makes it")
    # A study's runs lie one folder deeper.
    files = [*runs.glob("*/config.json"), *runs.glob("*/*/config.json")]
    files.sort(key=lambda file: file.stat().st_mtime, reverse=True)
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 1, 0, 0))
    for heading in ("run", "data", "method"):
        table.add_column(heading, overflow="fold")
    for heading in ("test", "balanced", "weights", "age"):
        table.add_column(heading, justify="right", no_wrap=True)
    for file in files:
        row = _row(file.parent)
        if row is not None:
            table.add_row(str(file.parent.relative_to(runs)), *row)
    if not table.row_count:
        click.echo(f"no runs in {runs}")
        return
    out.print(fit_table(table, out))


def _row(folder: Path) -> list[str] | None:
    """Of a run's table; None where a folder holds another program's config.json."""
    try:
        config = read_config(folder)
    except UserError:
        return None
    begun = folder / METRICS
    done = len(begun.read_text().splitlines()) if begun.is_file() else 0
    figures = [f"{done} of {config.training.epochs} epochs", "-", "-"]
    result = folder / RESULT
    if result.is_file():
        content: dict[str, Any] = json.loads(result.read_text())
        test = content.get("test", {})
        figures = [
            _percent(test.get("accuracy")),
            _percent(test.get("balanced_accuracy")),
            f"{content['parameters']['trained']:,}",
        ]
    newest = max(file.stat().st_mtime for file in folder.iterdir())
    data = short_name(config.data.data)
    return [data, config.method.name, *figures, age(time.time() - newest)]


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.1f}%"


def age(seconds: float) -> str:
    """In the largest unit of which there are two."""
    size, unit = next((each for each in UNITS if seconds >= 2 * each[0]), UNITS[-1])
    return f"{max(0, seconds) // size:.0f} {unit}"
