"""Errors where libstdc++ is linked into the extension, and what makes them safe there."""

from __future__ import annotations

import importlib.util
import re
import shutil
import sys
from pathlib import Path

import pytest

from tests.support.environments import ROOT, run

STREAM = re.compile(
    r"\b[a-z]*[iso]stream\b|stringstream|<iomanip>|\bstd::c(out|err|log)\b"
    r'|TORCH_CHECK|<<\s*"|"\s*<<'
)


def code(path: Path) -> list[str]:
    """The lines of a source, without comments and, in ops/torch.h, the checks that it replaces."""
    lines = re.sub("//.*", "", path.read_text()).splitlines()
    replaced = re.compile("#(undef|define) STD_TORCH_CHECK")
    return [line for line in lines if path.name != "torch.h" or not replaced.match(line)]


def test_no_source_writes_into_a_stream_or_includes_what_may() -> None:
    """ops/torch.h is the one file that includes torch, and leaves none of its streams."""
    for path in (ROOT / "csrc").rglob("*.*"):
        lines = code(path)
        assert [line for line in lines if STREAM.search(line)] == [], path
        included = [
            line for line in lines if re.match("#include <torch/(?!headeronly/version)", line)
        ]
        assert included == [] or path.match("csrc/ops/torch.h"), path


@pytest.mark.skipif(shutil.which("nm") is None, reason="binutils are not installed")
@pytest.mark.parametrize("name", ["_C", "_cuda"])
def test_no_stream_is_left_in_the_extension(name: str) -> None:
    found = importlib.util.find_spec(f"deqcore.{name}")
    if found is None or found.origin is None:
        pytest.skip(f"deqcore.{name} is not built")
    symbols = run("nm", "-DC", found.origin, cwd=ROOT).stdout.splitlines()
    assert any("std::runtime_error" in symbol for symbol in symbols)
    assert [symbol for symbol in symbols if re.search("stream|stringbuf", symbol)] == []


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere there is one libstdc++, or none")
def test_every_error_is_whole_where_libstdcxx_is_linked_into_the_extension(
    tree: Path, wheel: Path, tmp_path: Path
) -> None:
    """Its streams then have no facet for numbers: one in a message would end it, or the process."""
    copy = tmp_path / "tree"
    shutil.copytree(tree, copy)
    options = {"DEQCORE_BUILD": "cpu", "LDFLAGS": "-static-libstdc++"}
    done = run(sys.executable, "setup.py", "build_ext", "--inplace", cwd=copy, **options)
    assert done.returncode == 0, done.stdout
    assert "] compile" not in done.stdout, "the objects of the wheel's build are reused"
    (extension,) = copy.glob("deqcore/_C.*.so")
    assert b"libstdc++.so" not in extension.read_bytes()

    # The emulated bindings are linked like that, too, of objects that this tree has or will have.
    emulation = ROOT / "build" / "emulation"
    emulation.mkdir(parents=True, exist_ok=True)
    (copy / "build" / "emulation").symlink_to(emulation)
    tests = ("-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/ops/test_errors.py")
    done = run(sys.executable, *tests, cwd=copy, DEQCORE_KERNELS="require", **options)
    assert done.returncode == 0, done.stdout
    assert re.search(r"^[1-9]\d* passed in ", done.stdout, re.MULTILINE), done.stdout
    done = run(sys.executable, "-c", "import deqcore", cwd=copy, DEQCORE_CPU_ISA="avx1024")
    assert "DEQCORE_CPU_ISA=avx1024 is unknown; use portable" in done.stdout
