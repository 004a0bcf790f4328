"""Which files are pictures: a fixed list of raster formats, and what opens them.

Pillow opens more by itself, and starts a program for some of it: Ghostscript for PostScript, under
whatever name. What is not listed here is not opened.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import IO

from PIL import Image

__all__ = ["HEIC_EXTRA", "image_suffixes", "is_heic", "is_tiff", "open_picture", "unread_suffixes"]

FORMATS = ("PNG", "JPEG", "BMP", "DIB", "GIF", "TIFF", "WEBP", "PPM", "AVIF", "JPEG2000", "TGA",
           "PCX", "SGI", "SUN", "QOI", "DDS", "ICO")  # fmt: skip
SUFFIXES = frozenset((
    ".png", ".apng", ".jpg", ".jpeg", ".jpe", ".jfif", ".mpo", ".bmp", ".dib", ".gif", ".tif",
    ".tiff", ".webp", ".pbm", ".pgm", ".ppm", ".pnm", ".pfm", ".avif", ".avifs", ".jp2", ".j2k",
    ".j2c", ".jpc", ".jpf", ".jpx", ".tga", ".pcx", ".sgi", ".ras", ".qoi", ".dds",
))  # fmt: skip
HEIC_SUFFIXES = frozenset({".heic", ".heif", ".hif"})
HEIC_EXTRA = "pip install 'deqcore[heic]'"
_HEIC_BRANDS = frozenset({b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1"})


@functools.cache
def _heic_is_read() -> bool:
    """Whether pillow-heif is installed; it then opens HEIC for Pillow."""
    try:
        from pillow_heif import register_heif_opener
    except ImportError:
        return False
    register_heif_opener()
    return True


@functools.cache
def _formats() -> tuple[str, ...]:
    Image.init()  # to know which formats this Pillow has been built with
    formats = (*FORMATS, "HEIF") if _heic_is_read() else FORMATS
    return tuple(name for name in formats if name in Image.OPEN)


def image_suffixes() -> frozenset[str]:
    """How the names of pictures end, in small letters."""
    return SUFFIXES | HEIC_SUFFIXES if _heic_is_read() else SUFFIXES


def unread_suffixes() -> frozenset[str]:
    """Those of pictures that would be read if a package were installed."""
    return HEIC_SUFFIXES - image_suffixes()


def open_picture(file: Path | IO[bytes]) -> Image.Image:
    """`PIL.Image.open` for the formats of this list."""
    return Image.open(file, formats=_formats())


def is_heic(path: Path) -> bool:
    """Whether a file begins as HEIC does."""
    with path.open("rb") as file:
        start = file.read(12)
    return start[4:8] == b"ftyp" and start[8:12] in _HEIC_BRANDS


def is_tiff(path: Path) -> bool:
    """Whether a file begins as TIFF does."""
    with path.open("rb") as file:
        return file.read(4) in (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
