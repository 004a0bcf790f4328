"""A run's data: opened, split and taken as its configuration says, and known again later."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from lion_models.backbones import FrozenBackbone
from lion_models.base.errors import UserError
from lion_models.base.files import write_json
from lion_models.data import (
    FolderSource,
    Source,
    Split,
    Task,
    check_fit,
    make_task,
    open_source,
    split_source,
)
from lion_models.data.sources import user_folder
from lion_models.run.config import RunConfig

__all__ = [
    "DATA_RECORD",
    "check_unchanged",
    "data_place",
    "open_data",
    "record_data",
    "split_data",
    "stored_name",
    "take_task",
    "training_images_in",
]

DATA_RECORD = "data.json"


def open_data(config: RunConfig, backbone: FrozenBackbone) -> Source:
    """Open `config.data` for a backbone; see `open_source`."""
    return open_source(
        config.data,
        backbone.channels,
        backbone.image_size,
        transform=config.transform,
        bad_files=config.bad_files,
        verify=config.verify,
    )


def split_data(source: Source, config: RunConfig) -> Split:
    """The rows of a run; see `split_rows`."""
    return split_source(
        source,
        config.seed,
        config.shots,
        config.validation_shots,
        config.test_cap,
        config.imbalance,
    )


def take_task(source: Source, config: RunConfig, backbone: FrozenBackbone) -> Task:
    """A run's training and validation images.

    Raises:
        UserError: the source's images do not fit the backbone, or a class has too few.
    """
    check_fit(source, backbone.channels, backbone.image_size)
    return make_task(
        source,
        config.seed,
        config.shots,
        config.validation_shots,
        config.test_cap,
        config.imbalance,
    )


def record_data(folder: Path, source: Source, config: RunConfig) -> None:
    """Write down, in a run's folder, which rows it trains on and which it leaves for the test."""
    _, place = user_folder(config.data)
    where = {} if place is None else {"folder": str(place)}
    write_json(folder / DATA_RECORD, _describe(source, config) | where)


def data_place(folder: Path, config: RunConfig, moved: str | None = None) -> str:
    """What `open_source` takes for a run's data, in whatever folder this process works.

    Args:
        folder: the run's.
        config: the run's.
        moved: what the user says; None means the folder that the run was trained on or, where that
            is gone, what the user wrote then.

    Raises:
        UserError: neither is there.
    """
    if moved is not None:
        return moved
    recorded, (prefix, written) = _recorded_folder(folder), user_folder(config.data)
    if recorded is not None and recorded != written and recorded.exists():
        return prefix + str(recorded)
    if written is not None and not written.exists():
        where = f"relative to {Path.cwd()}" if recorded is None else f"it was {recorded}"
        raise UserError(
            f"`data`: the run's data folder '{config.data}' ({where}) is not there; name its new "
            "place with `moved_data`"
        )
    return config.data


def stored_name(folder: Path, stored: RunConfig, data: str, moved: str | None) -> str:
    """`data` as a run's configuration has it, where it is another path of the same folder.

    Args:
        folder: the run's.
        stored: its configuration.
        data: what the user writes to resume it.
        moved: where the user says that it lies now.

    Raises:
        UserError: `data` is a folder, and not the one that the run was started on.
    """
    recorded, (prefix, written) = _recorded_folder(folder), user_folder(data)
    if recorded is None or (data == stored.data and (moved is not None or not recorded.exists())):
        return data
    if written == recorded and prefix == user_folder(stored.data)[0]:
        return stored.data
    raise UserError(
        f"`resume`: {folder} was started on the data in {recorded}, and '{data}' is "
        f"{written or 'another'}; repeat the former, and if that has moved here, add `moved_data`"
    )


def training_images_in(data: str, folder: Path, config: RunConfig, backbone: FrozenBackbone) -> int:
    """How many of a run's training images are in `data`, as far as names and paths tell."""
    own = data_place(folder, config)
    (prefix, place), (other_prefix, other) = user_folder(own), user_folder(data)
    same = own == data if place is None else (prefix, place) == (other_prefix, other)
    nested = place is not None and other is not None and (place in other.parents
                                                          or other in place.parents)  # fmt: skip
    if not same and not nested:
        return 0
    source = open_data(replace(config, data=own), backbone)
    rows = split_data(source, config).train
    if same:
        return len(rows)
    files = source.paths if isinstance(source, FolderSource) else ()
    folders = [files[row].parent.resolve() for row in rows] if files else []
    return sum(other in (inside, *inside.parents) for inside in folders)


def _recorded_folder(folder: Path) -> Path | None:
    """The folder that a run's data lay in; None where it has none, or a version wrote none down."""
    path = folder / DATA_RECORD
    where = json.loads(path.read_text()).get("folder") if path.is_file() else None
    return None if where is None else Path(where)


def check_unchanged(folder: Path, source: Source, config: RunConfig) -> None:
    """Raise UserError where a run's data is not what it was when the run was trained.

    A class is shuffled whole, so one file more or less draws other test images from it, and some
    of those would have been trained on. Runs of versions that recorded nothing are let through.
    """
    path = folder / DATA_RECORD
    if not path.is_file():
        return
    then, now = json.loads(path.read_text()), _describe(source, config)
    if then["sha256"] == now["sha256"]:
        return
    before, after = then["images"], now["images"]
    differing = [name for name in before | after if before.get(name, 0) != after.get(name, 0)]
    what = "each class has as many images as then, but they are others or in other parts"
    if differing:
        name = differing[0]
        others = f" (and {len(differing) - 1} other classes differ)" if len(differing) > 1 else ""
        what = f"class '{name}' had {before.get(name, 0)} images and has {after.get(name, 0)}"
        what += others
    raise UserError(
        f"`data`: {source.name} has changed since {folder} was trained on it: {what}. Its test "
        "images would be drawn anew, from images that it was trained on, too; put the files back "
        "as they were, or train again with `overwrite` or another `name`"
    )


def _describe(source: Source, config: RunConfig) -> dict[str, Any]:
    """Images of each class, and a digest of labels, official parts, names and the split's rows."""
    split = split_data(source, config)
    digest = hashlib.sha256(json.dumps([source.classes, *source.row_names()]).encode())
    for rows in (source.labels, source.official, split.train, split.validation, split.test):
        values = torch.tensor([-1]) if rows is None else rows.to(torch.int64)
        digest.update(f"{len(values)}:".encode() + values.numpy().tobytes())
    counts = torch.bincount(source.labels, minlength=len(source.classes)).tolist()
    return {
        "sha256": digest.hexdigest(),
        "images": dict(zip(source.classes, counts, strict=True)),
    }
