"""What `data` can name, and how each of it is opened.

A source knows the label of every image at once and decodes images only when asked, so that a
wrong path, an empty class or too few images is reported before any work starts.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from lion_models.base.errors import UserError, did_you_mean
from lion_models.data.archive import unpacked
from lion_models.data.base import ArraySource, FolderSource, Source
from lion_models.data.folder import find_images, open_folder
from lion_models.data.hub import (
    is_saved_dataset,
    open_hugging_face,
    open_saved_dataset,
    open_torchvision,
)
from lion_models.data.idx import is_idx_folder, open_idx
from lion_models.data.label_list import LIST_SUFFIXES, open_label_list
from lion_models.data.levels import Levels
from lion_models.data.named.catalogue import CATALOGUE, files_of
from lion_models.data.named.cifar10 import open_cifar10
from lion_models.data.named.emoji import open_emoji
from lion_models.data.named.packaged import open_table
from lion_models.data.named.tuxpaint import open_tuxpaint
from lion_models.data.transforms import Geometry
from lion_models.data.verify import FileChecks
from lion_models.data.vtab import is_vtab, open_vtab

__all__ = ["ArraySource", "FolderSource", "Source", "find_images", "open_source", "user_folder"]

FASHION = (
    "T-shirt/top",
    "Trouser",
    "Pullover",
    "Dress",
    "Coat",
    "Sandal",
    "Shirt",
    "Sneaker",
    "Bag",
    "Ankle boot",
)
_PREFIXES = ("torchvision", "hf")


def open_source(
    name: str,
    channels: int,
    size: int,
    *,
    transform: str = "square",
    bad_files: str = "fail",
    verify: str = "full",
    levels: Levels | Literal["auto"] | None = "auto",
    classes: tuple[str, ...] | None = None,
    draft: bool = False,
) -> Source:
    """Open the data that `data` names.

    Args:
        name: a data set by name (`lion data list`), `NAME:FOLDER` for one whose files lie in a
            folder of the user's, `torchvision:CIFAR10`, `hf:NAME` or `hf:NAME:CONFIGURATION`, or
            the path of a folder: one sub-folder of images per class, IDX files, the lists of
            VTAB-1k, or what Hugging Face `save_to_disk` wrote; of a zip file of such a folder; or
            of a CSV file with a line `path,label` for each image.
        channels: 1 or 3, the backbone's.
        size: the backbone's input height and width in pixels.
        transform: how pictures are fitted to the square; see `Geometry`.
        bad_files: `fail` on a missing or damaged file, or `skip` it with a warning.
        verify: `full` decodes every file once before anything starts, `header` reads its beginning.
        levels: which values of pictures with more than 8 bits are black and white; `auto` finds one
            rule for all files of a folder, None is the rule of `Geometry`.
        classes: of a trained model, of which the data may hold one alone.
        draft: decode large JPEG files at a part of their size; see `Geometry`.

    Raises:
        UserError: the name is neither known nor a folder, a package is missing, or the folder does
            not hold two classes with images.
    """
    given = None if levels == "auto" else levels
    geometry = Geometry(channels, size, transform, given, draft)
    checks = FileChecks(bad_files, verify, levels == "auto", classes)
    path = Path(name).expanduser()
    kind, _, rest = name.partition(":")
    if kind in CATALOGUE and (rest or name == kind):
        root = Path(rest).expanduser() if rest else None
        return _open_named(name, kind, root, geometry, checks)
    if kind in _PREFIXES and rest:
        if kind == "torchvision":
            return open_torchvision(rest, geometry)
        return open_hugging_face(rest, geometry)
    if path.is_dir():
        return _open_path(path, geometry, checks)
    if path.is_file() and path.suffix.lower() in LIST_SUFFIXES:
        return open_label_list(path, geometry, checks)
    if path.is_file() and path.suffix.lower() == ".zip":
        source = _open_path(unpacked(path), geometry, checks)
        source.name = name
        return source
    if path.exists():
        raise UserError(
            f"`data`: '{name}' is a file; expected a folder with one sub-folder of "
            "images per class, a zip file of one, or a CSV file of paths and labels (unpack any "
            "other archive; for single files use 'lion predict')"
        )
    raise UserError(
        f"`data`: '{name}' is neither a folder nor one of {', '.join(sorted(CATALOGUE))}, "
        f"torchvision:NAME, hf:NAME{did_you_mean(name, CATALOGUE)}"
    )


def user_folder(name: str) -> tuple[str, Path | None]:
    """What stands before a folder in a name that `open_source` takes, and the absolute folder.

    Returns:
        `("tuxpaint:", FOLDER)` for `tuxpaint:FOLDER`, `("", FOLDER)` for the path of a folder, and
        `("", None)` for data that lies in no folder of the user's.
    """
    kind, _, rest = name.partition(":")
    if kind in CATALOGUE and rest:
        return f"{kind}:", Path(rest).expanduser().resolve()
    if name in CATALOGUE or (kind in _PREFIXES and rest):
        return "", None
    return "", Path(name).expanduser().resolve()


def _open_named(
    name: str, kind: str, root: Path | None, geometry: Geometry, checks: FileChecks
) -> Source:
    files = files_of(CATALOGUE[kind], root)
    if kind == "fashion-mnist":
        return open_idx(name, files[0], geometry, FASHION)
    if kind == "cifar10":
        return open_cifar10(name, files, geometry)
    if kind == "tuxpaint":
        return open_tuxpaint(name, files[0], geometry, checks)
    if kind == "emoji":
        return open_emoji(name, files[0], files[1], geometry)
    return open_table(name, files[0], geometry)


def _open_path(folder: Path, geometry: Geometry, checks: FileChecks) -> Source:
    if is_vtab(folder):
        return open_vtab(folder, geometry, checks)
    if is_idx_folder(folder):
        return open_idx(str(folder), folder, geometry)
    if is_saved_dataset(folder):
        return open_saved_dataset(folder, geometry)
    return open_folder(folder, geometry, checks)
