"""A run's data: opened, split and taken as its configuration says, and known again later."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import torch

from lion_models.backbones import FrozenBackbone
from lion_models.data import Source, Split, Task, check_fit, make_task, open_source, split_source
from lion_models.errors import UserError
from lion_models.files import write_json
from lion_models.training.config import RunConfig

__all__ = [
    "DATA_RECORD",
    "check_unchanged",
    "open_data",
    "record_data",
    "split_data",
    "take_task",
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
    write_json(folder / DATA_RECORD, _describe(source, config))


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
        f"--data: {source.name} has changed since {folder} was trained on it: {what}. Its test "
        "images would be drawn anew, from images that it was trained on, too; put the files back "
        "as they were, or train again with --overwrite or another --name"
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
