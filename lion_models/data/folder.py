"""Image files as a source: a folder with one sub-folder per class, and lists of files."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from lion_models.data.base import FolderSource
from lion_models.data.images import IMAGE_SUFFIXES
from lion_models.data.transforms import Geometry
from lion_models.data.verify import FileChecks, find_damaged, judge_damaged
from lion_models.errors import UserError

__all__ = ["file_source", "find_images", "open_folder"]


def find_images(folder: Path) -> list[Path]:
    """Every image file below `folder`, by suffix, sorted; hidden files are left out."""
    return sorted(
        path
        for path in folder.rglob("*")
        if path.suffix.lower() in IMAGE_SUFFIXES
        and path.is_file()
        and not path.name.startswith(".")
    )


def open_folder(folder: Path, geometry: Geometry, checks: FileChecks) -> FolderSource:
    """Open a folder with one sub-folder of images per class.

    Raises:
        UserError: fewer than two classes, a class without an image, or a damaged file.
    """
    class_folders = sorted(
        entry for entry in folder.iterdir() if entry.is_dir() and not entry.name.startswith(".")
    )
    if len(class_folders) < 2:
        found = f"one class ('{class_folders[0].name}')" if class_folders else "no sub-folder"
        raise UserError(
            f"--data: {folder} holds {found}; expected at least two class sub-folders, "
            "such as cats/ and dogs/, with images in each"
        )
    paths: list[Path] = []
    labels: list[int] = []
    for label, class_folder in enumerate(class_folders):
        found_here = find_images(class_folder)
        if not found_here:
            raise UserError(
                f"--data: class folder {class_folder} holds no image; put images "
                f"({', '.join(sorted(IMAGE_SUFFIXES))}) into it or remove it"
            )
        paths += found_here
        labels += [label] * len(found_here)
    classes = tuple(entry.name for entry in class_folders)
    return file_source(str(folder), classes, labels, paths, folder, geometry, checks)


def file_source(
    name: str,
    classes: tuple[str, ...],
    labels: Sequence[int],
    paths: Sequence[Path],
    root: Path,
    geometry: Geometry,
    checks: FileChecks,
    official: Sequence[int] | None = None,
) -> FolderSource:
    """Look for damaged files, then make a source of the rest.

    Args:
        name, classes: see `Source`.
        labels: one for each of `paths`.
        paths: files below `root`.
        root: the data's folder; names what is remembered about its files.
        geometry: how pictures are fitted to the backbone.
        checks: what to do about damaged files.
        official: the part that each file belongs to; see `Source`.

    Raises:
        UserError: a file is damaged and `checks` says fail, or a class has no usable file left.
    """
    damaged = find_damaged(paths, root, checks.verify)
    problems = tuple(damaged[path] for path in paths if path in damaged)
    judge_damaged(problems, checks.bad_files, name)
    keep = [row for row, path in enumerate(paths) if path not in damaged]
    kept_labels = torch.tensor([labels[row] for row in keep], dtype=torch.int64)
    before = set(labels)
    gone = sorted(before - set(kept_labels.tolist()))
    if gone:
        raise UserError(
            f"--data: no usable image is left in class '{classes[gone[0]]}' of {name}; "
            "replace its files or remove the class"
        )
    parts = None
    if official is not None:
        parts = torch.tensor([official[row] for row in keep], dtype=torch.int8)
    return FolderSource(
        name, classes, kept_labels, tuple(paths[row] for row in keep), geometry, parts, problems
    )
