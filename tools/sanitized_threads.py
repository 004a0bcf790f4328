"""Build the CPU kernels under ThreadSanitizer, and run every op on them with four threads.

    python tools/sanitized_threads.py            # prints what was run, or the report of a race

The portable kernels and their bindings, with parallel loops of their own
(tests/faults/sanitized/threads.cpp). What is built lands in build/sanitized, by content. Needs a
C++ compiler and its libtsan.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
OWN = ROOT / "tests" / "faults" / "sanitized"
BUILD = ROOT / "build" / "sanitized"
TORCH = Path(torch.__file__).parent
_COMMON = ["-std=c++20", "-O1", "-g1", "-fPIC", "-fsanitize=thread", "-fvisibility=hidden"]
_KERNEL = ["-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math", "-fopenmp-simd"]
_BINDING = [f"-isystem{TORCH / 'include'}", "-DTORCH_TARGET_VERSION=0x020b000000000000"]
_LINK = ["-shared", "-fsanitize=thread", "-Wl,-Bsymbolic", f"-L{TORCH / 'lib'}"]
_INCLUDE = re.compile(r'^#include "([^"]+)"', re.MULTILINE)
RACE = 66  # exit status


class UnavailableError(Exception):
    """Something to build or run them is missing here."""


def build(sources: Path = ROOT / "csrc") -> Path:
    """Compile the kernels of ``sources``, csrc or a copy of it, into a library.

    Raises:
        UnavailableError: no C++ compiler, or no ThreadSanitizer.
        subprocess.CalledProcessError: they do not compile.
    """
    compiler = _compiler()
    kernels = sorted(sources.glob("cpu/*_kernel.cpp"))
    others = [path for path in sorted(sources.glob("cpu/*.cpp")) if path not in kernels]
    objects = []
    for path in [*kernels, *others, OWN / "threads.cpp"]:
        flags = [*_KERNEL, "-DDEQCORE_ISA=portable"] if path in kernels else _BINDING
        objects.append(_compiled([*compiler, *_COMMON, *flags], path, sources))
    name = hashlib.sha256("".join(map(str, objects)).encode()).hexdigest()[:16]
    library = BUILD / f"{name}.so"
    if not library.exists():
        libraries = ["-ltorch_cpu", "-lc10"]
        _run([*compiler, *_LINK, *map(str, objects), *libraries, "-o", str(library)])
    return library


def _compiled(command: list[str], path: Path, sources: Path) -> Path:
    content = (torch.__version__, command, _contents(path, sources))
    key = hashlib.sha256(repr(content).encode()).hexdigest()[:16]
    target = BUILD / f"{path.stem}-{key}.o"
    if not target.exists():
        BUILD.mkdir(parents=True, exist_ok=True)
        partial = target.with_suffix(f".{os.getpid()}.part")
        launcher = ["ccache"] if shutil.which("ccache") else []
        include = ["-I.", "-include", os.path.relpath(OWN / "portable.h", sources)]
        file = os.path.relpath(path, sources)
        _run([*launcher, *command, *include, "-c", file, "-o", str(partial)], sources)
        partial.replace(target)
    return target


def _contents(path: Path, sources: Path) -> dict[str, str]:
    """Of a file and of all that it includes with quotes."""
    found: dict[str, str] = {}
    waiting = [path, OWN / "portable.h"]
    while waiting:
        file = waiting.pop()
        if file.name not in found and file.exists():
            found[file.name] = file.read_text()
            waiting += [sources / name for name in _INCLUDE.findall(found[file.name])]
    return dict(sorted(found.items()))


def _compiler() -> list[str]:
    words = shlex.split(os.environ.get("CXX", "c++"))
    if shutil.which(words[0]) is None:
        raise UnavailableError(f"no C++ compiler ({words[0]})")
    if not runtime().is_absolute():
        raise UnavailableError(f"{words[0]} has no libtsan.so")
    return words


def runtime() -> Path:
    """ThreadSanitizer's library, as the compiler finds it; a bare name where there is none."""
    words = shlex.split(os.environ.get("CXX", "c++"))
    done = subprocess.run([*words, "-print-file-name=libtsan.so"], capture_output=True, text=True)
    return Path(done.stdout.strip() or "libtsan.so")


def _run(command: list[str], folder: Path = ROOT) -> None:
    # ccache then knows a file again in another copy of the sources.
    environment = {**os.environ, "CCACHE_NOHASHDIR": "1", "CCACHE_BASEDIR": str(ROOT)}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    if done.returncode:
        sys.stderr.write(done.stderr)
        done.check_returncode()


def run(library: Path) -> subprocess.CompletedProcess[str]:
    """The ops of ``library`` in a process under ThreadSanitizer; its status is RACE after one."""
    options = f"exitcode={RACE} halt_on_error=1 ignore_noninstrumented_modules=1"
    environment = {
        **os.environ,
        "LD_PRELOAD": str(runtime().resolve()),
        "TSAN_OPTIONS": options,
        "DEQCORE_KERNELS": "reference",  # the library's take their place
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(ROOT),
    }
    # Addresses at random may be where ThreadSanitizer wants to be.
    fixed = ["setarch", "-R"] if shutil.which("setarch") else []
    command = [*fixed, sys.executable, "-m", "tests.faults.sanitized.run_ops", str(library)]
    return subprocess.run(command, capture_output=True, text=True, env=environment, cwd=ROOT)


def main() -> None:
    argparse.ArgumentParser(description=__doc__.splitlines()[0]).parse_args()
    try:
        library = build()
    except UnavailableError as reason:
        raise SystemExit(f"not run: {reason}") from None
    done = run(library)
    print(done.stdout + done.stderr)
    raise SystemExit(done.returncode)


if __name__ == "__main__":
    main()
