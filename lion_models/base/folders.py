"""Where prepared data, copies of weights and what was remembered about files lie."""

from __future__ import annotations

import os
from pathlib import Path

from platformdirs import user_cache_path

__all__ = ["cache_root", "data_root"]


def cache_root() -> Path:
    """The user's cache folder of this package; on Linux $XDG_CACHE_HOME/lion or ~/.cache/lion."""
    return user_cache_path("lion", appauthor=False)


def data_root() -> Path:
    """Where `lion data prepare` writes: $LION_DATA, else the cache's `data` folder."""
    chosen = os.environ.get("LION_DATA", "")
    return Path(chosen).expanduser() if chosen else cache_root() / "data"
