"""Packages that only some commands need: found without importing them, imported when used."""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
from pathlib import Path
from typing import Any

from lion_models.base.errors import UserError

__all__ = ["package_file", "package_folder", "require"]


def require(module: str, what: str, extra: str) -> Any:
    """Import an optional package.

    Args:
        module: what to import.
        what: needs it, for the message: `` `backbone` timm:resnet18 ``.
        extra: the extra of this project that brings it.

    Raises:
        UserError: it is not installed, or fails to import.
    """
    package = module.partition(".")[0]
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] == package:
            raise UserError(
                f"{what}: needs the package '{package}'; run: pip install 'deqcore[{extra}]'"
            ) from error
        broken: Exception = error
    except Exception as error:  # whatever a package raises while it is imported
        broken = error
    raise UserError(
        f"{what}: the package '{package}' is installed but does not import "
        f"({type(broken).__name__}: {broken}); install one that fits torch "
        f"{importlib.metadata.version('torch')}"
    ) from broken


def package_folder(package: str) -> Path | None:
    """The folder of an installed package, without running any of its code; None if not there."""
    spec = importlib.util.find_spec(package)
    folders = list(spec.submodule_search_locations or []) if spec else []
    return Path(folders[0]) if folders else None


def package_file(package: str, inside: str) -> Path | None:
    """A data file of an installed package, as `package_folder` finds it; None if not there."""
    folder = package_folder(package)
    path = None if folder is None else folder / inside
    return path if path is not None and path.is_file() else None
