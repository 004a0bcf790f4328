"""Build the project once, from its own sdist, the way a user would."""

from __future__ import annotations

import shutil
import sys
import tarfile
from pathlib import Path

import pytest

from tests.support.environments import ROOT, Environment, build_wheel, run


@pytest.fixture(scope="session")
def sdist(tmp_path_factory) -> Path:
    """Made in a copy: setuptools writes into the tree, where other tests may be building too."""
    copy, folder = tmp_path_factory.mktemp("copy") / "deqcore", tmp_path_factory.mktemp("sdist")
    unwanted = shutil.ignore_patterns(".*", "build", "dist", "runs", "*.egg-info", "__pycache__")
    names = (
        "csrc",
        "deqcore",
        "lion_models",
        "build_backend",
        "tests",
        "tools",
        "docs",
        "examples",
    )
    for name in names:
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
