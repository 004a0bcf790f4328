"""What commands read from text, and how they name options and folders in it."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from rich.cells import cell_len
from rich.console import Console
from rich.table import Column, Table

from lion_models.base.errors import UserError, choose
from lion_models.base.names import shown

__all__ = ["dashed", "distinct", "fit_table", "folder_in", "listed", "numbers", "short_name"]


def dashed(message: str) -> str:
    """A message fit for a terminal, its options, `robust_on`, as the command line spells them."""
    return re.sub(r"`([a-z]\w*)`", lambda name: f"--{name[1].replace('_', '-')}", shown(message))


def numbers(option: str, text: str, kind: Callable[[str], Any]) -> list[Any]:
    """A comma-separated list of numbers, none there twice; an empty text is an empty list."""
    try:
        return distinct(option, [kind(part) for part in text.split(",")] if text else [])
    except ValueError as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{option}: expected numbers separated by commas, got '{text}'") from None


def listed(option: str, text: str, known: Iterable[str]) -> list[str]:
    """A comma-separated list of known names, none there twice; `all` is all of them."""
    known = list(known)
    if text == "all":
        return known
    return distinct(option, [choose(option, part.strip(), known) for part in text.split(",")])


def distinct(option: str, values: list[Any]) -> list[Any]:
    """The values; UserError where one is there twice, which would count one run as two."""
    twice = next((value for value in values if values.count(value) > 1), None)
    if twice is not None:
        raise UserError(f"{option}: {twice} is there twice; leave one out")
    return values


def fit_table(table: Table, console: Console) -> Table:
    """The table, or where it is too wide for the console, a line for each figure of a row."""
    around = 3 * len(table.columns) + 1 if table.show_edge else 2 * len(table.columns) - 2
    if sum(map(_least_width, table.columns)) + around <= console.width:
        return table
    narrow = Table(box=None, show_header=False, title=table.title, title_justify="left")
    narrow.add_column()
    narrow.add_column(overflow="fold")
    headings = [str(column.header).replace("\n", " ") for column in table.columns]
    for cells in zip(*(column.cells for column in table.columns), strict=True):
        for heading, cell in zip(headings, cells, strict=True):
            narrow.add_row(heading, cell)
        narrow.add_row()
    narrow.caption = table.caption
    return narrow


def _least_width(column: Column) -> int:
    """Of the longest line where a column does not wrap, else of the longest word."""
    texts = [str(column.header), *map(str, column.cells)]
    parts = [part for text in texts for part in (
        text.splitlines() if column.no_wrap else text.split())]  # fmt: skip
    return max(map(cell_len, parts), default=0)


def short_name(data: str) -> str:
    """The data's part of a run's name: the last part of a path, no colon."""
    # Not resolved: a link has the name that the user gave it.
    name = Path(os.path.abspath(data)).name
    if Path(data).is_file():
        name = Path(name).stem
    return name.replace(":", "-") or "data"


def folder_in(runs: Path, name: str | None, default: str) -> Path:
    """The folder that `--name` stands for, always below that of all runs.

    Raises:
        UserError: the name is empty or leads elsewhere.
    """
    if name is None:
        return runs / default
    parts = Path(name).parts
    if not parts or ".." in parts or Path(name).is_absolute():
        raise UserError(
            f"--name: expected a name such as first or study/first, got '{name}'; choose another "
            "folder with --runs"
        )
    return runs / name
