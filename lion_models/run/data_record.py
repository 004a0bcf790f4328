"""What a run writes down of its data, so that the data is found and known again later."""

from __future__ import annotations

import hashlib
import json
import warnings
from pathlib import Path
from typing import Any, Literal

import torch

from lion_models.base.errors import UserError
from lion_models.base.files import write_json
from lion_models.data import Source, Split
from lion_models.data.levels import Levels
from lion_models.data.sources import user_folder
from lion_models.data.transforms import Geometry
from lion_models.run.checkpoint import CHECKPOINT
from lion_models.run.log import STATE

__all__ = ["DATA_RECORD", "check_unchanged", "data_place", "levels_of", "record_data",
           "recorded_levels", "stored_name"]  # fmt: skip

DATA_RECORD = "data.json"
_WHOLE = 16  # digits of the digest of all images


def record_data(folder: Path, data: str, source: Source, split: Split) -> None:
    """Write down, in a run's folder, which rows it trains on and which it leaves for the test.

    Args:
        folder: the run's.
        data: what `open_source` was given.
        source: what it gave.
        split: of the source.
    """
    _, place = user_folder(data)
    where = {} if place is None else {"folder": str(place)}
    seen: dict[str, Any] = {"contents": contents} if (contents := _contents(source)) else {}
    levels = levels_of(source)
    seen |= {} if levels is None else {"levels": levels.to_dict()}
    write_json(folder / DATA_RECORD, _describe(source, split) | seen | where)


def levels_of(source: Source) -> Levels | None:
    """The rule by which a source reads pictures of more than 8 bits; None where it has none."""
    geometry: Geometry | None = getattr(source, "geometry", None)
    return None if geometry is None else geometry.levels


def recorded_levels(folder: Path) -> Levels | Literal["auto"] | None:
    """How `open_source` is to read a run's pictures of more than 8 bits.

    Args:
        folder: the run's. What it was trained with holds; a run that has begun and wrote down none
            is of a version that decided by each picture.
    """
    record = _recorded(folder)
    if not record:
        begun = any((folder / name).exists() for name in (CHECKPOINT, STATE))
        return None if begun else "auto"
    levels = record.get("levels")
    return None if levels is None else Levels.from_dict(levels)


def check_unchanged(
    folder: Path, source: Source, split: Split, accept_contents: bool = False
) -> bool:
    """Raise UserError where a run's data is not what it was when the run was trained.

    Args:
        folder: the run's.
        source, split: its data now.
        accept_contents: files of the same names may have other contents.

    Returns:
        Whether they have, and that was accepted.

    A class is shuffled whole, so one file more or less draws other test images from it, and some
    of those would have been trained on. Runs of versions that recorded nothing are let through.
    """
    then, now = _recorded(folder), _describe(source, split)
    if not then:
        return False
    if then["sha256"] == now["sha256"]:
        return _have_changed(folder, source, then.get("contents", ""), accept_contents)
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


def _have_changed(folder: Path, source: Source, then: str, accept_contents: bool) -> bool:
    """Whether images have other contents under the same names, which has to be accepted."""
    now = _contents(source) if then else ""
    if now == then:
        return False
    marks = zip(source.classes, _by_class(then), _by_class(now), strict=True)
    changed = [name for name, before, after in marks if before != after]
    of = f" of class '{changed[0]}'" if changed else ""
    of += f" (and of {len(changed) - 1} other classes)" if len(changed) > 1 else ""
    what = (
        f"`data`: images{of} of {source.name} have other contents than when {folder} was trained "
        "on it, under the same names"
    )
    if not accept_contents:
        raise UserError(
            f"{what}; put the files back as they were, train again with `overwrite` or another "
            "`name`, or go on with what is there now: `changed_data`"
        )
    warnings.warn(f"{what}; what is there now is used", stacklevel=3)
    return True


def _contents(source: Source) -> str:
    """A digest of all images, then two digits of each class, which tell where they changed.

    Empty where the source does not know its contents.
    """
    digests = source.digests()
    if not digests:
        return ""
    joined = [hashlib.sha256() for _ in source.classes]
    for label, digest in zip(source.labels.tolist(), digests, strict=True):
        joined[label].update(digest.encode())
    whole = hashlib.sha256(b"".join(each.digest() for each in joined)).hexdigest()
    return whole[:_WHOLE] + "".join(each.hexdigest()[:2] for each in joined)


def _by_class(contents: str) -> list[str]:
    return [contents[at : at + 2] for at in range(_WHOLE, len(contents), 2)]


def data_place(folder: Path, data: str, moved: str | None = None) -> str:
    """What `open_source` takes for a run's data, in whatever folder this process works.

    Args:
        folder: the run's.
        data: as its configuration has it.
        moved: what the user says; None means the folder that the run was trained on or, where that
            is gone, what the user wrote then.

    Raises:
        UserError: neither is there.
    """
    if moved is not None:
        return moved
    recorded, (prefix, written) = _recorded_folder(folder), user_folder(data)
    if recorded is not None and recorded != written and recorded.exists():
        return prefix + str(recorded)
    if written is not None and not written.exists():
        where = f"relative to {Path.cwd()}" if recorded is None else f"it was {recorded}"
        raise UserError(
            f"`data`: the run's data folder '{data}' ({where}) is not there; name its new "
            "place with `moved_data`"
        )
    return data


def stored_name(folder: Path, stored: str, data: str, moved: str | None) -> str:
    """`data` as a run's configuration has it, where it is another path of the same folder.

    Args:
        folder: the run's.
        stored: the data as its configuration has it.
        data: what the user writes to resume it.
        moved: where the user says that it lies now.

    Raises:
        UserError: `data` is a folder, and not the one that the run was started on.
    """
    recorded, (prefix, written) = _recorded_folder(folder), user_folder(data)
    if recorded is None or (data == stored and (moved is not None or not recorded.exists())):
        return data
    if written == recorded and prefix == user_folder(stored)[0]:
        return stored
    raise UserError(
        f"`resume`: {folder} was started on the data in {recorded}, and '{data}' is "
        f"{written or 'another'}; repeat the former, and if that has moved here, add `moved_data`"
    )


def _recorded(folder: Path) -> dict[str, Any]:
    """Content of data.json; empty where a version wrote none."""
    path = folder / DATA_RECORD
    return json.loads(path.read_text()) if path.is_file() else {}


def _recorded_folder(folder: Path) -> Path | None:
    """The folder that a run's data lay in; None where it has none, or a version wrote none down."""
    where = _recorded(folder).get("folder")
    return None if where is None else Path(where)


def _describe(source: Source, split: Split) -> dict[str, Any]:
    """Images of each class, and a digest of labels, official parts, names and the split's rows."""
    digest = hashlib.sha256(json.dumps([source.classes, *source.row_names()]).encode())
    for rows in (source.labels, source.official, split.train, split.validation, split.test):
        values = torch.tensor([-1]) if rows is None else rows.to(torch.int64)
        digest.update(f"{len(values)}:".encode() + values.numpy().tobytes())
    counts = torch.bincount(source.labels, minlength=len(source.classes)).tolist()
    return {
        "sha256": digest.hexdigest(),
        "images": dict(zip(source.classes, counts, strict=True)),
    }
