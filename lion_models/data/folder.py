"""Image files as a source: a folder with one sub-folder per class, and lists of files."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch

from lion_models.base.errors import UserError
from lion_models.base.names import difference, look_alike
from lion_models.data.base import TEST, TRAIN, VALIDATION, FolderSource
from lion_models.data.files import (
    find_images,
    is_image,
    list_folder,
    walk,
    warn_of_left_out,
)
from lion_models.data.formats import image_suffixes, unread_suffixes
from lion_models.data.levels import joint_levels
from lion_models.data.transforms import Geometry
from lion_models.data.verify import FileChecks, check_files, judge_damaged, warn_of_constant

__all__ = ["SPLITS", "FoldersWarning", "file_source", "find_images", "open_folder"]

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


class FoldersWarning(UserWarning):
    """Pictures beside class folders or in folders inside of them, and classes that look alike."""


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
    classes = _class_names(folder, folders, checks.classes)
    _warn_of_loose(folder)
    paths, labels = _collect(folder, folders, classes)
    return file_source(str(folder), classes, labels, paths, folder, geometry, checks)


def _sub_folders(folder: Path) -> list[Path]:
    return [entry for entry in list_folder(folder) if entry.is_dir()]


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
        stray = [entry for entry in list_folder(part) if is_image(str(entry))]
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
    classes = _class_names(train, _sub_folders(train), checks.classes)
    paths: list[Path] = []
    labels: list[int] = []
    official: list[int] = []
    for part, role in parts.items():
        folders = _sub_folders(part)
        extra = [entry for entry in folders if entry.name not in classes]
        if extra:
            near = look_alike([extra[0].name], classes).get(extra[0].name, "")
            what = difference(extra[0].name, near)
            hint = f"; it differs from '{near}' in {what}" if near else ""
            raise UserError(
                f"`data`: {extra[0]} is a class that {train} does not have; expected the same "
                f"class folders in every part{hint}"
            )
        more_paths, more_labels = _collect(folder, folders, classes)
        paths += more_paths
        labels += more_labels
        official += [role] * len(more_paths)
    return file_source(str(folder), classes, labels, paths, folder, geometry, checks, official)


def _class_names(
    folder: Path, folders: Sequence[Path], known: Sequence[str] | None
) -> tuple[str, ...]:
    """Names of the classes; those that are `known` need be one alone."""
    if len(folders) < (2 if known is None else 1):
        if folders and folders[0].name.lower() in _PART_FOLDERS and _sub_folders(folders[0]):
            raise UserError(
                f"`data`: {folder} holds '{folders[0].name}' alone, and a split has two parts or "
                f"three; name {folders[0]}, which is then divided, or put the other parts beside it"
            )
        found = f"one class ('{folders[0].name}')" if folders else "no sub-folder"
        inside = [entry.name for entry in _sub_folders(folders[0])] if folders else []
        hint = f"; if {inside[0]} and the like are the classes, name {folders[0]}" if inside else ""
        lists = [entry for entry in list_folder(folder) if entry.suffix.lower() == ".csv"]
        hint = f"; if {lists[0].name} has their classes, name that file" if lists else hint
        raise UserError(
            f"`data`: {folder} holds {found}; expected at least two class sub-folders, "
            f"such as cats/ and dogs/, with images in each{hint}"
        )
    names = tuple(entry.name for entry in folders)
    warn_of_look_alikes(names, folder)
    return names


def warn_of_look_alikes(classes: Sequence[str], where: Path) -> None:
    """Warn of classes that a reader may take for one."""
    alike = look_alike(classes, classes)
    if alike:
        one, other = next(iter(alike.items()))
        warnings.warn(
            f"`data`: {len(alike)} classes of {where} differ only in how they are written: "
            f"{one!r} and {other!r} in {difference(one, other)}; each is a class of its own",
            FoldersWarning,
            stacklevel=4,
        )


def _warn_of_loose(folder: Path) -> None:
    """Warn of pictures beside class folders."""
    unread = unread_suffixes()
    loose = [
        entry
        for entry in list_folder(folder)
        if is_image(str(entry)) or entry.suffix.lower() in unread
    ]
    if loose:
        shown = ", ".join(entry.name for entry in loose[:3]) + ", ..." * (len(loose) > 3)
        warnings.warn(
            f"`data`: {len(loose)} pictures beside the class folders of {folder} have no class and "
            f"are left out: {shown}; move them into class folders",
            FoldersWarning,
            stacklevel=4,
        )


def _collect(
    root: Path, folders: Sequence[Path], classes: tuple[str, ...]
) -> tuple[list[Path], list[int]]:
    """The images of each class folder, with their labels."""
    paths: list[Path] = []
    labels: list[int] = []
    others: list[Path] = []
    nested: list[tuple[Path, list[str]]] = []
    for class_folder in folders:
        found = walk(class_folder)
        if not found.images:
            warn_of_left_out(found.others, f"`data`: {class_folder}")
            raise UserError(
                f"`data`: class folder {class_folder} holds no image; put images "
                f"({', '.join(sorted(image_suffixes()))}) into it or remove it"
            )
        paths += found.images
        others += found.others
        labels += [classes.index(class_folder.name)] * len(found.images)
        inside = (path.relative_to(class_folder).parts for path in found.images)
        holders = list(dict.fromkeys(parts[0] for parts in inside if len(parts) > 1))
        nested += [(class_folder, holders)] if holders else []
    warn_of_left_out(others, f"`data`: {root}")
    if nested:
        shown = "; ".join(
            f"'{entry.name}' from {', '.join(names[:3])}{', ...' * (len(names) > 3)}"
            for entry, names in nested[:3]
        )
        more = f" and {len(nested) - 3} more classes" if len(nested) > 3 else ""
        warnings.warn(
            f"`data`: classes of {root} take pictures of folders inside of them, all of one class: "
            f"{shown}{more}; if those are the classes, name the folder around them",
            FoldersWarning,
            stacklevel=4,
        )
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
    damaged, digests, extents = check_files(paths, root, checks.verify)
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
    own_levels = joint_levels(extents.values())
    levels = own_levels if checks.find_levels else geometry.levels
    warn_of_constant(extents, levels, root)
    kept = tuple(paths[row] for row in keep)
    return FolderSource(
        name,
        classes,
        kept_labels,
        replace(geometry, levels=levels),
        kept,
        tuple(digests[path] for path in kept),
        own_levels,
        official=parts,
        skipped=problems,
    )
