"""Find damaged image files before any work starts, and remember which files were whole."""

from __future__ import annotations

import hashlib
import json
import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import PIL
from tqdm.contrib.concurrent import thread_map

from lion_models.base.errors import UserError, choose
from lion_models.base.files import write_cache
from lion_models.base.folders import cache_root
from lion_models.data.images import UnreadableError, check_header, check_whole, unreadable

__all__ = [
    "BAD_FILES",
    "VERIFY",
    "BadFilesWarning",
    "CopiesWarning",
    "FileChecks",
    "find_damaged",
    "judge_damaged",
]

BAD_FILES = ("fail", "skip")
VERIFY = ("full", "header")
SHOWN = 20
COPIES_SHOWN = 5

Stamp = tuple[int, int]  # size in bytes, modification time in ns
Whole = tuple[Stamp, str]  # and a digest of the bytes that decoded


@dataclass(frozen=True)
class FileChecks:
    """What is done about damaged files; see `open_source`."""

    bad_files: str = "fail"
    verify: str = "full"

    def __post_init__(self) -> None:
        choose("bad_files", self.bad_files, BAD_FILES)
        choose("verify", self.verify, VERIFY)


class BadFilesWarning(UserWarning):
    """Files that were left out because `bad_files="skip"` was asked for; lists every one."""


class CopiesWarning(UserWarning):
    """Files of a data set that hold the same bytes as others of it."""


def find_damaged(paths: Sequence[Path], root: Path, verify: str = "full") -> dict[Path, str]:
    """Which files cannot be used, and why.

    Args:
        paths: files below `root`.
        root: names what is remembered in the user's cache.
        verify: `full` decodes every file, and warns of files that hold the same bytes; a whole one
            is remembered by its path, size and modification time, and not decoded again. `header`
            reads beginnings only, so that data which is cut off or damaged inside is found when
            the image is used.

    Returns:
        A message for each file that is missing or damaged.

    Raises:
        UnreadableError: a file may not or cannot be read, whatever is done about damaged ones.
    """
    if verify == "header":
        found = _each(paths, check_header, "reading image headers")
        return {path: text for path, text in found.items() if text is not None}
    store = _store_of(root)
    known = _read_store(store)
    names = {path: os.path.abspath(path) for path in paths}
    stamps = {path: _stamp(path) for path in paths}
    whole = {
        path: known[name]
        for path, name in names.items()
        if name in known and known[name][0] == stamps[path]
    }
    fresh = [path for path in paths if path not in whole]

    def check(path: Path) -> None:
        check_whole(path)
        whole[path] = (stamps[path], _digest(path))

    judged = _each(fresh, check, "checking image files")
    if fresh:
        kept = {names[path]: (*stamp, digest) for path, (stamp, digest) in whole.items()}
        content = json.dumps({"pillow": PIL.__version__, "files": kept})
        write_cache(store, content.encode(), "the files are decoded again next time")
    _warn_of_copies({path: whole[path][1] for path in paths if path in whole}, root)
    return {path: text for path, text in judged.items() if text is not None}


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
            str(name): ((int(size), int(time)), str(digest))
            for name, (size, time, digest) in stored["files"].items()
        }
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}
