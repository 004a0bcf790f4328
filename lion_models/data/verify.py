"""Find damaged image files before any work starts, and remember which files were whole."""

from __future__ import annotations

import hashlib
import json
import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import PIL
from tqdm.contrib.concurrent import thread_map

from lion_models.base.errors import UserError, choose
from lion_models.base.files import write_cache
from lion_models.base.folders import cache_root
from lion_models.data.images import UnreadableError, check_header, check_whole, unreadable
from lion_models.data.levels import Extent, Levels

__all__ = [
    "BAD_FILES",
    "VERIFY",
    "BadFilesWarning",
    "Checked",
    "ConstantWarning",
    "CopiesWarning",
    "FileChecks",
    "check_files",
    "judge_damaged",
    "warn_of_constant",
]

BAD_FILES = ("fail", "skip")
VERIFY = ("full", "header")
SHOWN = 20
COPIES_SHOWN = 5

CONSTANT_LEVELS = 4  # of 255: what spans less shows nothing
EDGE = 4096  # bytes at both ends of a file, which tell it from others where it is not read whole

Stamp = tuple[int, int]  # size in bytes, modification time in ns


class Whole(NamedTuple):
    """A file that decoded: its stamp, a digest of its bytes, and the extent of its values."""

    stamp: Stamp
    digest: str
    extent: Extent


class Checked(NamedTuple):
    """What is known of files, by path.

    Attributes:
        damaged: why a file cannot be used; the others can.
        digests: of each usable file's bytes, or with `header` of its size and both its ends.
        extents: of the usable files; with `header` of those alone that have more than 8 bits.
    """

    damaged: dict[Path, str]
    digests: dict[Path, str]
    extents: dict[Path, Extent]


@dataclass(frozen=True)
class FileChecks:
    """How files of a data set are looked through; see `open_source`.

    Attributes:
        bad_files, verify: what is done about damaged files.
        find_levels: one rule for all files of more than 8 bits; else the geometry has it.
        classes: names of which the data may hold any, as one may be enough.
    """

    bad_files: str = "fail"
    verify: str = "full"
    find_levels: bool = True
    classes: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        choose("bad_files", self.bad_files, BAD_FILES)
        choose("verify", self.verify, VERIFY)


class BadFilesWarning(UserWarning):
    """Files that were left out because `bad_files="skip"` was asked for; lists every one."""


class ConstantWarning(UserWarning):
    """Pictures of which all values are nearly the same."""


class CopiesWarning(UserWarning):
    """Files of a data set that hold the same bytes as others of it."""


def check_files(paths: Sequence[Path], root: Path, verify: str = "full") -> Checked:
    """Which files cannot be used, and what the others are.

    Args:
        paths: files below `root`.
        root: names what is remembered in the user's cache.
        verify: `full` decodes every file, and warns of files that hold the same bytes; a whole one
            is remembered by its path, size and modification time, and not decoded again. `header`
            reads beginnings only, so that data which is cut off or damaged inside is found when
            the image is used.

    Raises:
        UnreadableError: a file may not or cannot be read, whatever is done about damaged ones.
    """
    if verify == "header":
        return _check_headers(paths)
    store = _store_of(root)
    known = _read_store(store)
    names = {path: os.path.abspath(path) for path in paths}
    stamps = {path: _stamp(path) for path in paths}
    whole = {
        path: known[name]
        for path, name in names.items()
        if name in known and known[name].stamp == stamps[path]
    }
    fresh = [path for path in paths if path not in whole]

    def check(path: Path) -> None:
        whole[path] = Whole(stamps[path], extent=check_whole(path), digest=_digest(path))

    judged = _each(fresh, check, "checking image files")
    if fresh:
        kept = {
            names[path]: (*each.stamp, each.digest, *each.extent) for path, each in whole.items()
        }
        content = json.dumps({"pillow": PIL.__version__, "files": kept})
        write_cache(store, content.encode(), "the files are decoded again next time")
    usable = [path for path in paths if path in whole]
    digests = {path: whole[path].digest for path in usable}
    _warn_of_copies(digests, root)
    damaged = {path: text for path, text in judged.items() if text is not None}
    return Checked(damaged, digests, {path: whole[path].extent for path in usable})


def _check_headers(paths: Sequence[Path]) -> Checked:
    digests: dict[Path, str] = {}
    extents: dict[Path, Extent] = {}

    def check(path: Path) -> None:
        extent = check_header(path)
        if extent is not None:
            extents[path] = extent
        digests[path] = _digest_of_ends(path)

    found = _each(paths, check, "reading image headers")
    return Checked({path: why for path, why in found.items() if why}, digests, extents)


def warn_of_constant(extents: Mapping[Path, Extent], levels: Levels | None, root: Path) -> None:
    """Warn of pictures that show nothing, as all their values are nearly the same."""
    ranges = {"bytes": (0.0, 255.0)} | ({} if levels is None else levels._asdict())
    flat = [
        path
        for path, extent in extents.items()
        for low, high in [ranges.get(extent.kind) or (0.0, 255.0)]
        if not (extent.high - extent.low) * 255 >= CONSTANT_LEVELS * (high - low)
    ]
    if not flat:
        return
    shown = ", ".join(os.path.relpath(path, root) for path in flat[:COPIES_SHOWN])
    more = f" and {len(flat) - COPIES_SHOWN} more" if len(flat) > COPIES_SHOWN else ""
    wide = any(extents[path].kind != "bytes" for path in flat)
    advice = "; `value_range` says which values are black and white" if wide else ""
    warnings.warn(
        f"`data`: {len(flat)} of {len(extents)} pictures of {root} are nearly constant, and "
        f"show nothing: {shown}{more}{advice}",
        ConstantWarning,
        stacklevel=4,
    )


def _warn_of_copies(digests: Mapping[Path, str], root: Path) -> None:
    alike: dict[str, list[Path]] = {}
    for path, digest in digests.items():
        alike.setdefault(digest, []).append(path)
    groups = [group for group in alike.values() if len(group) > 1]
    if not groups:
        return
    shown = ", ".join(
        " = ".join(os.path.relpath(path, root) for path in group[:COPIES_SHOWN])
        for group in groups[:COPIES_SHOWN]
    )
    longest = max(len(groups), *(len(group) for group in groups))
    more = " and more" if longest > COPIES_SHOWN else ""
    count = sum(len(group) - 1 for group in groups)
    warnings.warn(
        f"`data`: {count} files of {root} are copies of others: {shown}{more}; what is "
        "both trained and tested on, or has two classes, makes accuracies wrong; keep one of each",
        CopiesWarning,
        stacklevel=4,
    )


def judge_damaged(problems: Sequence[str], bad_files: str, where: str) -> None:
    """Fail on damaged files, or warn of every one that is left out.

    Args:
        problems: one message per file.
        bad_files: `fail` or `skip`.
        where: the data they belong to, for the message.

    Raises:
        UserError: there are some, and `bad_files` is `fail`.
    """
    if not problems:
        return
    if bad_files == "skip":
        lines = "".join(f"\n  {problem}" for problem in problems)
        text = f"`data`: left out {len(problems)} unusable files of {where}:{lines}"
        warnings.warn(text, BadFilesWarning, stacklevel=3)
        return
    if len(problems) == 1:
        raise UserError(f"{problems[0]}; `bad_files` skip trains without it")
    lines = "".join(f"\n  {problem}" for problem in problems[:SHOWN])
    more = f"\n  and {len(problems) - SHOWN} more" if len(problems) > SHOWN else ""
    raise UserError(
        f"`data`: {len(problems)} unusable files in {where}; `bad_files` skip trains without "
        f"them:{lines}{more}"
    )


def _each(
    paths: Sequence[Path], check: Callable[[Path], None], what: str
) -> dict[Path, str | None]:
    def problem(path: Path) -> str | None:
        try:
            check(path)
        except UnreadableError:
            raise
        except UserError as error:
            return str(error)
        return None

    # Pillow decodes outside of Python's lock. The bar shows up only where there is much to do.
    bar = {"desc": what, "unit": "file", "delay": 1.0, "leave": False}
    found = thread_map(problem, paths, max_workers=min(8, os.cpu_count() or 1), **bar)
    return dict(zip(paths, found, strict=True))


def _digest(path: Path) -> str:
    digest = hashlib.blake2b(digest_size=16)
    try:
        with path.open("rb") as file:
            while block := file.read(2**20):
                digest.update(block)
    except OSError as error:
        raise unreadable(path, error) from error
    return digest.hexdigest()


def _digest_of_ends(path: Path) -> str:
    """A digest of a file's size and of its first and last bytes."""
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            start = file.read(EDGE)
            file.seek(max(len(start), size - EDGE))
            content = b"%d:" % size + start + file.read(EDGE)
    except OSError as error:
        raise unreadable(path, error) from error
    return hashlib.blake2b(content, digest_size=16).hexdigest()


def _stamp(path: Path) -> Stamp:
    try:
        status = path.stat()
    except OSError:
        return -1, -1
    return status.st_size, status.st_mtime_ns


def _store_of(root: Path) -> Path:
    digest = hashlib.sha256(os.fsencode(root.resolve())).hexdigest()[:24]
    return cache_root() / "verified" / f"{digest}.json"


def _read_store(store: Path) -> dict[str, Whole]:
    """The whole files that are remembered; none if the store is missing, damaged or outdated."""
    try:
        stored = json.loads(store.read_text())
        if stored["pillow"] != PIL.__version__:
            return {}
        return {
            str(name): Whole((int(size), int(time)), str(digest), Extent(kind, low, high))
            for name, (size, time, digest, kind, low, high) in stored["files"].items()
        }
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}
