"""In-tree PEP 517 backend: setuptools, plus the torch that is already installed.

The kernels must be compiled against the torch they will run with. A build isolated in the usual
way would download a second torch of several gigabytes, so this backend asks for none: what cannot
be imported is looked for in the environment that pip installs into. Of the small packages that a
build needs it asks for those that are not there either; where all are, nothing is downloaded.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import subprocess
import sys
from typing import Any

# The first setuptools that reads an SPDX licence expression (torch asks for the same), and what the
# kernels are compiled with; by major version.
_SETUPTOOLS = ("setuptools", 77)
_COMPILING = (("ninja", 1), ("pybind11", 3))


def _see_target_environment() -> None:
    """Append the paths on which the interpreter being installed into finds its packages.

    Asked of a fresh one, since this process has been shown others: that also finds a torch seen
    through --system-site-packages or a .pth file.
    """
    environment = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}
    command = [sys.executable, "-c", "import sys; print('\\n'.join(sys.path))"]
    listed = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    sys.path.extend(path for path in listed.stdout.splitlines() if path not in ["", *sys.path])
    importlib.invalidate_caches()


def _is_installed(package: tuple[str, int]) -> bool:
    name, major = package
    try:
        return int(importlib.metadata.version(name).split(".")[0]) >= major
    except importlib.metadata.PackageNotFoundError:
        return False


def _compiles() -> bool:
    return os.environ.get("DEQCORE_BUILD", "auto") != "none"


def _prepare(needs_torch: bool) -> None:
    wanted = [_SETUPTOOLS, *(_COMPILING if _compiles() else ())]
    if importlib.util.find_spec("torch") is None or not all(map(_is_installed, wanted)):
        _see_target_environment()
    if not _is_installed(_SETUPTOOLS):
        setuptools = _requirement(_SETUPTOOLS)
        raise SystemExit(f"deqcore: building needs {setuptools}: pip install '{setuptools}'")
    if needs_torch and _compiles() and importlib.util.find_spec("torch") is None:
        raise SystemExit(
            "deqcore: install torch first (pip install torch): the kernels are compiled against "
            "the torch they will run with. Where torch is installed but out of sight of an "
            "isolated build, add --no-build-isolation (pip) or --no-isolation (python -m build); "
            "DEQCORE_BUILD=none builds the pure-PyTorch library without it."
        )


def _requirements(*packages: tuple[str, int]) -> list[str]:
    _see_target_environment()
    return [_requirement(package) for package in packages if not _is_installed(package)]


def _requirement(package: tuple[str, int]) -> str:
    return f"{package[0]}>={package[1]}"


def get_requires_for_build_sdist(config_settings: Any = None) -> list[str]:
    return _requirements(_SETUPTOOLS)


def get_requires_for_build_wheel(config_settings: Any = None) -> list[str]:
    return _requirements(_SETUPTOOLS, *(_COMPILING if _compiles() else ()))


def get_requires_for_build_editable(config_settings: Any = None) -> list[str]:
    return get_requires_for_build_wheel(config_settings)


def build_sdist(sdist_directory: str, config_settings: Any = None) -> str:
    _prepare(needs_torch=False)
    from setuptools import build_meta

    return build_meta.build_sdist(sdist_directory, config_settings)


def build_wheel(
    wheel_directory: str, config_settings: Any = None, metadata_directory: str | None = None
) -> str:
    _prepare(needs_torch=True)
    from setuptools import build_meta

    return build_meta.build_wheel(wheel_directory, config_settings, metadata_directory)


def build_editable(
    wheel_directory: str, config_settings: Any = None, metadata_directory: str | None = None
) -> str:
    _prepare(needs_torch=True)
    from setuptools import build_meta

    return build_meta.build_editable(wheel_directory, config_settings, metadata_directory)


def prepare_metadata_for_build_wheel(metadata_directory: str, config_settings: Any = None) -> str:
    _prepare(needs_torch=False)
    from setuptools import build_meta

    return build_meta.prepare_metadata_for_build_wheel(metadata_directory, config_settings)


def prepare_metadata_for_build_editable(
    metadata_directory: str, config_settings: Any = None
) -> str:
    _prepare(needs_torch=False)
    from setuptools import build_meta

    return build_meta.prepare_metadata_for_build_editable(metadata_directory, config_settings)
