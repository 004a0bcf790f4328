"""Data sets of torchvision and of Hugging Face; both packages are optional.

A set's own test and validation parts keep their roles. Images are decoded when they are asked for.
"""

from __future__ import annotations

import inspect
import io
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from lion_models.base.errors import UserError, did_you_mean
from lion_models.base.folders import data_root
from lion_models.base.optional import require
from lion_models.data.base import TEST, TRAIN, DecodingSource
from lion_models.data.folder import SPLITS
from lion_models.data.formats import open_picture
from lion_models.data.images import to_tensor, upright
from lion_models.data.transforms import Geometry

__all__ = [
    "PictureSource",
    "is_saved_dataset",
    "open_hugging_face",
    "open_saved_dataset",
    "open_torchvision",
    "torchvision_folder",
]


@dataclass(eq=False)
class PictureSource(DecodingSource):
    """Pictures that another library hands out by number.

    Attributes:
        parts: data sets of that library, one behind the other.
        key: where the picture is in one of their rows.
    """

    parts: tuple[Any, ...]
    key: int | str

    def decode(self, row: int, training: bool) -> Tensor:
        return to_tensor(self._picture(row), self.geometry, training)

    def _picture(self, row: int) -> Image.Image:
        part = 0
        while row >= len(self.parts[part]):
            row -= len(self.parts[part])
            part += 1
        try:
            return _as_picture(self.parts[part][row][self.key])
        except Exception as error:  # a decoder may raise anything for damaged bytes
            raise UserError(
                f"`data` {self.name}: image {row} of part {part + 1} cannot be decoded ({error}); "
                "remove the row from the data set or fetch it again"
            ) from error


def _as_picture(value: Any) -> Image.Image:
    if isinstance(value, Image.Image):
        value.load()
        return value
    if isinstance(value, Mapping):
        content = value.get("bytes")
        return upright(open_picture(io.BytesIO(content) if content else Path(value["path"])))
    if isinstance(value, Tensor):
        value = value.movedim(0, -1).squeeze(-1).numpy()
    return Image.fromarray(np.asarray(value, dtype=np.uint8))


def torchvision_folder(name: str, root: Path | None = None) -> Path:
    """Where torchvision's files of a data set lie; `root` None is `data_root()`."""
    return (data_root() if root is None else root) / "torchvision" / name


def open_torchvision(
    name: str, geometry: Geometry, download: bool = False, root: Path | None = None
) -> PictureSource:
    """Open a classification data set of torchvision.

    Args:
        name: the class in `torchvision.datasets`, such as `CIFAR10`.
        geometry: how pictures are fitted to the backbone.
        download: let torchvision fetch what is missing.
        root: where data sets are kept; None means `data_root()`.

    Raises:
        UserError: torchvision is missing, has no such data set, its files are not here, or its
            labels are not classes.
    """
    option = f"torchvision:{name}"
    library = require("torchvision.datasets", f"`data` {option}", "torchvision")
    kind: Any = getattr(library, name, None)
    if not inspect.isclass(kind):
        hint = did_you_mean(name, dir(library), "torchvision:")
        raise UserError(f"`data` {option}: torchvision.datasets has no '{name}'{hint}")
    build: Callable[..., Any] = kind
    known = inspect.signature(kind).parameters
    shared = {"download": download} if "download" in known else {}
    wanted: list[tuple[dict[str, Any], int]]
    if "train" in known:
        wanted = [({"train": True}, TRAIN), ({"train": False}, TEST)]
    elif "split" in known:
        wanted = [({"split": split}, SPLITS[split]) for split in ("train", "val", "test")]
    else:
        wanted = [({}, TRAIN)]
    folder = torchvision_folder(name, root)
    advice = "check the network" if download else f"run: lion data prepare {option}"
    parts = []
    for arguments, part in wanted:
        try:
            parts.append((build(str(folder), **arguments, **shared), part))
        except ValueError:
            # torchvision's answer to a split that the set does not have
            if part == TRAIN:
                raise UserError(
                    f"`data` {option}: torchvision knows no part 'train' of it; "
                    "save the images as a folder with one sub-folder per class instead"
                ) from None
        except (RuntimeError, OSError, TypeError) as error:
            raise UserError(
                f"`data` {option}: cannot be opened in {folder} ({error}); {advice}"
            ) from error
    first = parts[0][0]
    names = getattr(first, "classes", None) or getattr(first, "categories", None)
    labels = [_torchvision_labels(dataset, option) for dataset, _ in parts]
    joined = [(dataset, each, part) for (dataset, part), each in zip(parts, labels, strict=True)]
    return _joined(option, names, joined, 0, geometry)


def _torchvision_labels(dataset: Any, option: str) -> list[int]:
    for attribute in ("targets", "labels", "_labels", "y"):
        if hasattr(dataset, attribute):
            values = getattr(dataset, attribute)
            break
    else:
        values = [dataset[row][1] for row in range(len(dataset))]
    try:
        return [int(value) for value in values]
    except (TypeError, ValueError) as error:
        raise UserError(
            f"`data` {option}: its labels are not one class to an image ({error}); expected a "
            "classification data set"
        ) from error


def is_saved_dataset(folder: Path) -> bool:
    """Whether `save_to_disk` of Hugging Face datasets wrote a folder."""
    return any((folder / name).is_file() for name in ("dataset_dict.json", "dataset_info.json"))


def open_saved_dataset(folder: Path, geometry: Geometry) -> PictureSource:
    """Open a folder that `save_to_disk` wrote; see `open_hugging_face`."""
    option = str(folder)
    library = require("datasets", f"`data` {option}", "datasets")
    try:
        return _open_splits(option, library.load_from_disk(option), geometry)
    except (OSError, RuntimeError, KeyError) as error:
        raise UserError(
            f"`data`: {folder} cannot be read as a saved data set ({error}); save or copy it again"
        ) from error


def open_hugging_face(name: str, geometry: Geometry) -> PictureSource:
    """Open a data set of the Hugging Face hub, or of its local cache.

    Args:
        name: as `datasets.load_dataset` takes it, with `:CONFIGURATION` where there is one.
        geometry: how pictures are fitted to the backbone.

    Raises:
        UserError: the package is missing, the data set cannot be loaded, or it has no column of
            images, or none or several of labels.
    """
    option = f"hf:{name}"
    library = require("datasets", f"`data` {option}", "datasets")
    base, _, configuration = name.partition(":")
    try:
        loaded = library.load_dataset(base, configuration or None)
    except (OSError, ValueError, RuntimeError) as error:
        raise UserError(
            f"`data` {option}: cannot be loaded ({type(error).__name__}: {error}); check the name "
            "and the network, or give a folder that save_to_disk wrote"
        ) from error
    return _open_splits(option, loaded, geometry)


def _open_splits(option: str, loaded: Any, geometry: Geometry) -> PictureSource:
    splits: dict[str, Any] = dict(loaded) if isinstance(loaded, Mapping) else {"train": loaded}
    if len(splits) == 1:
        splits = {"train": next(iter(splits.values()))}
    elif "train" not in splits:
        raise UserError(
            f"`data` {option}: has the splits {', '.join(splits)}; expected one called 'train'"
        )
    image, label, names = _columns(option, splits["train"].features)
    parts = []
    for split, dataset in splits.items():
        if split not in SPLITS:
            continue
        values = [-1 if value is None else int(value) for value in dataset[label]]
        unlabelled = sum(value < 0 for value in values)
        if unlabelled and unlabelled == len(values) and split == "test":
            warnings.warn(
                f"`data` {option}: its split 'test' has no labels and is left out; the test set is "
                "drawn from the rest",
                stacklevel=4,
            )
            continue
        if unlabelled:
            raise UserError(
                f"`data` {option}: {unlabelled} of {len(values)} rows of split '{split}' have no "
                f"label in column '{label}'; label or remove them"
            )
        parts.append((dataset, values, SPLITS[split]))
    return _joined(option, names, parts, image, geometry)


def _columns(option: str, features: Mapping[str, Any]) -> tuple[str, str, Sequence[str] | None]:
    """The columns of images and of labels, and the names of the classes."""
    kinds = {column: type(feature).__name__ for column, feature in features.items()}
    images = [column for column, kind in kinds.items() if kind == "Image"]
    labels = [column for column, kind in kinds.items() if kind == "ClassLabel"]
    if len(labels) != 1:
        labels = [column for column in kinds if column in ("label", "labels")][:1]
    if len(images) != 1 or not labels:
        shown = ", ".join(f"{column} ({kind})" for column, kind in kinds.items())
        raise UserError(
            f"`data` {option}: expected one column of images and one of class labels, or one "
            f"called 'label'; it has {shown}; rename or remove columns and save it to disk"
        )
    return images[0], labels[0], getattr(features[labels[0]], "names", None)


def _joined(
    option: str,
    names: Sequence[str] | None,
    parts: Sequence[tuple[Any, list[int], int]],
    key: int | str,
    geometry: Geometry,
) -> PictureSource:
    """One source of several parts, each with its data set, its labels and its role."""
    labels = torch.tensor([label for _, each, _ in parts for label in each], dtype=torch.int64)
    official = torch.tensor([part for _, each, part in parts for _ in each], dtype=torch.int8)
    count = int(labels.max()) + 1 if len(labels) else 0
    classes = tuple(names) if names else tuple(str(label) for label in range(count))
    if len(classes) < 2 or count > len(classes) or bool((labels < 0).any()):
        raise UserError(
            f"`data` {option}: labels run to {count - 1} for {len(classes)} class names; expected "
            "at least two classes and every label from 0 to one less than their number"
        )
    return PictureSource(
        option,
        classes,
        labels,
        geometry,
        tuple(dataset for dataset, _, _ in parts),
        key,
        official=official if len(parts) > 1 else None,
    )
