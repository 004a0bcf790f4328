"""What importing costs, and where it works."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import lion_models
import lion_models.data


def run(code: str, *arguments: object) -> str:
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


@pytest.mark.parametrize("module", ["lion_models", "lion_models.data.named.catalogue"])
def test_what_needs_no_torch_loads_none(module: str):
    heavy = "{'torch', 'numpy', 'PIL', 'matplotlib', 'sklearn'}"
    assert run(f"import sys, {module}; print({heavy} & set(sys.modules))") == "set()\n"


@pytest.mark.parametrize("package", [lion_models, lion_models.data])
def test_exported_names_are_there_when_asked_for(package):
    assert len(package.__all__) > 15
    for name in package.__all__:
        assert getattr(package, name).__class__ is not type(package), name
    assert set(package.__all__) <= set(dir(package))
    with pytest.raises(AttributeError, match=f"'{package.__name__}' has no attribute 'Loin'"):
        _ = package.Loin


EVERY_MODULE = """
import importlib, pkgutil, sys
import filelock  # itself with fcntl, so that its locks work here
sys.modules["fcntl"] = None
import lion_models
for module in pkgutil.walk_packages(lion_models.__path__, "lion_models."):
    if not module.name.endswith("__main__"):
        importlib.import_module(module.name)
"""

CLAIM = """
import pathlib, sys
from lion_models.base.files import claim
with claim(pathlib.Path(sys.argv[1])) as mine:
    print(mine)
"""


def test_every_module_imports_and_locks_where_fcntl_is_missing(tmp_path: Path):
    lock = tmp_path / "a.lock"
    holding = (
        "import subprocess\n"
        + CLAIM
        + "    for code in sys.argv[2:]:\n"
        + "        subprocess.run([sys.executable, '-c', code, sys.argv[1]], check=True)\n"
    )
    hidden = "import filelock, sys; sys.modules['fcntl'] = None\n"
    shown = run(EVERY_MODULE + holding, lock, CLAIM, hidden + CLAIM)
    assert shown.splitlines() == ["True", "False", "False"]
    assert run(hidden + CLAIM, lock) == "True\n"
