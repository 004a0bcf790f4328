"""Text files of users, in whichever encoding their programs write."""

from __future__ import annotations

import codecs
from pathlib import Path

from lion_models.base.errors import UserError
from lion_models.data.images import unreadable

__all__ = ["read_text"]

_MARKS = (
    (codecs.BOM_UTF8, "utf-8"),
    (codecs.BOM_UTF32_LE, "utf-32-le"),  # begins as UTF-16's does
    (codecs.BOM_UTF32_BE, "utf-32-be"),
    (codecs.BOM_UTF16_LE, "utf-16-le"),
    (codecs.BOM_UTF16_BE, "utf-16-be"),
)


def read_text(path: Path) -> str:
    """A text file in UTF-8 or, as a mark or its zeros say, in UTF-16 or UTF-32; without the mark.

    Bytes that are no UTF-8 stay as they are in names of files.

    Raises:
        UserError: it cannot be read, or is no text.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise unreadable(path, error) from error
    mark, encoding = next((each for each in _MARKS if content.startswith(each[0])), (b"", "utf-8"))
    if not mark and b"\0" in content[:2]:
        encoding = "utf-16-be" if content[0] == 0 else "utf-16-le"
    content = content[len(mark) :]
    try:
        text = content.decode(encoding, "surrogateescape" if encoding == "utf-8" else "strict")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: no {encoding} ({error.reason}); save it as UTF-8") from error
    if "\0" in text:
        raise UserError(f"{path}: no text; expected a list in UTF-8")
    return text
