"""Files of torch.save, read without running any code of theirs and only if they are whole."""

from __future__ import annotations

import io
import zipfile
from pathlib import Path
from typing import Any

__all__ = ["DamagedError", "load_torch"]


class DamagedError(Exception):
    """The file is not what was written."""


def load_torch(path: Path) -> Any:
    """What torch.save has written, on the CPU.

    torch.save writes a checksum of each part, and torch.load does not look at it; where the parts'
    table is damaged it may return memory that was never written.

    Raises:
        DamagedError: cut off, changed, or no file of plain tensors and numbers.
        OSError: it cannot be read.
    """
    import torch

    try:
        source: Any = _checked(path) if zipfile.is_zipfile(path) else path
        return torch.load(source, map_location="cpu", weights_only=True)
    except (OSError, DamagedError):
        raise
    except Exception as error:  # whatever the damage happens to cause
        raise DamagedError(f"{type(error).__name__}: {error}") from error


def _checked(path: Path) -> io.BytesIO:
    """The same archive, of the parts as Python reads them, which looks at their checksums."""
    content = io.BytesIO()
    with zipfile.ZipFile(path) as parts, zipfile.ZipFile(content, "w") as whole:
        names = parts.namelist()
        if len(set(names)) < len(names):
            raise DamagedError("two parts have one name")
        for name in names:
            whole.writestr(zipfile.ZipInfo(name), parts.read(name))
    content.seek(0)
    return content
