"""Virtual environments of their own, and commands that run outside this one."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
import venv
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def clean_environment(**variables: str) -> dict[str, str]:
    """This process's environment without what would decide the build for the test."""
    unwanted = ("DEQCORE_", "PYTHONPATH", "PYTEST_", "VIRTUAL_ENV", "PIP_TARGET")
    kept = {key: value for key, value in os.environ.items() if not key.startswith(unwanted)}
    return {**kept, **variables}


def run(*command: object, cwd: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run a command, output and errors together in stdout."""
    return subprocess.run(
        [str(word) for word in command],
        cwd=cwd,
        env=clean_environment(**variables),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )


@dataclass(frozen=True)
class Environment:
    """A virtual environment of its own, which sees this one's torch but not its deqcore."""

    folder: Path

    @classmethod
    def create(cls, folder: Path) -> Environment:
        venv.create(folder, with_pip=False)
        environment = cls(folder)
        # A path line makes packages visible but runs no .pth file there, so that an editable
        # deqcore installed beside torch stays out of sight.
        libraries = sysconfig.get_path("purelib")
        (environment.site_packages() / "torch_from_outside.pth").write_text(libraries + "\n")
        return environment

    def site_packages(self) -> Path:
        return next(self.folder.glob("lib/python*/site-packages"))

    def python(self, *words: object, **variables: str) -> subprocess.CompletedProcess[str]:
        return run(self.folder / "bin" / "python", *words, cwd=self.folder, **variables)

    def install(self, *words: object, **variables: str) -> subprocess.CompletedProcess[str]:
        """Run pip install offline; its own pip is the one that runs these tests."""
        pip = [sys.executable, "-m", "pip", "--python", self.folder / "bin" / "python"]
        offline = ["--no-index", "--no-deps", "--ignore-installed", "--no-cache-dir"]
        return run(*pip, "install", *offline, *words, cwd=self.folder, **variables)


def build_wheel(tree: Path, *options: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """Build a wheel into tree/dist, offline, in pip's usual isolation."""
    pip = [sys.executable, "-m", "pip", "wheel", "-v", "--no-index", "--no-deps", "--no-cache-dir"]
    return run(*pip, *options, "-w", tree / "dist", tree, cwd=tree, **variables)
