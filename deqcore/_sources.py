"""Which sources of kernels an extension was built from. setup.py reads this file by itself."""

from __future__ import annotations

import hashlib
from pathlib import Path


def digest(csrc: Path, part: str) -> str:
    """Of the files in the folder ``csrc`` that the ``cpu`` or ``cuda`` kernels are made of."""
    found = hashlib.sha256()
    for folder in ("ops", part):
        for path in sorted((csrc / folder).iterdir()):
            if path.suffix in (".h", ".cuh", ".cpp", ".cu"):
                found.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    return found.hexdigest()[:16]
