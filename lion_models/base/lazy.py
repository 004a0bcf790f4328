"""Names that a package takes from its modules only when they are asked for (PEP 562)."""

from __future__ import annotations

import ast
import importlib
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

__all__ = ["exports"]


def exports(
    package: str, file: str
) -> tuple[Callable[[str], Any], Callable[[], list[str]], list[str]]:
    """The `__getattr__`, `__dir__` and `__all__` of a package that imports for type checkers alone.

    The lines `from MODULE import NAME as NAME` under its `if TYPE_CHECKING:` are what is exported:
    type checkers read them, and so does this function, so that no name stands there twice.

    Args:
        package: its `__name__`.
        file: its `__file__`.
    """
    homes = {
        alias.name: node.module
        for block in ast.parse(Path(file).read_text(encoding="utf-8")).body
        if isinstance(block, ast.If)
        for node in block.body
        if isinstance(node, ast.ImportFrom) and node.module
        for alias in node.names
    }

    def find(name: str) -> Any:
        if name not in homes:
            raise AttributeError(f"module '{package}' has no attribute '{name}'")
        value = getattr(importlib.import_module(homes[name]), name)
        setattr(sys.modules[package], name, value)  # from now on without a detour
        return value

    names = sorted(homes)
    return find, lambda: [*vars(sys.modules[package]), *names], names
