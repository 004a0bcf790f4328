"""Names of files and classes, made fit for where they are shown or written.

A name is any text that a file system gives: with bytes that are no UTF-8 (which Python holds as
lone surrogates), control characters, `$` and `[`. It is kept as it is; what shows it, asks here.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable

__all__ = ["difference", "look_alike", "shown", "written"]

_SURROGATES = re.compile("[\ud800-\udfff]")
# Control characters but line ends and tabs, and marks that turn the direction of what follows.
_CONTROLS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069]")


def written(text: str) -> str:
    """What UTF-8 can hold of a text: a byte that was none is written as `\\xe9`."""
    return _SURROGATES.sub(_escape, text)


def shown(text: str) -> str:
    """The same for terminals: without what would move the cursor, set colours or hide letters."""
    return _CONTROLS.sub(_escape, written(text))


def _escape(match: re.Match[str]) -> str:
    code = ord(match[0])
    if 0xDC80 <= code <= 0xDCFF:  # a byte, see surrogateescape
        code -= 0xDC00
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}"


def look_alike(names: Iterable[str], others: Iterable[str]) -> dict[str, str]:
    """Those of `names` that differ from one of `others` only in case, spaces or Unicode form."""
    known: dict[str, list[str]] = {}
    for other in others:
        known.setdefault(_folded(other), []).append(other)
    return {
        name: near[0]
        for name in names
        if (near := [other for other in known.get(_folded(name), []) if other != name])
    }


def difference(one: str, other: str) -> str:
    """What two names that look alike differ in."""
    forms = [unicodedata.normalize("NFC", name) for name in (one, other)]
    found = [] if (one, other) == tuple(forms) else ["Unicode form"]
    spaces = [" ".join(form.split()) for form in forms]
    found += [] if forms == spaces else ["spaces"]
    found += [] if spaces[0] == spaces[1] else ["case"]
    return " and ".join(found)


def _folded(name: str) -> str:
    return " ".join(unicodedata.normalize("NFC", name).casefold().split())
