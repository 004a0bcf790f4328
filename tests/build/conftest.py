"""Build the project once, from its own sdist, the way a user would."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import venv
from dataclasses import dataclass
from pathlib import Path

import pytest

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


@pytest.fixture(scope="session")
def sdist(tmp_path_factory) -> Path:
    """Made in a copy: setuptools writes into the tree, where other tests may be building too."""
    copy, folder = tmp_path_factory.mktemp("copy") / "deqcore", tmp_path_factory.mktemp("sdist")
    unwanted = shutil.ignore_patterns(".*", "build", "dist", "runs", "*.egg-info", "__pycache__")
    for name in ("csrc", "deqcore", "lion_models", "build_backend", "tests", "docs"):
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, copy / name, ignore=unwanted)
    for path in filter(Path.is_file, ROOT.iterdir()):
        shutil.copy2(path, copy)
    command = [sys.executable, "-m", "build", "--sdist", "--no-isolation", "-o", folder, copy]
    done = run(*command, cwd=copy)
    assert done.returncode == 0, done.stdout
    return next(folder.glob("deqcore-*.tar.gz"))


@pytest.fixture(scope="session")
def tree(sdist, tmp_path_factory) -> Path:
    """The unpacked sdist: what a machine without this repository has."""
    folder = tmp_path_factory.mktemp("tree")
    with tarfile.open(sdist) as archive:
        archive.extractall(folder)
    return next(folder.iterdir())


def build_wheel(tree: Path, *options: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """Build a wheel into tree/dist, offline, in pip's usual isolation."""
    pip = [sys.executable, "-m", "pip", "wheel", "-v", "--no-index", "--no-deps", "--no-cache-dir"]
    return run(*pip, *options, "-w", tree / "dist", tree, cwd=tree, **variables)


@pytest.fixture(scope="session")
def wheel(tree) -> Path:
    done = build_wheel(tree, DEQCORE_BUILD="cpu")
    assert done.returncode == 0, done.stdout
    return next(tree.glob("dist/deqcore-*-linux_*.whl"))


@pytest.fixture(scope="session")
def installed(wheel, tmp_path_factory) -> Environment:
    environment = Environment.create(tmp_path_factory.mktemp("installed"))
    done = environment.install(wheel)
    assert done.returncode == 0, done.stdout
    return environment


@pytest.fixture(scope="session")
def installed_without_kernels(tree, tmp_path_factory) -> Environment:
    environment = Environment.create(tmp_path_factory.mktemp("without_kernels"))
    done = environment.install(tree, DEQCORE_BUILD="none")
    assert done.returncode == 0, done.stdout
    return environment
