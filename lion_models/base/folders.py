"""Where prepared data and what was remembered about files lie."""

from __future__ import annotations

import os
from pathlib import Path

__all__ = ["cache_root", "data_root"]


def cache_root() -> Path:
    """The user's cache folder of this package: $XDG_CACHE_HOME/lion, else ~/.cache/lion."""
    base = os.environ.get("XDG_CACHE_HOME", "")
    return (Path(base) if base else Path.home() / ".cache") / "lion"


def data_root() -> Path:
    """Where `lion data prepare` writes: $LION_DATA, else the cache's `data` folder."""
    chosen = os.environ.get("LION_DATA", "")
    return Path(chosen).expanduser() if chosen else cache_root() / "data"
