"""Emoji, drawn from a colour font when they are read, with their Unicode group as the class.

Only emoji of one character are taken: skin tones, families and flags are sequences, most of them
near copies of one another, and need a text-shaping library to be drawn. That leaves eight groups
(Flags has five such emoji, Component none that stands alone).
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from lion_models.base.errors import UserError
from lion_models.data.base import DecodingSource
from lion_models.data.images import to_tensor
from lion_models.data.transforms import Geometry

__all__ = ["GROUPS", "EmojiSource", "open_emoji", "read_groups"]

GROUPS = (
    "Smileys & Emotion",
    "People & Body",
    "Animals & Nature",
    "Food & Drink",
    "Travel & Places",
    "Activities",
    "Objects",
    "Symbols",
)
# The one size at which Noto's bitmaps are stored, and the box that they fill.
FONT_SIZE = 109
BOX = (136, 128)
VARIATION_SELECTOR = 0xFE0F


@dataclass(eq=False)
class EmojiSource(DecodingSource):
    """Characters that are drawn on white when they are asked for."""

    characters: tuple[str, ...]
    font: Path

    def decode(self, row: int, training: bool) -> Tensor:
        return to_tensor(self.picture(self.characters[row]), self.geometry, training)

    def row_names(self) -> tuple[str, ...]:
        return self.characters

    def picture(self, character: str) -> Image.Image:
        """One emoji in colour on white, square.

        Raises:
            UserError: the font has no picture of it.
        """
        ink = Image.new("RGBA", BOX)
        draw = ImageDraw.Draw(ink)
        draw.text((0, 0), character, font=_face(self.font), embedded_color=True, fill="black")
        if ink.getbbox() is None:
            raise UserError(
                f"`data` {self.name}: the font {self.font} has no picture of U+{ord(character):X}; "
                "use a font and an emoji-test.txt of one Unicode version"
            )
        side = max(BOX)
        ground = Image.new("RGBA", (side, side), (255, 255, 255, 255))
        ground.alpha_composite(ink, ((side - BOX[0]) // 2, (side - BOX[1]) // 2))
        return ground.convert("RGB")


def open_emoji(name: str, font: Path, listing: Path, geometry: Geometry) -> EmojiSource:
    """Open the emoji of a font.

    Args:
        name: what the user wrote.
        font: NotoColorEmoji.ttf.
        listing: Unicode's emoji-test.txt.
        geometry: how pictures are fitted to the backbone.

    Raises:
        UserError: the font cannot be opened, or the listing lacks a group.
    """
    groups = read_groups(listing)
    missing = [group for group in GROUPS if not groups.get(group)]
    if missing:
        raise UserError(
            f"`data` {name}: {listing} has no single-character emoji in {', '.join(missing)}; "
            "expected Unicode's emoji-test.txt"
        )
    characters = tuple(character for group in GROUPS for character in groups[group])
    labels = torch.repeat_interleave(
        torch.arange(len(GROUPS)), torch.tensor([len(groups[group]) for group in GROUPS])
    )
    _open_font(font)  # a font that cannot be opened is found now, not in training
    return EmojiSource(name, GROUPS, labels, geometry, characters, font)


def read_groups(listing: Path) -> dict[str, list[str]]:
    """Single-character, fully-qualified emoji by group, from Unicode's emoji-test.txt."""
    groups: dict[str, list[str]] = {}
    current: list[str] = []
    for line in listing.read_text(encoding="utf-8").splitlines():
        if line.startswith("# group:"):
            current = groups.setdefault(line.removeprefix("# group:").strip(), [])
        elif "; fully-qualified" in line:
            points = [int(point, 16) for point in line.split(";")[0].split()]
            points = [point for point in points if point != VARIATION_SELECTOR]
            if len(points) == 1:
                current.append(chr(points[0]))
    return groups


def _open_font(font: Path) -> ImageFont.FreeTypeFont:
    try:
        return ImageFont.truetype(str(font), FONT_SIZE)
    except OSError as error:
        raise UserError(
            f"{font}: cannot be opened as a font of {FONT_SIZE} pixels ({error}); expected "
            "Debian's NotoColorEmoji.ttf"
        ) from error


# Not a source's own: a face cannot be sent to another process.
_face = functools.cache(_open_font)
