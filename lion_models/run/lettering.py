"""Names in pictures: with a font that has their letters, and never taken for mathematics."""

from __future__ import annotations

import functools
import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, ParamSpec

import matplotlib
from matplotlib import font_manager
from matplotlib.ft2font import FT2Font

from lion_models.base.errors import UserError
from lion_models.base.names import shown

__all__ = ["drawn", "lettering"]

P = ParamSpec("P")


def lettering(name: str) -> str:
    """A name as matplotlib draws it: a `$` is a `$`, and a letter of no font is `\\u65e5`."""
    name = shown(name)
    missing = _missing(name) - set(_fonts_for(_missing(name)))
    for letter in missing:
        name = name.replace(letter, letter.encode("ascii", "backslashreplace").decode())
    return name.replace("$", r"\$")


def drawn(plot: Callable[P, None]) -> Callable[P, None]:
    """Give a function that draws a picture the fonts that its arguments' names need.

    A picture that cannot be drawn is a warning: what it would show has been measured and written.
    One that cannot be written stays an error.
    """

    @functools.wraps(plot)
    def draw(*args: P.args, **options: P.kwargs) -> None:
        names = json.dumps([args, options], ensure_ascii=False, default=str)
        families = dict.fromkeys(_fonts_for(_missing(names)).values())
        fonts = [*matplotlib.rcParams["font.family"], *families]
        try:
            with matplotlib.rc_context({"font.family": fonts}):
                plot(*args, **options)
        except UserError:
            raise
        except Exception as error:
            path: Any = args[0] if args else "the picture"
            warnings.warn(
                f"{path}: not drawn ({type(error).__name__}: {str(error).strip()[:200]}); what it "
                "shows is in the files beside it",
                stacklevel=2,
            )

    return draw


def _missing(text: str) -> frozenset[str]:
    """Letters that matplotlib's usual font lacks."""
    others = {letter for letter in text if ord(letter) > 0x7E}
    return frozenset(others - _letters_of(font_manager.findfont("DejaVu Sans")))


@functools.lru_cache(maxsize=64)
def _fonts_for(letters: frozenset[str]) -> dict[str, str]:
    """For each letter that an installed font has, the family of one; as few families as can be."""
    if not letters:
        return {}
    families: dict[str, frozenset[str]] = {}
    for entry in font_manager.fontManager.ttflist:
        # Last Resort draws boxes for all there is.
        drawing = entry.style == "normal" and not entry.name.startswith("Last Resort")
        if drawing and entry.name not in families:
            families[entry.name] = letters & _letters_of(entry.fname)
    found: dict[str, str] = {}
    while families:
        best = max(sorted(families), key=lambda name: len(families[name] - set(found)))
        fresh = families[best] - set(found)
        if not fresh:
            break
        found |= dict.fromkeys(fresh, best)
    return found


@functools.cache
def _letters_of(path: str | Path) -> frozenset[str]:
    """What a font file has; nothing where it is gone, damaged, or of fixed sizes alone."""
    try:
        font = FT2Font(str(path))
        return frozenset(map(chr, font.get_charmap())) if font.scalable else frozenset()
    except (OSError, RuntimeError, ValueError):
        return frozenset()
