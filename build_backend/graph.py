"""What is compiled and linked, as a build.ninja; ninja decides what has changed, and the order.

A compilation writes down the headers that it read (a depfile), so that a change of one compiles
what includes it and nothing else; a change of a command compiles what it makes. Paths are relative
to the root of the sources, where ninja runs.
"""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence
from io import StringIO
from pathlib import Path

from toolchain import UnavailableError


class Graph:
    """A build.ninja in ``folder``, below which all that it makes lies.

    Raises:
        UnavailableError: ninja, or its Python package, is not installed.
    """

    def __init__(self, folder: Path) -> None:
        self._program, writer = find_ninja()
        self.folder = folder
        self._text = StringIO()
        self._ninja = writer(self._text, width=1 << 20)
        self._ninja.variable("builddir", folder.as_posix())  # of ninja's own records
        # -MD, not -MMD: another torch or compiler in the same place must be noticed too.
        compilation = "$call -MD -MF $out.d -c $in -o $out"
        read = {"depfile": "$out.d", "deps": "gcc"}
        self._ninja.rule("compile", compilation, description="compile $in -> $out", **read)
        said = f"{compilation} > $out.txt 2>&1 || {{ cat $out.txt; false; }}"
        self._ninja.rule("compile_and_keep_report", said, description="compile $out", **read)
        self._ninja.rule("link", "$call $in $libraries -o $out", description="link $out")

    def compile(
        self, source: Path, name: str, command: Sequence[str], keep_report: bool = False
    ) -> str:
        """Make the object ``name`` of ``source``; its path.

        With ``keep_report`` what the compiler says goes to a file beside it, .txt.
        """
        target = (self.folder / name).as_posix()
        rule = "compile_and_keep_report" if keep_report else "compile"
        self._ninja.build(target, rule, source.as_posix(), variables={"call": _quoted(command)})
        return target

    def link(
        self, objects: Sequence[str], name: str, command: Sequence[str], libraries: Sequence[str]
    ) -> str:
        """Make ``name`` of the objects in their order, which decides whose functions are kept."""
        target = (self.folder / name).as_posix()
        variables = {"call": _quoted(command), "libraries": _quoted(libraries)}
        self._ninja.build(target, "link", list(objects), variables=variables)
        return target

    def build(self, root: Path, jobs: int | None = None, keep_going: bool = False) -> bool:
        """Bring everything up to date; False if a command failed, which has then been said."""
        file = root / self.folder / "build.ninja"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(self._text.getvalue())
        options = ["-j", str(jobs)] if jobs else []
        if keep_going:
            options += ["-k", "0"]
        command = [self._program, "-f", (self.folder / "build.ninja").as_posix(), *options]
        sys.stdout.flush()
        done = subprocess.run(
            command,
            cwd=root,
            check=False,
            # By ccache's own rule nvcc's objects are of one folder, though none of ours names it.
            env={**os.environ, "NINJA_STATUS": "deqcore: [%f/%t] ", "CCACHE_NOHASHDIR": "1"},
        )
        return done.returncode == 0


def _quoted(words: Sequence[str]) -> str:
    return shlex.join(words).replace("$", "$$")


def find_ninja() -> tuple[str, type]:
    """The program, and what writes its files: both are in the package of that name."""
    try:
        import ninja
    except ImportError:
        raise UnavailableError("ninja is not installed (pip install ninja)") from None
    # Where it was found is not always where this interpreter has its programs: an isolated build
    # sees the packages of another environment, and `pip install --target` makes a bin of its own.
    site = Path(ninja.__file__).parents[1]
    folders = [ninja.BIN_DIR, site / "bin", *(path / "bin" for path in site.parents[:3])]
    path = os.pathsep.join(map(str, filter(None, folders)))
    program = shutil.which("ninja", path=path) or shutil.which("ninja")
    if program is None:
        raise UnavailableError(
            f"the package ninja is in {site}, but its program is not found there or on PATH "
            "(pip install --force-reinstall ninja)"
        )
    return program, ninja.Writer
