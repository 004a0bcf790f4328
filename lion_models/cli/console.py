"""Where commands print: names are shown as they are, whatever letters they have."""

from __future__ import annotations

import io
import sys
from typing import Any

from rich.console import Console
from rich.text import Text

from lion_models.base.names import shown

__all__ = ["Plain", "err", "fit_streams", "out"]


class Plain(Console):
    """A console that takes no brackets or colons of a name for markup."""

    def __init__(self, **options: Any) -> None:
        super().__init__(markup=False, emoji=False, **options)

    def render_str(self, text: str, **options: Any) -> Text:
        return super().render_str(shown(text), **options)


out, err = Plain(), Plain(stderr=True, soft_wrap=True)


def fit_streams() -> None:
    """Let standard output write a letter that its encoding lacks as `\\u65e5`."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
