"""Turn image files of any common kind into uint8 tensors of the backbone's input size."""

from __future__ import annotations

import errno
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from lion_models.base.errors import UserError
from lion_models.data.formats import HEIC_EXTRA, is_heic, is_tiff, open_picture
from lion_models.data.levels import Extent, Levels, extent_of, grey_values, is_wide
from lion_models.data.transforms import Geometry

__all__ = [
    "UnreadableError",
    "check_header",
    "check_whole",
    "decode_file",
    "decode_image",
    "glance",
    "to_tensor",
    "unreadable",
    "upright",
]

# Pillow's warnings name no file, and a file that does not decode is an error here. Added behind
# the filters that an application has set.
warnings.filterwarnings("ignore", module=r"PIL\.", append=True)

PHOTOMETRIC, WHITE_IS_ZERO = 262, 0  # a TIFF's tag and one of its values
GDAL_NODATA = 42113  # a TIFF's tag: the value that stands for none
# EINVAL is what a seek to a place before the file's beginning gives.
_ERRNO_OF_DAMAGE = (None, errno.EINVAL)


class UnreadableError(UserError):
    """A file or folder that is there and cannot be read; what it holds is not known."""


def unreadable(path: Path, error: OSError) -> UnreadableError:
    """The error for `path`, from what the system said of it."""
    return UnreadableError(
        f"{path}: cannot be read ({error.strerror or error}); check its rights and its disk, or "
        "move it away"
    )


def decode_image(path: Path, channels: int, size: int, transform: str = "square") -> Tensor:
    """Read one image file as it is evaluated: uint8 (channels, size, size).

    EXIF orientation is applied, transparency is laid over white, 16-bit grey is scaled to 8 bits,
    and the picture is fitted to the square.

    Args:
        path: the file.
        channels: 1 for grey, 3 for colour, whatever the file holds.
        size: height and width in pixels.
        transform: see `Geometry`; `square` resizes the whole picture, its sides are not cropped.

    Raises:
        UnreadableError: the file may not or cannot be read.
        UserError: no such file, not a whole image, or one that is too large.
    """
    return decode_file(path, Geometry(channels, size, transform))


def decode_file(path: Path, geometry: Geometry, training: bool = False) -> Tensor:
    """`decode_image` with its options in one; `training` keeps the margin of random crops."""
    with _opened(path) as image:
        if geometry.draft_size is not None:
            image.draft(None, geometry.draft_size)  # does nothing but for JPEG
        return to_tensor(upright(image), geometry, training)


def glance(path: Path) -> tuple[tuple[float, float, float], int]:
    """Mean colour, 0 to 255, and shorter side of a picture; a JPEG is decoded at an eighth."""
    with _opened(path) as image:
        side = min(image.size)
        image.draft("RGB", (side // 8, side // 8))
        pixels = np.asarray(image.convert("RGB").resize((8, 8)), dtype=np.float64)
        red, green, blue = pixels.mean((0, 1)).tolist()
        return (red, green, blue), side


def check_header(path: Path) -> Extent | None:
    """Raise UserError unless the file begins as an image does; cheap enough for whole folders.

    Returns:
        The extent of a picture with more than 8 bits, which has to be decoded for it.
    """
    with _opened(path) as image:
        return extent_of(upright(image)) if is_wide(image) else None


def check_whole(path: Path) -> Extent:
    """Raise UserError unless the whole file can be decoded; costs as much as decoding it."""
    with _opened(path) as image:
        return extent_of(upright(image))


def upright(image: Image.Image) -> Image.Image:
    """A picture, decoded, as its EXIF says that it is to be looked at."""
    image.load()
    if is_wide(image) and getattr(image, "tag_v2", {}).get(PHOTOMETRIC) == WHITE_IS_ZERO:
        image.info["white_is_zero"] = True  # which Pillow turns round for 8 bits alone
    with suppress(Exception):  # no such tag, or a damaged one
        image.info["nodata"] = float(str(getattr(image, "tag_v2", {}).get(GDAL_NODATA)).strip("\0"))
    try:
        return ImageOps.exif_transpose(image)
    except Exception:  # damaged EXIF says nothing; the picture itself is whole
        return image


@contextmanager
def _opened(path: Path) -> Iterator[Image.Image]:
    try:
        if not path.is_file():
            if path.is_dir():
                raise UserError(f"{path}: is a folder; expected an image")
            link = f" (a link to '{os.readlink(path)}')" if path.is_symlink() else ""
            raise UserError(f"{path}: no such file{link}; expected an image")
        with open_picture(path) as image:
            yield image
    except UnidentifiedImageError as error:
        if is_heic(path):
            raise UserError(f"{path}: a HEIC picture; to read it, run: {HEIC_EXTRA}") from error
        if is_tiff(path):
            raise UserError(
                f"{path}: a TIFF of a kind that is not read (bits, bands or compression); save it "
                "with 8 or 16 bits, or in grey with floats of 32 bits"
            ) from error
        size = path.stat().st_size
        content = f"{size} bytes of something else" if size else "an empty file"
        raise UserError(
            f"{path}: not an image ({content}); "
            "expected PNG, JPEG or another raster format; remove or replace it"
        ) from error
    except Image.DecompressionBombError as error:
        limit = 2 * (Image.MAX_IMAGE_PIXELS or 0) // 10**6
        raise UserError(f"{path}: larger than {limit} megapixels; make it smaller") from error
    except UserError:
        raise
    except Exception as error:  # a decoder may raise anything for damaged bytes
        if isinstance(error, OSError) and error.errno not in _ERRNO_OF_DAMAGE:
            raise unreadable(path, error) from error
        why = str(error) or type(error).__name__
        raise UserError(f"{path}: damaged image ({why}); remove or replace it") from error


def to_tensor(image: Image.Image, geometry: Geometry, training: bool = False) -> Tensor:
    """A Pillow image of any mode to uint8 (C, S, S), or (C, R, R) for training."""
    image = _eight_bits(image, geometry.levels)
    if "A" in image.getbands() or "transparency" in image.info:
        image = image.convert("RGBA")
        ground = Image.new("RGBA", image.size, (255, 255, 255, 255))
        image = Image.alpha_composite(ground, image)
    image = geometry.picture(image.convert("L" if geometry.channels == 1 else "RGB"), training)
    pixels = torch.from_numpy(np.array(image, dtype=np.uint8))
    return pixels.unsqueeze(0) if geometry.channels == 1 else pixels.permute(2, 0, 1).contiguous()


def _eight_bits(image: Image.Image, levels: Levels | None) -> Image.Image:
    """Scale 16-bit, 32-bit and float grey to 8 bits; Pillow's own conversion clips them."""
    if not is_wide(image):
        return image
    values = grey_values(image)
    low, high = _range_of(image.mode, values, levels)
    shades = (values - low) / (high - low)
    if image.info.get("white_is_zero"):
        shades = 1 - shades
    shades = np.nan_to_num(shades, nan=0.0, posinf=1.0, neginf=0.0)
    grey = Image.fromarray(np.clip(shades * 255 + 0.5, 0, 255).astype(np.uint8))
    clear = image.info.get("transparency")
    if clear is None:
        return grey
    # One value of 16 bits is transparent; the others that share its 8 bits are not.
    alpha = Image.fromarray(np.where(values == clear, 0, 255).astype(np.uint8))
    return Image.merge("LA", (grey, alpha))


def _range_of(mode: str, values: NDArray[np.float64], levels: Levels | None) -> tuple[float, float]:
    """The values that become black and white."""
    chosen = None if levels is None else levels.floats if mode == "F" else levels.integers
    if chosen is not None:
        low, high = chosen
        return low, high if high > low else low + 1
    if mode != "F":
        # A 16-bit file may open in the 32-bit mode "I"; its range stays that of 16 bits.
        return 0.0, 65535.0
    largest = values.max(initial=0.0, where=np.isfinite(values))
    return 0.0, 1.0 if largest <= 1.0 else 255.0
