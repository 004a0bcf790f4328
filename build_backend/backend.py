"""In-tree PEP 517 backend: setuptools, plus the torch that is already installed.

The kernels must be compiled against the torch they will run with. A build isolated in the usual
way would download a second torch of several gigabytes, so this backend asks for none: when torch
(or setuptools) cannot be imported, it looks into the environment that pip installs into.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import subprocess
import sys
from typing import Any

# The first setuptools that reads an SPDX licence expression. torch asks for the same.
_SETUPTOOLS = "setuptools>=77.0.3"


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


def _setuptools_is_recent() -> bool:
    try:
        major = importlib.metadata.version("setuptools").split(".")[0]
    except importlib.metadata.PackageNotFoundError:
        return False
    return int(major) >= 77


def _prepare(needs_torch: bool) -> None:
    if importlib.util.find_spec("torch") is None or not _setuptools_is_recent():
        _see_target_environment()
    if not _setuptools_is_recent():
        raise SystemExit(f"deqcore: building needs {_SETUPTOOLS}: pip install '{_SETUPTOOLS}'")
    wanted = os.environ.get("DEQCORE_BUILD", "auto") != "none"
    if needs_torch and wanted and importlib.util.find_spec("torch") is None:
        raise SystemExit(
            "deqcore: install torch first (pip install torch): the kernels are compiled against "
            "the torch they will run with. Where torch is installed but out of sight of an "
            "isolated build, add --no-build-isolation (pip) or --no-isolation (python -m build); "
            "DEQCORE_BUILD=none builds the pure-PyTorch library without it."
        )


def _requirements() -> list[str]:
    _see_target_environment()
    return [] if _setuptools_is_recent() else [_SETUPTOOLS]


def get_requires_for_build_sdist(config_settings: Any = None) -> list[str]:
    return _requirements()


def get_requires_for_build_wheel(config_settings: Any = None) -> list[str]:
    return _requirements()


def get_requires_for_build_editable(config_settings: Any = None) -> list[str]:
    return _requirements()


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
