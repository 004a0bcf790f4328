"""Picture files below a folder, and what is left out there."""

from __future__ import annotations

import os
import warnings
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple, NoReturn

from lion_models.data.formats import HEIC_EXTRA, image_suffixes, unread_suffixes
from lion_models.data.images import unreadable

__all__ = ["Found", "LeftOutWarning", "find_images", "is_clutter", "is_image", "list_folder",
           "walk", "warn_of_left_out"]  # fmt: skip

# What macOS's archives, Synology's servers and Windows put beside pictures.
_LEFT_BEHIND = frozenset({"__MACOSX", "@eaDir", "Thumbs.db", "desktop.ini"})
KINDS_SHOWN = 5


class LeftOutWarning(UserWarning):
    """Files of a folder of pictures that are not used, with their counts."""


class Found(NamedTuple):
    """What lies below a folder: its pictures, and other files; both sorted."""

    images: list[Path]
    others: list[Path]


def find_images(folder: Path) -> list[Path]:
    """Every image file below `folder`, by suffix, sorted; see `walk`."""
    return walk(folder).images


def walk(folder: Path) -> Found:
    """Every file below `folder`.

    Hidden files and folders are left out, and so is what other programs leave behind. Links to
    folders are followed, but no folder is listed twice. A link that leads nowhere is listed: its
    file is missing.

    Raises:
        UserError: a folder cannot be read.
    """
    found = Found([], [])
    # A link back to a folder around this one would list it again, under other names.
    seen = {str(parent) for parent in folder.resolve().parents}
    starts = [str(folder)]  # links wait until the folders themselves have been listed
    while starts:
        for here, names, files in os.walk(starts.pop(0), onerror=_refuse_unreadable):
            place = os.path.realpath(here)
            if place in seen:
                names.clear()
                continue
            seen.add(place)
            names[:] = sorted(name for name in names if not is_clutter(name))
            inside = [os.path.join(here, name) for name in names]
            starts += [path for path in inside if os.path.islink(path)]
            for name in files:
                if not is_clutter(name):
                    path = os.path.join(here, name)
                    found[not is_image(path)].append(Path(path))
    return Found(sorted(found.images), sorted(found.others))


def list_folder(folder: Path) -> list[Path]:
    """Files and folders directly in `folder`, without clutter, sorted.

    Raises:
        UserError: it cannot be read.
    """
    try:
        entries = sorted(folder.iterdir())
    except OSError as error:
        _refuse_unreadable(error)
    return [entry for entry in entries if not is_clutter(entry.name)]


def _refuse_unreadable(error: OSError) -> NoReturn:
    raise unreadable(Path(error.filename), error) from error


def is_image(path: str) -> bool:
    """By its name; pipes and the like are none, what is listed and not there may have been one."""
    name, suffix = os.path.basename(path), os.path.splitext(path)[1]
    if suffix.lower() not in image_suffixes() or is_clutter(name):
        return False
    return os.path.isfile(path) or not os.path.exists(path)


def is_clutter(name: str) -> bool:
    """Whether a file or folder is hidden, or left behind by another program."""
    return name.startswith(".") or name in _LEFT_BEHIND


def warn_of_left_out(others: Sequence[Path], where: str) -> None:
    """Warn of files that are no pictures by their names, with a count of each kind."""
    if not others:
        return
    counts = Counter(path.suffix.lower() for path in others)
    examples = {path.suffix.lower(): path.name for path in reversed(others)}
    shown = ", ".join(
        f"{count} {suffix or 'without a suffix'} ({examples[suffix]}{', ...' * (count > 1)})"
        for suffix, count in counts.most_common(KINDS_SHOWN)
    )
    more = f" and {len(counts) - KINDS_SHOWN} other kinds" if len(counts) > KINDS_SHOWN else ""
    heic = sorted(unread_suffixes() & set(counts))
    advice = f"; to read {', '.join(heic)}, run: {HEIC_EXTRA}" if heic else ""
    warnings.warn(
        f"{where}: left out {len(others)} files that are no pictures by their names: "
        f"{shown}{more}{advice}",
        LeftOutWarning,
        stacklevel=3,
    )
