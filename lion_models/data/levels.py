"""Which values of pictures with more than 8 bits are black and white: one rule for a data set."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from lion_models.base.errors import UserError

__all__ = ["Extent", "Levels", "extent_of", "grey_values", "is_wide", "joint_levels", "parse_range"]

# What the tops of 8, 10, 12, 14 and 16 bits are; a camera's 12 bits often lie in 16.
INTEGER_TOPS = (255, 1023, 4095, 16383, 65535)
FLOAT_RANGES = ((0.0, 1.0), (-1.0, 1.0), (0.0, 255.0))

Range = tuple[float, float]


class Extent(NamedTuple):
    """The least and the largest value of a picture.

    Attributes:
        kind: `integers` or `floats` where it has more than 8 bits, else `bytes`.
        low, high: finite, of the band that spans most; NaN where no value is finite.
    """

    kind: str
    low: float
    high: float


class Levels(NamedTuple):
    """The values that become 0 and 255; None for a kind that a data set has no picture of."""

    integers: Range | None = None
    floats: Range | None = None

    def to_dict(self) -> dict[str, Any]:
        return {kind: list(each) for kind, each in self._asdict().items() if each is not None}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Levels:
        return cls(**{kind: (float(low), float(high)) for kind, (low, high) in values.items()})


def is_wide(image: Image.Image) -> bool:
    """Whether a picture has more than 8 bits a value."""
    return image.mode.startswith(("I", "F"))


def grey_values(image: Image.Image) -> NDArray[np.float64]:
    """Values of a wide picture, with NaN for those that its file says are none (GDAL's nodata)."""
    with np.errstate(invalid="ignore"):  # numbers that are none
        values = np.asarray(image).astype(np.float64)
    nothing = image.info.get("nodata")
    return values if nothing is None else np.where(values == nothing, np.nan, values)


def extent_of(image: Image.Image) -> Extent:
    """The extent of a decoded picture; transparency counts as a band."""
    if is_wide(image):
        values = grey_values(image)
        finite = values[np.isfinite(values)]
        kind = "floats" if image.mode == "F" else "integers"
        if not len(finite):
            return Extent(kind, math.nan, math.nan)
        return Extent(kind, float(finite.min()), float(finite.max()))
    found: Any = image.getextrema()
    bands = found if isinstance(found[0], tuple) else (found,)
    low, high = max(bands, key=lambda band: band[1] - band[0])
    return Extent("bytes", float(low), float(high))


def joint_levels(extents: Iterable[Extent]) -> Levels | None:
    """One rule for all pictures of a data set; None where none has more than 8 bits.

    Whole numbers from 0 run to the top of the least number of bits (8, 10, 12, 14 or 16) that holds
    them all. Floats lie in 0..1, -1..1 or 0..255. What fits none of these, runs from the least to
    the largest value.
    """
    found = [each for each in extents if not math.isnan(each.low)]
    ranges = {}
    for kind in ("integers", "floats"):
        own = [each for each in found if each.kind == kind]
        if own:
            low, high = min(each.low for each in own), max(each.high for each in own)
            known = FLOAT_RANGES if kind == "floats" else [(0.0, top) for top in INTEGER_TOPS]
            fitting = [(a, float(b)) for a, b in known if a <= low and high <= b]
            ranges[kind] = fitting[0] if fitting else (low, high)
    return Levels(**ranges) if ranges else None


def parse_range(text: str) -> Levels:
    """The levels that `value_range` names: `0:4095`, for whole numbers and floats alike."""
    low, colon, high = text.partition(":")
    try:
        ends = float(low), float(high)
    except ValueError:
        ends = math.nan, math.nan
    if not (colon and math.isfinite(ends[0]) and math.isfinite(ends[1]) and ends[0] < ends[1]):
        raise UserError(
            f"`value_range`: expected LOW:HIGH, two numbers of which the second is larger, such as "
            f"0:4095, got '{text}'"
        )
    return Levels(ends, ends)
