"""Labels in a CSV file: a row `path,label` for each picture, paths as seen from the file."""

from __future__ import annotations

import csv
import io
import os
from collections.abc import Sequence
from pathlib import Path

from lion_models.base.errors import UserError
from lion_models.data.base import FolderSource
from lion_models.data.folder import SPLITS, file_source, warn_of_look_alikes
from lion_models.data.text import read_text
from lion_models.data.transforms import Geometry
from lion_models.data.verify import FileChecks

__all__ = ["LIST_SUFFIXES", "open_label_list"]

LIST_SUFFIXES = frozenset({".csv", ".tsv"})
PATHS = ("path", "file", "filename", "file_name", "filepath", "image", "image_path")
LABELS = ("label", "class", "class_name", "category", "target")
PARTS = ("split", "part", "subset")
EXPECTED = "expected a first line 'path,label' and then a line for each picture"


def open_label_list(path: Path, geometry: Geometry, checks: FileChecks) -> FolderSource:
    """Open the pictures that a CSV file lists.

    Args:
        path: with a heading: a column of paths and one of labels, by which the classes are sorted,
            and where it has one a column `split` of the parts `train`, `test` and so on.
        geometry: how pictures are fitted to the backbone.
        checks: what to do about missing and damaged files.

    Raises:
        UserError: a column is missing or there are several of labels, a row has no label or
            several, a picture is listed twice, or there is only one class.
    """
    rows, columns = _read_rows(path)
    files: list[Path] = []
    names: list[str] = []
    parts: list[int] = []
    seen: dict[str, int] = {}
    for number, row in rows:
        place = f"`data`: {path}, line {number}"
        values = [row[at].strip() if at < len(row) else "" for at in columns]
        if not values[0] or not values[1]:
            raise UserError(f"{place}: expected a path and a label, got {row}; add what is missing")
        file = _file(path.parent, values[0])
        known = os.path.normpath(file)
        if known in seen:
            raise UserError(
                f"{place}: {values[0]} is listed in line {seen[known]} already; several labels "
                "of one picture are not supported; keep one"
            )
        if any(mark in values[1] for mark in ";|"):
            raise UserError(
                f"{place}: '{values[1]}' looks like several labels, which are not supported; keep "
                "one for each picture"
            )
        seen[known] = number
        files.append(file)
        names.append(values[1])
        if len(columns) > 2:
            parts.append(_part(place, values[2]))
    classes = tuple(sorted(set(names), key=_in_order))
    if len(classes) < (2 if checks.classes is None else 1):
        found = f"one class ('{classes[0]}')" if classes else "no picture"
        raise UserError(f"`data`: {path} lists {found}; {EXPECTED}, of at least two classes")
    warn_of_look_alikes(classes, path)
    numbers = {name: label for label, name in enumerate(classes)}
    labels = [numbers[name] for name in names]
    return file_source(
        str(path), classes, labels, files, path.parent, geometry, checks, parts or None
    )


def _file(folder: Path, name: str) -> Path:
    """The picture that a name stands for; lists of Windows have `\\` for `/`."""
    file = folder / name
    other = folder / name.replace("\\", "/")
    return other if "\\" in name and not file.exists() and other.exists() else file


def _in_order(label: str) -> tuple[bool, int, str, str]:
    """Whole numbers by their size, before other names."""
    digits = label.lstrip("0") if label.isdecimal() else ""  # of which int() takes 4300
    return (not label.isdecimal(), len(digits), digits, label)


def _part(place: str, text: str) -> int:
    part = SPLITS.get(text.lower())
    if part is None:
        raise UserError(f"{place}: '{text}' is no part; expected one of {', '.join(SPLITS)}")
    return part


def _read_rows(path: Path) -> tuple[list[tuple[int, list[str]]], list[int]]:
    """The rows with their lines' numbers, and the columns of path, label and, if any, part."""
    text = read_text(path)
    heading = next((line for line in io.StringIO(text, newline="") if line.strip()), "")
    delimiter = max("\t,;", key=heading.count)
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    try:
        rows = [(reader.line_num, row) for row in reader if any(cell.strip() for cell in row)]
    except csv.Error as error:
        place = f"`data`: {path}, line {reader.line_num}"
        raise UserError(f"{place}: no CSV ({error}); is a quote not closed? {EXPECTED}") from error
    titles = [cell.strip().lower() for cell in rows[0][1]] if rows else []
    for number, row in rows:
        if any(cell.strip() for cell in row[len(titles) :]):
            raise UserError(
                f"`data`: {path}, line {number}: {len(row)} cells for {len(titles)} columns; put "
                f"quotes around what holds '{delimiter}'"
            )
    columns = []
    for what, known in (("path", PATHS), ("label", LABELS), ("part", PARTS)):
        found = [at for at, title in enumerate(titles) if title in known]
        if what == "part" and not found:
            continue
        if len(found) != 1:
            raise UserError(
                f"`data`: {path} has {len(found)} columns of {what}s ({_some(titles)}); {EXPECTED}"
                "; several labels of one picture are not supported"
            )
        columns += found
    return rows[1:], columns


def _some(titles: Sequence[str]) -> str:
    return ", ".join(titles[:6]) + (", ..." if len(titles) > 6 else "")
