"""Turn image files of any common kind into uint8 tensors of the backbone's input size."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from lion_models.errors import UserError

__all__ = ["IMAGE_SUFFIXES", "check_header", "decode_image", "to_tensor"]

IMAGE_SUFFIXES = frozenset(
    {".png", ".jpg", ".jpeg", ".bmp", ".gif", ".tif", ".tiff", ".webp", ".pgm", ".ppm"}
)


def decode_image(path: Path, channels: int, size: int) -> Tensor:
    """Read one image file: uint8 (channels, size, size).

    EXIF orientation is applied, transparency is laid over white, 16-bit grey is scaled to 8 bits,
    and the whole picture is resized to the square (its sides are not cropped).

    Args:
        path: the file.
        channels: 1 for grey, 3 for colour, whatever the file holds.
        size: height and width in pixels.

    Raises:
        UserError: no such file, or not a whole image.
    """
    if not path.is_file():
        raise UserError(f"{path}: no such file; expected an image")
    with _opened(path) as image:
        image.load()
        return to_tensor(ImageOps.exif_transpose(image), channels, size)


def check_header(path: Path) -> None:
    """Raise UserError unless the file begins as an image does; cheap enough for whole folders."""
    with _opened(path):
        pass


@contextmanager
def _opened(path: Path) -> Iterator[Image.Image]:
    try:
        with Image.open(path) as image:
            yield image
    except UnidentifiedImageError as error:
        raise UserError(
            f"{path}: not an image ({path.stat().st_size} bytes of something else); "
            "expected PNG, JPEG or another format that Pillow reads; remove or replace it"
        ) from error
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise UserError(f"{path}: damaged image ({error}); remove or replace it") from error


def to_tensor(image: Image.Image, channels: int, size: int) -> Tensor:
    """A Pillow image of any mode to uint8 (channels, size, size)."""
    image = _eight_bits(image)
    if "A" in image.getbands() or "transparency" in image.info:
        image = image.convert("RGBA")
        ground = Image.new("RGBA", image.size, (255, 255, 255, 255))
        image = Image.alpha_composite(ground, image)
    image = image.convert("L" if channels == 1 else "RGB")
    if image.size != (size, size):
        image = image.resize((size, size), Image.Resampling.BILINEAR)
    pixels = torch.from_numpy(np.array(image, dtype=np.uint8))
    return pixels.unsqueeze(0) if channels == 1 else pixels.permute(2, 0, 1).contiguous()


def _eight_bits(image: Image.Image) -> Image.Image:
    """Scale 16-bit, 32-bit and float grey to 8 bits; Pillow's own conversion clips them."""
    if not image.mode.startswith(("I", "F")):
        return image
    values = np.asarray(image).astype(np.float64)
    if image.mode == "F":
        top = 1.0 if values.max(initial=0.0) <= 1.0 else 255.0
    else:
        # A 16-bit file may open in the 32-bit mode "I"; its range stays that of 16 bits.
        top = 65535.0
    return Image.fromarray(np.clip(values / top * 255 + 0.5, 0, 255).astype(np.uint8))
