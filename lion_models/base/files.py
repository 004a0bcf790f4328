"""Write files whole or not at all, and lock a folder's work to one process."""

from __future__ import annotations

import errno
import json
import os
import socket
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from lion_models.base.errors import UserError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

try:
    from fcntl import LOCK_EX, LOCK_NB, flock
except ImportError:  # Windows
    from filelock import lock_descriptor

    def _lock(descriptor: int) -> bool:
        return lock_descriptor(descriptor, blocking=False)
else:

    def _lock(descriptor: int) -> bool:
        try:
            flock(descriptor, LOCK_EX | LOCK_NB)
        except BlockingIOError:
            return False
        return True


__all__ = [
    "append_line",
    "claim",
    "holding",
    "make_folder",
    "replacing",
    "run_lock",
    "save_figure",
    "write_bytes",
    "write_cache",
    "write_json",
]

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@contextmanager
def replacing(path: Path, mode: str = "wb") -> Iterator[IO[Any]]:
    """Open a temporary file that becomes `path` when the block ends without an error.

    What lies at `path` is at any moment the old file or the whole new one, after a power cut too:
    the bytes are on the disk before the name is.

    Args:
        path: the file to write; its folder exists.
        mode: `wb` or `w`.

    Raises:
        UserError: the disk is full or the file cannot be written; the temporary file is removed.
    """
    # The process's own name, so that two processes never write into the same temporary file.
    partial = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        text: dict[str, Any] = {} if "b" in mode else {"encoding": "utf-8", "newline": ""}
        with open(partial, mode, **text) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
        _sync_folder(path.parent)
    except OSError as error:
        raise _cannot_write(path, error) from error
    finally:
        partial.unlink(missing_ok=True)


def make_folder(folder: Path) -> None:
    """Make a folder that can be written to, and those that it lies in.

    Raises:
        UserError: it cannot be made, or files cannot be made in it.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not os.access(folder, os.W_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
    except OSError as error:
        raise _cannot_write(folder, error) from error


def write_bytes(path: Path, content: bytes) -> None:
    """Write a whole file; see `replacing`."""
    with replacing(path) as file:
        file.write(content)


def write_cache(path: Path, content: bytes, instead: str) -> None:
    """Write a file of the user's cache, or warn that it could not be: nothing depends on it.

    Args:
        path: the file; its folder is made.
        content: of the file.
        instead: what happens next time without it, for the warning.
    """
    try:
        make_folder(path.parent)
        write_bytes(path, content)
    except UserError as error:
        warnings.warn(f"{path}: not written ({error.__cause__}); {instead}", stacklevel=3)


def write_json(path: Path, values: Any) -> None:
    """Write a whole JSON file; see `replacing`."""
    write_bytes(path, (json.dumps(values, indent=2) + "\n").encode())


def save_figure(path: Path, figure: Figure) -> None:
    """Write a whole PNG; see `replacing`."""
    with replacing(path) as file:
        figure.savefig(file, format="png")


def append_line(path: Path, line: str) -> None:
    """Add a line to a log that may lose its last line to a power cut.

    Raises:
        UserError: the disk is full or the file cannot be written.
    """
    try:
        with path.open("a") as file:
            file.write(line + "\n")
    except OSError as error:
        raise _cannot_write(path, error) from error


def _sync_folder(folder: Path) -> None:
    # Windows opens no folders, and some file systems do not sync them; the file's bytes are safe.
    with suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _cannot_write(path: Path, error: OSError) -> UserError:
    reason = error.strerror or str(error)
    if error.errno in _FULL:
        return UserError(
            f"{path}: cannot be written, no space is left for it ({reason}); make room or raise "
            "the limit, then continue with `resume` (sweep and compare continue by themselves)"
        )
    return UserError(f"{path}: cannot be written ({reason})")


@contextmanager
def claim(lock: Path) -> Iterator[bool]:
    """Hold a lock file for as long as the block runs; gives False where another process holds it.

    The lock is the kernel's (flock; on Windows LockFileEx, by filelock), so it ends with the
    process that holds it, however that process ends: a dead process's lock is free at once and a
    living one's is never taken. It works across machines where the shared file system passes locks
    on (NFS does). The file stays: removing it would let two processes hold locks on two files of
    one name.

    Args:
        lock: the file; made where missing. It names host and process of its last holder.

    Raises:
        UserError: the file system has no locks, or the file cannot be opened.
    """
    try:
        descriptor = os.open(lock, os.O_RDWR | os.O_CREAT, 0o666)
    except OSError as error:
        raise _cannot_write(lock, error) from error
    try:
        try:
            mine = _lock(descriptor)
        except OSError as error:
            raise UserError(
                f"{lock}: cannot be locked ({error.strerror}); put the runs on a file system "
                "with file locks"
            ) from error
        if mine:
            # Windows locks the first byte, which nobody else can then read.
            holder = f" {socket.gethostname()} {os.getpid()}\n".encode()
            try:
                os.ftruncate(descriptor, 0)
                os.write(descriptor, holder)
            except OSError as error:
                raise _cannot_write(lock, error) from error
        yield mine
    finally:
        os.close(descriptor)


def run_lock(folder: Path) -> Path:
    """The lock file of a run's folder; beside it, so that replacing the folder leaves it."""
    lock = folder.parent / ".locks" / f"{folder.name}.lock"
    make_folder(lock.parent)
    return lock


@contextmanager
def holding(folder: Path) -> Iterator[None]:
    """Hold a run's folder, or raise.

    Raises:
        UserError: another process trains in it.
    """
    lock = run_lock(folder)
    with claim(lock) as mine:
        if not mine:
            with lock.open("rb", buffering=0) as file:
                file.seek(1)
                holder = file.read().decode().strip() or "unknown"
            raise UserError(
                f"{folder} is running in another process (host and process: {holder}); wait for "
                "it, or end it"
            )
        yield
