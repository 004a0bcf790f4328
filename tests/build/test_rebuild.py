"""A change compiles what it touches and nothing else."""

from __future__ import annotations

import os
import re
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.support.environments import ROOT, build_wheel, run

sys.path.insert(0, str(ROOT / "build_backend"))
import graph

INCLUDE = re.compile(r'^\s*#include "([^"]+)"', re.MULTILINE)
COMPILATION = re.compile(r"compile (csrc/\S+) -> ")
HEADERS = (
    "cpu/isa.h",
    "cpu/masked_tile.h",
    "cpu/reductions.h",
    "cpu/simd.h",
    "cpu/step_work.h",
    "ops/anderson_step_binding.h",
    "ops/broyden_step.h",
    "ops/check.h",
    "ops/dtype.h",
    "ops/sparse_rows.h",
    "ops/tensor_checks.h",
    "ops/torch.h",
)


def includes(csrc: Path, source: Path) -> set[str]:
    """The headers of ours that a source reads, by looking for the word."""
    found: set[str] = set()
    left = [source]
    while left:
        named = INCLUDE.findall(left.pop().read_text())
        left += [csrc / name for name in named if name not in found]
        found.update(named)
    return found


def would_compile(tree: Path) -> Counter[str]:
    """How often each source would be compiled now; nothing is."""
    (folder,) = tree.glob("build/native*")
    program, _ = graph.find_ninja()
    done = run(program, "-n", "-f", folder.relative_to(tree) / "build.ninja", cwd=tree)
    assert done.returncode == 0, done.stdout
    return Counter(COMPILATION.findall(done.stdout))


@contextmanager
def touched(path: Path) -> Iterator[None]:
    before = path.stat()
    os.utime(path)
    yield
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def test_nothing_is_compiled_where_nothing_has_changed(tree, wheel):
    assert would_compile(tree) == Counter()
    began = time.time_ns()
    done = build_wheel(tree, DEQCORE_BUILD="cpu")
    assert done.returncode == 0, done.stdout
    assert COMPILATION.findall(done.stdout) == []
    made = [*tree.glob("build/native*/**/*.o"), *tree.glob("build/native*/*.so")]
    assert made
    assert [path for path in made if path.stat().st_mtime_ns > began] == []


@pytest.mark.parametrize("header", HEADERS)
def test_a_header_compiles_exactly_what_includes_it(header, tree, wheel):
    csrc = tree / "csrc"
    sources = [*csrc.glob("cpu/*.cpp"), *csrc.glob("*.cpp")]
    kernels = Counter(
        Path(p).name.split(".")[0] for p in tree.glob("build/native*/cpu/*_kernel.*.o")
    )
    expected = Counter(
        {
            path.relative_to(tree).as_posix(): kernels[path.stem] or 1
            for path in sources
            if header in includes(csrc, path)
        }
    )
    assert expected
    with touched(csrc / header):
        assert would_compile(tree) == expected


def test_a_source_compiles_itself_and_the_name_of_the_sources(tree, wheel):
    source = tree / "csrc/cpu/isa.cpp"
    source.write_text(source.read_text() + "\n")
    done = build_wheel(tree, DEQCORE_BUILD="cpu")
    assert sorted(COMPILATION.findall(done.stdout)) == ["csrc/cpu/isa.cpp", "csrc/sources.cpp"]


def test_what_does_not_compile_is_said_with_the_compilers_words(tree, wheel):
    source = tree / "csrc/cpu/isa.cpp"
    before = source.read_text()
    source.write_text(before + "\nthis is no C++\n")
    try:
        done = build_wheel(tree, DEQCORE_BUILD="cpu")
    finally:
        source.write_text(before)
    assert done.returncode != 0
    assert re.search(r"csrc/cpu/isa\.cpp:\d+:\d+: error: .*this", done.stdout)
    assert "DEQCORE_BUILD=none installs the library without them" in done.stdout
