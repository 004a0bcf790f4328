"""The pages that people read, and the code blocks in them."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import re
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

ROOT = Path(__file__).parents[2]
PAGES = sorted(
    path.relative_to(ROOT).as_posix()
    for path in (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *ROOT.glob("docs/**/*.md"))
)

# A fence with its language, and the comment above it that says what it does not go without.
_FENCE = re.compile(
    r"^(?:<!-- needs: (?P<needs>[^\n]+?) -->\n)?"
    r"(?P<indent> *)```(?P<language>\w*)[^\n]*\n(?P<body>.*?)^(?P=indent)```$",
    flags=re.DOTALL | re.MULTILINE,
)
_INDENTED = re.compile(r"(?:(?<=\n\n)|(?<=:\n))(?: {4}[^\n]*\n)+")


@dataclass(frozen=True)
class Block:
    """A fenced block: its code, its page's line, and the output that the page shows below it."""

    language: str
    code: str
    line: int
    needs: tuple[str, ...] = ()
    output: str | None = None


def text(page: str) -> str:
    return (ROOT / page).read_text(encoding="utf-8")


def fenced(page: str) -> list[Block]:
    """All fenced blocks of a page; a ``text`` block right below Python is its output."""
    source = text(page)
    blocks: list[Block] = []
    end = 0
    for match in _FENCE.finditer(source):
        body = textwrap.dedent(match["body"])
        if match["language"] == "text" and blocks and not source[end : match.start()].strip():
            last = blocks.pop()
            blocks.append(Block(last.language, last.code, last.line, last.needs, body))
        else:
            needs = tuple(re.split(r",\s*", match["needs"])) if match["needs"] else ()
            line = source.count("\n", 0, match.start("body")) + 1
            blocks.append(Block(match["language"], body, line, needs))
        end = match.end()
    return blocks


def shell_lines(page: str) -> list[str]:
    """The commands of fenced shell blocks and of indented blocks, one a line, without comments."""
    bodies = [block.code for block in fenced(page) if block.language in ("", "sh", "bash")]
    bodies += [textwrap.dedent(found) for found in _INDENTED.findall(_FENCE.sub("", text(page)))]
    lines = "\n".join(bodies).replace("\\\n", " ").splitlines()
    return [stripped for line in lines if (stripped := re.sub(r"(^|\s)#.*", "", line).strip())]


def is_there(need: str) -> bool:
    """Whether this machine has what a block needs: a GPU, or a package."""
    if need == "gpu":
        return torch.cuda.is_available()
    return need != "network" and importlib.util.find_spec(need) is not None


def run_python(page: str) -> Iterator[tuple[Block, str]]:
    """Run a page's Python from top to bottom, in one namespace: each block, and what it printed.

    A block that needs what is not here is compiled alone. Tracebacks have the page's lines.
    """
    names: dict[str, object] = {"__name__": "__main__"}
    for block in fenced(page):
        if block.language != "python":
            continue
        code = compile("\n" * (block.line - 1) + block.code, str(ROOT / page), "exec")
        if all(map(is_there, block.needs)):
            with contextlib.redirect_stdout(io.StringIO()) as printed:
                exec(code, names)
            yield block, printed.getvalue()
