"""Photographs among the stamps of Tux Paint, in twelve classes of ours.

The stamps are GPL-2: they are read where the user has installed or extracted them, and never
copied. Drawings (`cartoon`, `toys`), vector files and mirror images are left out; a mirror image in
another part of the split would give the answer away.
"""

from __future__ import annotations

from pathlib import Path

from lion_models.base.errors import UserError
from lion_models.data.base import FolderSource
from lion_models.data.folder import file_source, find_images
from lion_models.data.transforms import Geometry
from lion_models.data.verify import FileChecks

__all__ = ["CLASSES", "open_tuxpaint"]

# class: folders of stamps, and single ones; a longer name overrules a shorter one around it.
CLASSES = {
    "bird": ("animals/birds",),
    "flower": ("plants/flowers",),
    "fruit or nut": ("food/fruit", "food/nuts"),
    "hoofed mammal": (
        "animals/mammals/bovines",
        "animals/mammals/camel",
        "animals/mammals/deer",
        "animals/mammals/equines",
        "animals/mammals/giraffe",
        "animals/mammals/hippopotamus",
        "animals/mammals/pig",
        "animals/mammals/pig_golden",
        "animals/mammals/pig_golden2",
        "animals/mammals/rhino_black",
        "animals/mammals/wildboar",
    ),
    "household": ("household",),
    "other mammal": ("animals/mammals", "animals/marsupials"),
    "sea animal": ("animals/fish", "animals/mammals/aquatic"),
    "small animal": (
        "animals/insects",
        "animals/amphibians",
        "animals/lizards",
        "animals/shellfish",
    ),
    "space": ("space",),
    "tool": ("household/tools", "household/arttools"),
    "vegetable": ("food/vegetables", "food/spices"),
    "vehicle": ("vehicles", "military/vehicles"),
}
_LEFT_OUT = frozenset({"cartoon", "toys", "plastic"})
_OVERLAYS = frozenset({"sedan_police"})  # an emblem for the stamp of a car, no picture by itself


def open_tuxpaint(name: str, stamps: Path, geometry: Geometry, checks: FileChecks) -> FolderSource:
    """Open the photographs below a folder of stamps.

    Args:
        name: what the user wrote.
        stamps: the folder that holds `animals`, `food`, `household` and so on.
        geometry: how pictures are fitted to the backbone.
        checks: what to do about damaged files.

    Raises:
        UserError: a class has no photograph there.
    """
    folders = {folder: label for label, each in enumerate(CLASSES.values()) for folder in each}
    paths, labels = [], []
    for path in find_images(stamps):
        inside = path.relative_to(stamps)
        drawing = bool(_LEFT_OUT.intersection(inside.parts)) or path.stem in _OVERLAYS
        if drawing or path.stem.endswith(("_mirror", "_flip")):
            continue
        owners = [folder for folder in folders if inside.with_suffix("").is_relative_to(folder)]
        if owners:
            paths.append(path)
            labels.append(folders[max(owners, key=len)])
    empty = [each for label, each in enumerate(CLASSES) if label not in set(labels)]
    if empty:
        raise UserError(
            f"`data` {name}: {stamps} holds no photograph for {', '.join(empty)}; expected the "
            "stamps of Debian's tuxpaint-stamps-default: run lion data prepare tuxpaint"
        )
    return file_source(name, tuple(CLASSES), labels, paths, stamps, geometry, checks)
