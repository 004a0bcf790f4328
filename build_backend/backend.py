"""In-tree PEP 517 backend: setuptools, plus the torch that is already installed.

The kernels must be compiled against the torch they will run with. A build isolated in the usual
way would download a second torch of several gigabytes, so this backend asks for none: when torch
(or setuptools) cannot be imported, it looks into the environment that pip installs into.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import sys
import sysconfig
from typing import Any

# The first setuptools that reads an SPDX licence expression. torch asks for the same.
_SETUPTOOLS = "setuptools>=77.0.3"


def _see_target_environment() -> None:
    """Append the site-packages of the environment being installed into."""
    for key in ("purelib", "platlib"):
        path = sysconfig.get_path(key)
        if path not in sys.path:
            sys.path.append(path)
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
    wanted = os.environ.get("DEQCORE_BUILD", "auto") != "none"
    if needs_torch and wanted and importlib.util.find_spec("torch") is None:
        raise SystemExit(
            "deqcore: install torch first (pip install torch): the kernels are compiled against "
            "the torch they will run with. Where torch is installed but out of sight of an "
            "isolated build, add --no-build-isolation (pip) or --no-isolation (python -m build); "
            "DEQCORE_BUILD=none builds the pure-PyTorch library without it."
        )


def _requirements() -> list[str]:
    _prepare(needs_torch=False)
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
