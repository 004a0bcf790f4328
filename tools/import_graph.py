"""Rooms of a package, the arrows between them, and circles: `python tools/import_graph.py PACKAGE`.

A room is what lies directly in the package: a sub-package or a module. An arrow goes from a room
to another one that a file of it imports anywhere, inside functions too; imports for type checkers
alone (under `if TYPE_CHECKING:`) count as well, since a reader follows them. Nothing is run.
"""

from __future__ import annotations

import argparse
import ast
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def imports(path: Path) -> list[tuple[str, str | None]]:
    """(module, name): `import a.b` is ("a.b", None), `from a import b` is ("a", "b")."""
    found: list[tuple[str, str | None]] = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found += [(alias.name, None) for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            found += [(node.module or "", alias.name) for alias in node.names]
    return found


def room_of(path: Path, package: Path) -> str:
    """The sub-package or module of `package` that a file lies in; `__init__` is one itself."""
    return path.relative_to(package).parts[0].removesuffix(".py")


def arrows(package: Path) -> dict[str, dict[str, list[str]]]:
    """By room, the rooms that it imports, each with the files that do.

    Args:
        package: the folder of a package, such as `lion_models`.
    """
    rooms = {room_of(path, package) for path in package.rglob("*.py")}
    found: dict[str, dict[str, list[str]]] = {room: {} for room in sorted(rooms)}
    for path in sorted(package.rglob("*.py")):
        here = room_of(path, package)
        for room in sorted(set(_targets(path, package.name)) & rooms - {here}):
            found[here].setdefault(room, []).append(str(path.relative_to(package)))
    return found


def _targets(path: Path, package: str) -> Iterator[str]:
    for module, name in imports(path):
        first, _, rest = module.partition(".")
        if first != package:
            continue
        if rest:
            yield rest.split(".")[0]
        elif name is not None:
            yield name


def circles(graph: dict[str, dict[str, list[str]]]) -> list[list[str]]:
    """Sets of rooms of which each leads to every other (strongly connected components)."""
    reach = {room: _reached(graph, room) for room in graph}
    found = {
        tuple(sorted(other for other in reach[room] if room in reach[other])) for room in graph
    }
    return [list(circle) for circle in sorted(found) if circle]


def _reached(graph: dict[str, dict[str, list[str]]], start: str) -> set[str]:
    seen: set[str] = set()
    ahead = list(graph[start])
    while ahead:
        room = ahead.pop()
        if room not in seen:
            seen.add(room)
            ahead += graph[room]
    return seen


def main() -> None:
    """Print the rooms' arrows, and the counts that docs/architecture.md quotes."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("package", type=Path, nargs="*", default=[ROOT / "lion_models"])
    for package in parser.parse_args().package:
        graph = arrows(package)
        for room, targets in graph.items():
            print(f"{room:16} -> {', '.join(targets) or '-'}")
        files = [path for path in package.iterdir() if path.is_file()]
        count = sum(map(len, graph.values()))
        print(f"{package.name}: {len(files)} files at the root, {count} arrows between rooms")
        print(f"circles: {'; '.join(' <-> '.join(c) for c in circles(graph)) or 'none'}")


if __name__ == "__main__":
    main()
