"""The folder layout in which VTAB-1k is passed around: lists of `path label` beside the images.

`train800.txt` and `val200.txt` choose, `test.txt` is read once. `train800val200.txt`, on which
published figures are trained once everything has been chosen, is checked to be the two together
where it is there; the trainer here needs validation images to choose the epoch and keeps to 800.
"""

from __future__ import annotations

from pathlib import Path

from lion_models.base.errors import UserError
from lion_models.data.base import TEST, TRAIN, VALIDATION, FolderSource
from lion_models.data.folder import file_source
from lion_models.data.text import read_text
from lion_models.data.transforms import Geometry
from lion_models.data.verify import FileChecks

__all__ = ["is_vtab", "open_vtab"]

PARTS = {"train800.txt": TRAIN, "val200.txt": VALIDATION, "test.txt": TEST}
UNION = "train800val200.txt"


def is_vtab(folder: Path) -> bool:
    """Whether a folder holds any of the lists."""
    return any((folder / name).is_file() for name in (*PARTS, UNION))


def open_vtab(folder: Path, geometry: Geometry, checks: FileChecks) -> FolderSource:
    """Open one data set of VTAB-1k.

    Args:
        folder: holds the lists; their paths are relative to it.
        geometry: how pictures are fitted to the backbone.
        checks: what to do about missing and damaged files.

    Raises:
        UserError: a list is missing or malformed, two lists share an image, or a file is missing or
            damaged and `checks` says fail.
    """
    missing = [name for name in PARTS if not (folder / name).is_file()]
    if missing:
        raise UserError(
            f"`data`: {folder} looks like VTAB-1k but lacks {', '.join(missing)}; expected "
            f"{', '.join(PARTS)} with a line 'path label' for each image"
        )
    lists = {name: _read_list(folder / name) for name in PARTS}
    seen: dict[str, str] = {}
    for name, entries in lists.items():
        for path, _ in entries:
            if path in seen:
                raise UserError(
                    f"`data`: {folder / name} lists {path}, which {seen[path]} lists already; "
                    "an image may be in one part only"
                )
            seen[path] = name
    if (folder / UNION).is_file():
        both = sorted(lists["train800.txt"] + lists["val200.txt"])
        if sorted(_read_list(folder / UNION)) != both:
            raise UserError(
                f"`data`: {folder / UNION} is not train800.txt and val200.txt together; "
                "fetch the lists again, all from one place"
            )
    paths, labels, official = [], [], []
    for name, entries in lists.items():
        for path, label in entries:
            paths.append(folder / path)
            labels.append(label)
            official.append(PARTS[name])
    count = max(labels) + 1
    if count < 2:
        raise UserError(f"`data`: {folder} holds one class (label 0); expected at least two")
    classes = tuple(str(label) for label in range(count))
    return file_source(str(folder), classes, labels, paths, folder, geometry, checks, official)


def _read_list(path: Path) -> list[tuple[str, int]]:
    entries = []
    for number, line in enumerate(read_text(path).splitlines(), start=1):
        if not line.strip():
            continue
        image, *rest = line.strip().rsplit(maxsplit=1)
        label = rest[0] if rest else ""
        if not label.isdecimal():
            raise UserError(
                f"`data`: {path}, line {number}: expected 'path label' with a whole number from 0 "
                f"as the label, got '{line.strip()}'; add the label or remove the line"
            )
        entries.append((image, int(label)))
    if not entries:
        raise UserError(f"`data`: {path} lists no image; expected a line 'path label' for each")
    return entries
