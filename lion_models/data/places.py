"""Where prepared data and what was remembered about files lie."""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path
from typing import Any

__all__ = ["cache_root", "data_root", "write_json"]


def cache_root() -> Path:
    """The user's cache folder of this package: $XDG_CACHE_HOME/lion, else ~/.cache/lion."""
    base = os.environ.get("XDG_CACHE_HOME", "")
    return (Path(base) if base else Path.home() / ".cache") / "lion"


def data_root() -> Path:
    """Where `lion data prepare` writes: $LION_DATA, else the cache's `data` folder."""
    chosen = os.environ.get("LION_DATA", "")
    return Path(chosen).expanduser() if chosen else cache_root() / "data"


def write_json(path: Path, values: Any) -> None:
    """Write JSON to a temporary file beside `path`, then rename it; makes the folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, partial = tempfile.mkstemp(prefix=f".{path.name}-", dir=path.parent)
    try:
        with os.fdopen(handle, "w") as file:
            json.dump(values, file)
        Path(partial).replace(path)
    except BaseException:
        Path(partial).unlink(missing_ok=True)
        raise
