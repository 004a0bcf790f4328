"""Image files as a source: a folder with one sub-folder per class, and lists of files."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NoReturn

import torch

from lion_models.base.errors import UserError
from lion_models.data.base import TEST, TRAIN, VALIDATION, FolderSource
from lion_models.data.images import IMAGE_SUFFIXES, unreadable
from lion_models.data.transforms import Geometry
from lion_models.data.verify import FileChecks, find_damaged, judge_damaged

__all__ = ["SPLITS", "file_source", "find_images", "open_folder"]

# What parts of a data set are called; Hugging Face has `dev` too.
SPLITS = {
    "train": TRAIN,
    "validation": VALIDATION,
    "valid": VALIDATION,
    "val": VALIDATION,
    "dev": VALIDATION,
    "test": TEST,
}
_PART_FOLDERS = SPLITS | {"training": TRAIN, "testing": TEST}


# What macOS's archives and Synology's servers put beside pictures; it holds copies of them.
_LEFT_BEHIND = frozenset({"__MACOSX", "@eaDir"})


def find_images(folder: Path) -> list[Path]:
    """Every image file below `folder`, by suffix, sorted.

    Hidden files and folders are left out, and so are `__MACOSX` and `@eaDir`. Links to folders are
    followed, but no folder is listed twice. A link that leads nowhere is listed: its file is
    missing.

    Raises:
        UserError: a folder cannot be read.
    """
    found: list[Path] = []
    # A link back to a folder around this one would list it again, under other names.
    seen = {str(parent) for parent in folder.resolve().parents}
    starts = [str(folder)]  # links wait until the folders themselves have been listed
    while starts:
        for here, names, files in os.walk(starts.pop(0), onerror=_refuse_unreadable):
            place = os.path.realpath(here)
            if place in seen:
                names.clear()
                continue
            seen.add(place)
            names[:] = sorted(name for name in names if not _is_clutter(name))
            inside = [os.path.join(here, name) for name in names]
            starts += [path for path in inside if os.path.islink(path)]
            found += [Path(here, name) for name in files if _is_image(os.path.join(here, name))]
    return sorted(found)


def _refuse_unreadable(error: OSError) -> NoReturn:
    raise unreadable(Path(error.filename), error) from error


def _is_image(path: str) -> bool:
    """By its name; pipes and the like are none, what is listed and not there may have been one."""
    name, suffix = os.path.basename(path), os.path.splitext(path)[1]
    if suffix.lower() not in IMAGE_SUFFIXES or _is_clutter(name):
        return False
    return os.path.isfile(path) or not os.path.exists(path)


def _is_clutter(name: str) -> bool:
    return name.startswith(".") or name in _LEFT_BEHIND


def open_folder(folder: Path, geometry: Geometry, checks: FileChecks) -> FolderSource:
    """Open a folder with one sub-folder of images per class, or with `train/CLASS` and so on.

    Where sub-folders are called `train` and `test` or `val`, or another common name in any case,
    and hold folders themselves, they are the data set's own split.

    Raises:
        UserError: fewer than two classes, a class without an image, a class that the training part
            lacks, something beside the parts or in a part that is no class, or a damaged file.
    """
    folders = _sub_folders(folder)
    parts = _find_parts(folder, folders)
    if parts:
        return _open_split(folder, parts, geometry, checks)
    classes = _class_names(folder, folders)
    paths, labels = _collect(folders, classes)
    return file_source(str(folder), classes, labels, paths, folder, geometry, checks)


def _sub_folders(folder: Path) -> list[Path]:
    try:
        entries = sorted(folder.iterdir())
    except OSError as error:
        _refuse_unreadable(error)
    return [entry for entry in entries if entry.is_dir() and not _is_clutter(entry.name)]


def _find_parts(folder: Path, folders: Sequence[Path]) -> dict[Path, int]:
    """The folders that are parts of a split, with their roles; none where all are classes."""
    roles = {entry: _PART_FOLDERS.get(entry.name.lower()) for entry in folders}
    parts = {entry: role for entry, role in roles.items() if role is not None}
    train = [entry for entry, role in parts.items() if role == TRAIN]
    inside = {part: _sub_folders(part) for part in parts}
    # Classes may be called so too; then images lie directly in all of them.
    if not train or len(parts) < 2 or not any(inside.values()):
        return {}
    names = ", ".join(part.name for part in parts)
    classes = f"or, if these are classes, rename {train[0]}"
    if len(train) > 1:
        raise UserError(
            f"`data`: {train[0].name} and {train[1].name} are both training parts of {folder}; "
            f"put one's files into the other, {classes}"
        )
    odd = [entry for entry in folders if entry not in parts]
    if odd:
        raise UserError(
            f"`data`: {folder} holds the parts of a split ({names}) and beside them "
            f"'{odd[0].name}', which is none; move it out of {folder}, {classes}"
        )
    for part in parts:
        if not inside[part]:
            raise UserError(
                f"`data`: {part} holds no class folder; expected the same ones in {names}; sort "
                f"its images into them, move it out of {folder}, {classes}"
            )
        stray = [entry for entry in sorted(part.iterdir()) if _is_image(str(entry))]
        if stray:
            raise UserError(
                f"`data`: {stray[0]} lies beside class folders; expected images inside of them "
                f"alone; move it into one of them or out of {part}, {classes}"
            )
    return parts


def _open_split(
    folder: Path, parts: Mapping[Path, int], geometry: Geometry, checks: FileChecks
) -> FolderSource:
    train = next(part for part, role in parts.items() if role == TRAIN)
    classes = _class_names(train, _sub_folders(train))
    paths: list[Path] = []
    labels: list[int] = []
    official: list[int] = []
    for part, role in parts.items():
        folders = _sub_folders(part)
        extra = [entry for entry in folders if entry.name not in classes]
        if extra:
            raise UserError(
                f"`data`: {extra[0]} is a class that {train} does not have; expected the same "
                "class folders in every part"
            )
        more_paths, more_labels = _collect(folders, classes)
        paths += more_paths
        labels += more_labels
        official += [role] * len(more_paths)
    return file_source(str(folder), classes, labels, paths, folder, geometry, checks, official)


def _class_names(folder: Path, folders: Sequence[Path]) -> tuple[str, ...]:
    if len(folders) < 2:
        if folders and folders[0].name.lower() in _PART_FOLDERS and _sub_folders(folders[0]):
            raise UserError(
                f"`data`: {folder} holds '{folders[0].name}' alone, and a split has two parts or "
                f"three; name {folders[0]}, which is then divided, or put the other parts beside it"
            )
        found = f"one class ('{folders[0].name}')" if folders else "no sub-folder"
        raise UserError(
            f"`data`: {folder} holds {found}; expected at least two class sub-folders, "
            "such as cats/ and dogs/, with images in each"
        )
    return tuple(entry.name for entry in folders)


def _collect(folders: Sequence[Path], classes: tuple[str, ...]) -> tuple[list[Path], list[int]]:
    """The images of each class folder, with their labels."""
    paths: list[Path] = []
    labels: list[int] = []
    for class_folder in folders:
        found = find_images(class_folder)
        if not found:
            raise UserError(
                f"`data`: class folder {class_folder} holds no image; put images "
                f"({', '.join(sorted(IMAGE_SUFFIXES))}) into it or remove it"
            )
        paths += found
        labels += [classes.index(class_folder.name)] * len(found)
    return paths, labels


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
            f"`data`: no usable image is left in class '{classes[gone[0]]}' of {name}; "
            "replace its files or remove the class"
        )
    parts = None
    if official is not None:
        parts = torch.tensor([official[row] for row in keep], dtype=torch.int8)
    kept = tuple(paths[row] for row in keep)
    return FolderSource(
        name, classes, kept_labels, geometry, kept, official=parts, skipped=problems
    )
