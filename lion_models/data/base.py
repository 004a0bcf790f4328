"""What a source of images is, and the kinds that hold arrays and files."""

from __future__ import annotations

import hashlib
import os
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from lion_models.base.errors import UserError
from lion_models.data.images import decode_file
from lion_models.data.levels import Levels
from lion_models.data.transforms import Geometry

__all__ = [
    "TEST",
    "TRAIN",
    "VALIDATION",
    "ArraySource",
    "DecodingSource",
    "FolderSource",
    "Source",
    "check_fit",
]

TRAIN, VALIDATION, TEST = 0, 1, 2


@dataclass(eq=False)
class Source(ABC):
    """Images with labels.

    Attributes:
        name: what the user wrote.
        classes: class names; a label is an index into them.
        labels: int64 (N,).
        official: int8 (N,) of `TRAIN`, `VALIDATION` and `TEST` where the data set brings a split of
            its own; None where all rows are free to be divided.
        skipped: a line for each damaged or missing file that was left out.
    """

    name: str
    classes: tuple[str, ...]
    labels: Tensor
    official: Tensor | None = field(default=None, kw_only=True)
    skipped: tuple[str, ...] = field(default=(), kw_only=True)

    @abstractmethod
    def load(self, rows: Tensor, training: bool = False) -> Tensor:
        """Decode the images of some rows.

        Args:
            rows: int64 (n,).
            training: with the margin that random crops move in.

        Returns:
            uint8 (n, C, S, S), as they are evaluated, or (n, C, R, R) with R >= S for training.
        """

    def row_names(self) -> Sequence[str]:
        """What tells rows of one label apart without decoding them, the same wherever the data
        lies: names of files, for instance. Empty where there is nothing of the kind."""
        return ()

    def digests(self) -> Sequence[str]:
        """What tells the contents of each row from others; empty where that is not known."""
        return ()

    def __len__(self) -> int:
        return len(self.labels)


@dataclass(eq=False)
class ArraySource(Source):
    """Images that already lie in memory.

    Args:
        images: (N, C, H, W), uint8, or float32 with values from 0 to 255.
        geometry: what makes a backbone's input of them; None hands out uint8 images as they are.

    Raises:
        UserError: the shape is another one, or there is not one label to an image.
    """

    images: Tensor
    geometry: Geometry | None = None

    def __post_init__(self) -> None:
        if self.images.dim() != 4 or self.images.shape[1] not in (1, 3):
            raise UserError(
                f"{self.name}: expected images (N, 1 or 3, height, width), got "
                f"{tuple(self.images.shape)}; put the channels second and add one if there is none"
            )
        if self.labels.shape != self.images.shape[:1]:
            raise UserError(
                f"{self.name}: {len(self.images)} images but labels of shape "
                f"{tuple(self.labels.shape)}; expected one label to an image"
            )
        if len(self.labels) and not 0 <= self.labels.min() <= self.labels.max() < len(self.classes):
            raise UserError(
                f"{self.name}: labels run from {self.labels.min()} to {self.labels.max()}; "
                f"expected 0 to {len(self.classes) - 1} for {len(self.classes)} classes"
            )

    def digests(self) -> Sequence[str]:
        arrays = self.images.contiguous().numpy()
        return [hashlib.blake2b(array, digest_size=8).hexdigest() for array in arrays]

    def load(self, rows: Tensor, training: bool = False) -> Tensor:
        images = self.images[rows]
        return images if self.geometry is None else self.geometry.arrays(images, training)


@dataclass(eq=False)
class DecodingSource(Source):
    """Images that are decoded one by one.

    Attributes:
        geometry: what makes a backbone's input of each.
    """

    geometry: Geometry

    @abstractmethod
    def decode(self, row: int, training: bool) -> Tensor:
        """One image: uint8 (C, S, S), or with the margin for training (C, R, R)."""

    def load(self, rows: Tensor, training: bool = False) -> Tensor:
        if len(rows) == 0:
            return self.geometry.empty(training)
        return torch.stack([self.decode(row, training) for row in rows.tolist()])


@dataclass(eq=False)
class FolderSource(DecodingSource):
    """Image files, decoded on demand.

    Attributes:
        paths: of the files.
        checksums: of their contents; see `digests`.
        own_levels: the rule that their values call for, whatever the geometry has.
    """

    paths: tuple[Path, ...]
    checksums: tuple[str, ...] = ()
    own_levels: Levels | None = None

    def digests(self) -> Sequence[str]:
        return self.checksums

    def decode(self, row: int, training: bool) -> Tensor:
        return decode_file(self.paths[row], self.geometry, training)

    def row_names(self) -> Sequence[str]:
        """Paths of the files below the folder that they share."""
        paths = [path.as_posix() for path in self.paths]
        # Letter by letter, then cut at a slash: commonpath refuses lists that mix kinds of paths.
        start = os.path.commonprefix(paths).rfind("/") + 1  # noqa: RUF071  (see above)
        return [path[start:] for path in paths]


def check_fit(source: Source, channels: int, size: int) -> None:
    """Raise UserError unless a source's images have the shape that a backbone takes."""
    found = tuple(source.load(torch.arange(min(1, len(source)))).shape[1:])
    if found != (channels, size, size):
        raise UserError(
            f"{source.name}: its images are {found}, the backbone takes "
            f"{(channels, size, size)} (channels, height, width); give the source a Geometry of "
            f"{channels} channels and size {size}, or resize the images"
        )
