"""The IDX format of MNIST and Fashion-MNIST, plain or gzip-compressed."""

from __future__ import annotations

import gzip
import math
import struct
import zlib
from pathlib import Path

import torch
from torch import Tensor

from lion_models.base.errors import UserError
from lion_models.data.base import TEST, TRAIN, ArraySource
from lion_models.data.transforms import Geometry

__all__ = ["is_idx_folder", "open_idx", "read_idx", "read_idx_pair"]

_UNSIGNED_BYTE = 0x08


def read_idx(path: Path) -> Tensor:
    """Read one IDX file of unsigned bytes.

    Args:
        path: the file; a name that ends in `.gz` is decompressed.

    Returns:
        A uint8 tensor of the shape that the file declares.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not IDX, not of unsigned bytes, or shorter than its header says.
    """
    if not path.is_file():
        raise FileNotFoundError(
            f"{path}: no such file; images (such as train-images-idx3-ubyte.gz) and labels "
            "(train-labels-idx1-ubyte.gz) go together"
        )
    try:
        raw = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise ValueError(f"{path}: not a whole gzip file ({error}); fetch it again") from error
    if len(raw) < 4 or raw[:2] != b"\0\0" or raw[2] != _UNSIGNED_BYTE:
        raise ValueError(f"{path}: not an IDX file of unsigned bytes (starts with {raw[:4]!r})")
    rank = raw[3]
    header = 4 + 4 * rank
    if len(raw) < header:
        raise ValueError(f"{path}: cut off inside its header; fetch it again")
    shape = struct.unpack(f">{rank}I", raw[4:header])
    if len(raw) != header + math.prod(shape):
        raise ValueError(
            f"{path}: expected {math.prod(shape)} bytes of data for shape {shape}, "
            f"got {len(raw) - header}; fetch it again"
        )
    return torch.frombuffer(bytearray(raw[header:]), dtype=torch.uint8).reshape(shape)


def read_idx_pair(folder: Path, split: str) -> tuple[Tensor, Tensor]:
    """Images (N, 1, H, W) uint8 and labels (N,) int64 of one split.

    Args:
        folder: holds `{split}-images-idx3-ubyte[.gz]` and `{split}-labels-idx1-ubyte[.gz]`.
        split: `train` or `t10k`.
    """
    images, labels = (
        read_idx(_plain_or_gz(folder / f"{split}-{kind}-ubyte"))
        for kind in ("images-idx3", "labels-idx1")
    )
    if images.dim() != 3 or labels.dim() != 1 or len(images) != len(labels):
        raise ValueError(
            f"{folder}: images {tuple(images.shape)} and labels "
            f"{tuple(labels.shape)} of '{split}' do not belong together"
        )
    return images.unsqueeze(1), labels.long()


def _plain_or_gz(path: Path) -> Path:
    return path if path.is_file() else path.with_name(path.name + ".gz")


def is_idx_folder(folder: Path) -> bool:
    """Whether a folder holds images or labels in MNIST's naming, of either part."""
    return any(folder.glob("*-images-idx3-ubyte*")) or any(folder.glob("*-labels-idx1-ubyte*"))


def open_idx(
    name: str, folder: Path, geometry: Geometry, classes: tuple[str, ...] | None = None
) -> ArraySource:
    """Open a folder of IDX files; the `t10k` pair, where there is one, is the test set.

    Args:
        name: what the user wrote.
        folder: see `read_idx_pair`.
        geometry: how pictures are fitted to the backbone.
        classes: names; None names the classes by their numbers.

    Raises:
        UserError: a file is missing or damaged, or there is only one class.
    """
    parts = [("train", TRAIN)]
    if any((folder / f"t10k-{kind}-ubyte{end}").is_file() for kind in _KINDS for end in _ENDS):
        parts.append(("t10k", TEST))
    try:
        pairs = [(*read_idx_pair(folder, split), part) for split, part in parts]
    except (ValueError, FileNotFoundError) as error:
        raise UserError(f"`data`: {error}") from error
    shapes = {tuple(images.shape[1:]) for images, _, _ in pairs}
    if len(shapes) > 1:
        raise UserError(
            f"`data`: {folder}: training and test images differ in size ({shapes}); "
            "expected both pairs of one data set"
        )
    labels = torch.cat([labels for _, labels, _ in pairs])
    if classes is None:
        classes = tuple(str(label) for label in range(int(labels.max()) + 1 if len(labels) else 0))
    if len(classes) < 2:
        raise UserError(f"`data`: {folder} holds {len(classes)} classes; expected at least two")
    official = torch.cat(
        [torch.full((len(labels),), part, dtype=torch.int8) for _, labels, part in pairs]
    )
    images = torch.cat([images for images, _, _ in pairs])
    return ArraySource(name, classes, labels, images, geometry, official=official)


_KINDS = ("images-idx3", "labels-idx1")
_ENDS = ("", ".gz")
