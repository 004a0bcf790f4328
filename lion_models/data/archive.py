"""A zip file as a folder: unpacked once, into the user's cache."""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
import zipfile
import zlib
from pathlib import Path

from lion_models.base.errors import UserError
from lion_models.base.files import make_folder
from lion_models.base.folders import cache_root
from lion_models.data.files import is_clutter, list_folder

__all__ = ["unpacked"]

# Pictures are packed already: what shrinks so much is made to fill a disk.
BOMB_BYTES, BOMB_TIMES = 2**27, 100
_ADVICE = {
    errno.ENOSPC: "make room",
    errno.EDQUOT: "make room",
    errno.ENAMETOOLONG: "shorten the names in it, or unpack it yourself and name the folder",
}


def unpacked(archive: Path) -> Path:
    """The folder that holds what a zip file holds.

    It is kept by the file's path, size and time. Of an archive that holds one folder alone, it is
    that folder.

    Raises:
        UserError: it is damaged, needs a password, or is larger unpacked than what the disk has.
    """
    status = archive.stat()
    key = f"{archive.resolve()} {status.st_size} {status.st_mtime_ns}"
    digest = hashlib.sha256(os.fsencode(key)).hexdigest()[:24]
    folder = cache_root() / "unpacked" / digest
    if not folder.is_dir():
        make_folder(folder.parent)
        partial = folder.with_name(f"{digest}.{os.getpid()}.part")
        try:
            _unpack(archive, partial)
            if not folder.is_dir():  # another process may have been faster
                partial.rename(folder)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    inside = list_folder(folder)
    while len(inside) == 1 and inside[0].is_dir():
        folder, inside = inside[0], list_folder(inside[0])
    return folder


def _set_names_right(archive: Path, members: list[zipfile.ZipInfo]) -> None:
    """Take `\\` for `/` where an archive has that alone, as some programs of Windows write.

    Raises:
        UserError: a name leads out of the folder, which no honest archive's does.
    """
    if not any("/" in each.filename for each in members):
        for each in members:
            each.filename = each.filename.replace("\\", "/")
    for each in members:
        if each.filename.startswith("/") or ".." in each.filename.split("/"):
            raise UserError(
                f"`data`: {archive} is not unpacked: '{each.filename}' in it leads out of the "
                "folder; unpack it yourself and name the folder"
            )


def _unpack(archive: Path, folder: Path) -> None:
    try:
        with zipfile.ZipFile(archive) as file:
            everything = file.infolist()
            _set_names_right(archive, everything)
            members = [
                each for each in everything
                if not any(is_clutter(part) for part in Path(each.filename).parts)
            ]  # fmt: skip
            size = sum(each.file_size for each in members)
            packed = archive.stat().st_size
            if size > BOMB_BYTES and size > BOMB_TIMES * packed:
                raise UserError(
                    f"`data`: {archive} holds {size / 2**30:.1f} GiB in {packed / 2**20:.1f} MiB, "
                    "as no pictures do; unpack it yourself and name the folder"
                )
            free = shutil.disk_usage(folder.parent).free
            if size > free:
                raise UserError(
                    f"`data`: {archive} holds {size / 2**30:.1f} GiB, and {folder.parent} has "
                    f"{free / 2**30:.1f}; make room, or unpack it elsewhere and name the folder"
                )
            folder.mkdir()
            file.extractall(folder, members)
    except UserError:
        raise
    except RuntimeError as error:  # what zipfile raises for a missing password
        raise UserError(
            f"`data`: {archive} cannot be unpacked ({error}); unpack it and name the folder"
        ) from error
    except (zipfile.BadZipFile, zlib.error, EOFError, ValueError, OSError) as error:
        code = error.errno if isinstance(error, OSError) else None
        advice = _ADVICE.get(code or 0, "copy it again")
        raise UserError(f"`data`: {archive} cannot be unpacked ({error}); {advice}") from error
