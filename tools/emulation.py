"""Build the CUDA kernels as host code, against the emulation header, and run steps on them.

    python tools/emulation.py            # build everything and say where it is

Needs a C++ compiler and nothing of CUDA. What is built lands in build/emulation, by content.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import dataclasses
import fcntl
import hashlib
import os
import re
import shlex
import shutil
import struct
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parents[1]
KERNELS = (
    "cuda/anderson_cluster.cu",
    "cuda/anderson_step.cu",
    "cuda/broyden_cluster.cu",
    "cuda/broyden_step.cu",
    "cuda/masked_dense.cu",
    "cuda/masked_linear.cu",
    "cuda/masked_linear_blocks.cu",
    "cuda/masked_linear_gather.cu",
    "cuda/masked_linear_groups.cu",
    "cuda/masked_linear_strips.cu",
    "cuda/masked_outer.cu",
    "cuda/masked_outer_blocks.cu",
    "cuda/masked_outer_segments.cu",
    "cuda/masked_outer_strips.cu",
)
RUNTIME = ("emulation/contexts.cpp", "emulation/cuda_emulation.cpp", "emulation/sectors.cpp")
# Rounding as the kernels ask for it and no other, so that a failure says something about them.
FLAGS = [
    *["-std=c++20", "-g1", "-fPIC", "-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas"],
    *["-ffp-contract=off", "-fno-omit-frame-pointer"],
]
PATHS = {"warp": 0, "block": 1, "split": 2, "cluster": 3}
# Of the masked matmuls, by op.
MASKED_PATHS = {
    "masked_linear": {
        "large": 0,
        "medium": 1,
        "few": 2,
        "blocks": 3,
        "few_blocks": 4,
        "groups": 5,
        "gather": 6,
        "tiles": 7,
        "small_tiles": 8,
    },
    "masked_outer": {"many": 0, "few": 1, "blocks": 2, "segments": 3, "tiles": 4},
    "masked_to_dense": {"only": 0},
    "masked_from_dense": {"only": 0},
}
# The op's tensors in the order in which emulate.cpp reads them.
_ORDER = {
    "anderson_step": [0, 1, 2, 3, 4, 5, 6, 11, 12, 7, 8, 9, 10],
    "broyden_step": [0, 1, 2, 3, 4, 5, 10, 11, 6, 7, 8, 9],
}
_INCLUDE = re.compile(r'^#include "([^"]+)"', re.MULTILINE)
TYPES = {torch.float64: 0, torch.float32: 1, torch.bfloat16: 2, torch.float16: 3}


@dataclasses.dataclass(frozen=True)
class Flavour:
    """How the kernels are built: a library for tests, or a program under a sanitizer."""

    kernel_flags: tuple[str, ...] = ()
    runtime_flags: tuple[str, ...] = ()
    link_flags: tuple[str, ...] = ()
    program: bool = True
    bindings: bool = False  # with csrc/cuda/*.cpp and LibTorch, in place of the C interface


# Sanitizers' builds are not optimised: they take longer to make than to run.
_ADDRESS = ("-O0", "-fsanitize=address,undefined", "-fno-sanitize-recover=all")
_THREAD = ("-O0", "-fsanitize=thread")
_SECTORS = "-DEMULATION_SECTORS"
_TORCH = Path(torch.__file__).parent
_TORCH_LIBRARIES = (f"-L{_TORCH / 'lib'}", "-ltorch_cpu", "-lc10")
# As build_backend/native.py has it: the oldest torch whose ABI is used, and nothing exported.
_BINDING = (
    *("-O1", "-fvisibility=hidden", "-DTORCH_TARGET_VERSION=0x020b000000000000"),
    *("-DEMULATION_BINDINGS", f"-isystem{_TORCH / 'include'}"),
)
FLAVOURS = {
    "library": Flavour(("-O2",), ("-O2",), link_flags=("-shared",), program=False),
    "bindings": Flavour(
        ("-O2",), ("-O2",), ("-shared", *_TORCH_LIBRARIES), program=False, bindings=True
    ),
    "address": Flavour(_ADDRESS, (*_ADDRESS, "-DEMULATION_ASAN"), _ADDRESS),
    # The scheduler is not instrumented: it tells ThreadSanitizer about the kernel's barriers.
    "thread": Flavour(_THREAD, ("-O2", "-DEMULATION_TSAN"), _THREAD),
    # Each access as the source has it, announced as to ThreadSanitizer: csrc/emulation/sectors.h.
    "sectors": Flavour(
        ("-O0", "-fsanitize=thread", _SECTORS), ("-O2", _SECTORS), ("-shared",), program=False
    ),
}


class CompilerMissingError(Exception):
    """There is no C++ compiler here."""


def build(
    flavour: str, sources: Path = ROOT / "csrc", folder: Path | None = None, op: str = ""
) -> Path:
    """Compile the kernels of ``sources``, csrc or a copy of it, unless that was done before.

    Of a copy, the kernels of ``op`` alone are compiled, if it is given: the others stay csrc's.

    Raises:
        CompilerMissingError: no C++ compiler.
        subprocess.CalledProcessError: the kernels do not compile.
    """
    how = FLAVOURS[flavour]
    compiler = _compiler()
    folder = folder or ROOT / "build" / "emulation"
    target = folder / f"{flavour}-{op}{_fingerprint(sources, compiler, how)}"
    folder.mkdir(parents=True, exist_ok=True)
    kept = ROOT / "build" / "emulation" / "objects"
    kept.mkdir(parents=True, exist_ok=True)
    with (
        _one_at_a_time(folder / f"{flavour}.lock"),
        tempfile.TemporaryDirectory(dir=folder) as scratch,
    ):
        if target.exists():
            return target
        objects: list[Path] = []
        commands: list[tuple[list[str], Path, Path]] = []
        program = ["-DEMULATION_PROGRAM"] if how.program else []
        # What is changed comes first: of an inline function, the linker keeps the first copy.
        own = [name for name in KERNELS if name.startswith(f"cuda/{op.removesuffix('_step')}")]
        others = [name for name in KERNELS if name not in own]
        for name in (*own, *others, *_callers(how, sources), *RUNTIME):
            tree = ROOT / "csrc" if name in others else sources
            flags = how.runtime_flags if name in RUNTIME else how.kernel_flags
            if how.bindings and name.endswith(".cpp") and name not in RUNTIME:
                flags = _BINDING
            language = ["-x", "c++"] if name.endswith(".cu") else []
            options = [*FLAGS, *flags, *program, f"-I{tree.name}", *language]
            command = [*compiler, *options, "-c", f"{tree.name}/{name}"]
            # By content, so that a copy of the sources with one change compiles what has changed.
            content = (torch.__version__, command, _contents(tree, name))
            key = hashlib.sha256(repr(content).encode()).hexdigest()
            objects.append(kept / f"{Path(name).stem}-{key[:16]}.o")
            if not objects[-1].exists():
                commands.append((command, objects[-1], tree.parent))

        def compile_one(work: tuple[list[str], Path, Path]) -> None:
            _compile(*work)

        with ThreadPoolExecutor(_processors()) as pool:
            list(pool.map(compile_one, commands))
        made = Path(scratch) / "made"
        link = [*compiler, *map(str, objects), *how.link_flags, *_extra_link_flags()]
        _run([*link, "-o", str(made)], sources.parent)
        made.replace(target)
    return target


@contextlib.contextmanager
def _one_at_a_time(lock: Path) -> Iterator[None]:
    """Test workers that build the same wait for the first of them."""
    with lock.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _callers(how: Flavour, sources: Path) -> list[str]:
    """The sources by which the kernels are called."""
    if not how.bindings:
        return ["emulation/emulate.cpp"]
    bindings = sorted(path.name for path in (sources / "cuda").glob("*.cpp"))
    return [*(f"cuda/{name}" for name in bindings), "emulation/bindings.cpp"]


def _compiler() -> list[str]:
    words = shlex.split(os.environ.get("CXX", "c++"))
    if shutil.which(words[0]) is None:
        raise CompilerMissingError(f"no C++ compiler ({words[0]})")
    return ["ccache", *words] if shutil.which("ccache") and "ccache" not in words[0] else words


def _extra_link_flags() -> list[str]:
    return shlex.split(os.environ.get("LDFLAGS", ""))


def _processors() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 1


def _fingerprint(sources: Path, compiler: list[str], how: Flavour) -> str:
    asked = (torch.__version__, compiler, FLAGS, how, _BINDING, _extra_link_flags())
    digest = hashlib.sha256(repr(asked).encode())
    for part in ("cuda", "ops", "emulation"):
        for path in sorted((sources / part).iterdir()):
            digest.update(path.name.encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:16]


def _contents(sources: Path, name: str) -> dict[str, str]:
    """A source and every file of ours that it includes, by name."""
    contents: dict[str, str] = {}
    names = [name]
    while names:
        name = names.pop()
        if name in contents:
            continue
        contents[name] = (sources / name).read_text()
        names += [n for n in _INCLUDE.findall(contents[name]) if (sources / n).exists()]
    return dict(sorted(contents.items()))


def _compile(command: Sequence[str], target: Path, folder: Path) -> None:
    with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
        made = Path(scratch) / target.name
        _run([*command, "-o", str(made)], folder)
        made.replace(target)


def _run(command: Sequence[str], folder: Path) -> None:
    # ccache then knows a file again in a copy of the sources.
    environment = {**os.environ, "CCACHE_NOHASHDIR": "1", "CCACHE_BASEDIR": str(ROOT)}
    done = subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, check=False
    )
    if done.returncode:
        sys.stderr.write(done.stderr)
    done.check_returncode()


@dataclasses.dataclass
class Traffic:
    """What a step did: kernel launches, and bytes of state moved."""

    launches: int
    read: int
    read_again: int  # by the thread that has just read or written them: from a cache
    written: int
    blocks: int


class EmulationError(Exception):
    """A kernel did what a GPU would not forgive: a deadlock, a bad mask, a thread that left."""


class Emulator:
    """The kernels in this process; ``traffic`` is what the last call did."""

    def __init__(self, library: Path) -> None:
        self.library = library
        self._library = ctypes.CDLL(str(library))
        self._library.emulate.restype = ctypes.c_char_p
        self.traffic = Traffic(0, 0, 0, 0, 0)

    @contextlib.contextmanager
    def clusters_of(self, blocks: int) -> Iterator[None]:
        """For a time, a cluster can have no more blocks than that."""
        self._library.emulate_largest_cluster(blocks)
        try:
            yield
        finally:
            self._library.emulate_largest_cluster(16)

    def step(self, op: str, path: str, seed: int = 1) -> Callable[..., Traffic]:
        """The op ``deqcore::<op>`` on one of its paths, with threads in a random order."""

        def run(*args: Tensor) -> Traffic:
            return self.run(op, seed, *_arguments(op, path, args))

        return run

    def masked(self, op: str, path: str, seed: int = 1) -> Callable[..., Tensor]:
        """``deqcore::masked_linear`` or ``masked_outer`` on one of its paths."""

        def run(*args: Any) -> Tensor:
            out, pointers, ints = masked_arguments(op, path, *args)
            self.run(op, seed, pointers, ints, [])
            return out

        return run

    def run(
        self,
        op: str,
        seed: int,
        pointers: Sequence[Tensor | None],
        ints: Sequence[int],
        doubles: Sequence[float],
    ) -> Traffic:
        """One case with arguments as csrc/emulation/emulate.cpp reads them."""
        addresses = [0 if t is None else t.data_ptr() for t in pointers]
        message = self._library.emulate(
            op.encode(),
            ctypes.c_uint64(seed),
            (ctypes.c_void_p * len(addresses))(*addresses),
            (ctypes.c_int64 * len(ints))(*ints),
            (ctypes.c_double * len(doubles))(*doubles),
        )
        if message:
            raise EmulationError(message.decode())
        counts = (ctypes.c_int64 * len(dataclasses.fields(Traffic)))()
        self._library.emulate_statistics(counts)
        self.traffic = Traffic(*counts)
        return self.traffic


def run_program(
    program: Path, op: str, path: str, args: Sequence[Tensor], seeds: Sequence[int]
) -> tuple[subprocess.CompletedProcess[str], list[list[Tensor | None]]]:
    """One case in a process of its own, once for each seed: what it said, and its tensors after.

    The tensors come in the order of the arguments, None where the kernels get none.
    """
    pointers, ints, doubles = _arguments(op, path, args)
    done, results = run_case(program, op, pointers, ints, doubles, seeds)
    ordered = []
    for result in results:
        tensors: list[Tensor | None] = [None] * len(result)
        for index, tensor in zip(_ORDER[op], result, strict=True):
            tensors[index] = tensor
        ordered.append(tensors)
    return done, ordered


def run_case(
    program: Path,
    op: str,
    pointers: Sequence[Tensor | None],
    ints: Sequence[int],
    doubles: Sequence[float],
    seeds: Sequence[int],
) -> tuple[subprocess.CompletedProcess[str], list[list[Tensor | None]]]:
    """The same for arguments as csrc/emulation/emulate.cpp reads them."""
    case = bytearray()
    case += struct.pack("q", len(op)) + op.encode() + struct.pack("q", len(pointers))
    for tensor in pointers:
        if tensor is None:
            case += struct.pack("q", -1)
            continue
        content = _bytes(tensor)
        case += struct.pack("q", len(content)) + content
    case += struct.pack(f"q{len(ints)}q", len(ints), *ints)
    case += struct.pack(f"q{len(doubles)}d", len(doubles), *doubles)
    with tempfile.TemporaryDirectory() as folder:
        source, result = Path(folder) / "case", Path(folder) / "result"
        source.write_bytes(case)
        command = [*_without_random_addresses(), str(program), str(source), str(result)]
        done = subprocess.run(
            [*command, *map(str, seeds)],
            capture_output=True,
            text=True,
            check=False,
            env={**os.environ, "TSAN_OPTIONS": "halt_on_error=1", "ASAN_OPTIONS": "detect_leaks=0"},
        )
        content = result.read_bytes() if done.returncode == 0 else b""
    return done, _results(pointers, content)


def _results(pointers: Sequence[Tensor | None], content: bytes) -> list[list[Tensor | None]]:
    results, at = [], 0
    while at < len(content):
        tensors: list[Tensor | None] = []
        for tensor in pointers:
            if tensor is None:
                tensors.append(None)
                continue
            size = tensor.numel() * tensor.element_size()
            flat = torch.frombuffer(bytearray(content[at : at + size] or b"\0"), dtype=torch.uint8)
            tensors.append(flat[:size].view(tensor.dtype).reshape(tensor.shape))
            at += size
        results.append(tensors)
    return results


def _without_random_addresses() -> list[str]:
    """ThreadSanitizer's shadow memory does not fit every layout that newer kernels pick."""
    return ["setarch", "-R"] if shutil.which("setarch") else []


def _bytes(tensor: Tensor) -> bytes:
    return bytes(tensor.contiguous().flatten().view(torch.uint8).numpy())


def _arguments(
    op: str, path: str, args: Sequence[Tensor]
) -> tuple[list[Tensor | None], list[int], list[float]]:
    """The op's arguments as csrc/emulation/emulate.cpp reads them."""
    # Here, because the rest of this file is run where deqcore is not installed.
    from deqcore.ops._library import unpack_numbers
    from deqcore.ops.anderson_step import AndersonNumbers
    from deqcore.ops.broyden_step import BroydenNumbers

    tensors: list[Tensor | None] = list(args[:-1])
    x, f, damping, ring = args[:4]
    for tensor in tensors:
        assert tensor is not None
        assert tensor.is_contiguous()
        assert tensor.device.type == "cpu"
    batch, slots, dim = ring.shape
    head = [TYPES[f.dtype], PATHS[path], batch, dim]
    if op == "anderson_step":
        best, z_next = 6, 12
        mixing = unpack_numbers(AndersonNumbers, args[-1])
        limits = mixing.limits
        counts = [limits.patience, limits.max_steps, mixing.start, mixing.restart]
        ints = [*head, slots, len(damping), *counts]
        doubles = [limits.rtol, limits.atol, mixing.ridge, mixing.safeguard, mixing.max_weight]
        if not args[best].shape[1]:
            tensors[best] = None
    else:
        z_next = 11
        narrow = int(ring.dtype != x.dtype)
        limits, memory = unpack_numbers(BroydenNumbers, args[-1])
        ints = [*head, slots, memory, len(damping), limits.patience, limits.max_steps, narrow]
        doubles = [limits.rtol, limits.atol]
    if f.dtype == x.dtype:
        tensors[z_next] = None
    return [tensors[i] for i in _ORDER[op]], [int(n) for n in ints], doubles


def masked_arguments(
    op: str, path: str, *args: Any
) -> tuple[Tensor, list[Tensor | None], list[int]]:
    """The op's result, to be written, and its arguments as emulate.cpp reads them."""
    first = args[0]
    transposed = False
    tokens: list[int] = [len(first)]
    if op == "masked_linear":
        _, values, pattern, bias, rows, columns, block, transposed, _ = args
        shape: tuple[int, ...] = (len(first), columns if transposed else rows)
        operands = [first, values, bias]
    elif op == "masked_outer":
        _, right, pattern, rows, columns, block = args
        shape = (_kept(pattern, rows, columns),)
        operands = [first, right]
    else:
        pattern, block, tokens = args[1], 1, []
        rows, columns = args[2:] if op == "masked_to_dense" else first.shape
        shape = (rows, columns) if op == "masked_to_dense" else (_kept(pattern, rows, columns),)
        operands = [first]
    out = first.new_empty(shape)
    head = [TYPES[first.dtype], MASKED_PATHS[op][path]]
    entries, sizes = _entries(pattern, rows, columns, transposed)
    pointers = [None if t is None else t.contiguous() for t in [*operands, out, *entries]]
    return out, pointers, [*head, *sizes, block, *tokens]


def _kept(pattern: Tensor, rows: int, columns: int) -> int:
    return (len(pattern) - rows - columns - 2) // 3


def _entries(
    pattern: Tensor, rows: int, columns: int, transposed: bool
) -> tuple[list[Tensor | None], list[int]]:
    """Offsets, columns and positions of the kept entries; then rows, columns and their number."""
    kept = _kept(pattern, rows, columns)
    by_row, by_column = pattern.split([rows + 1 + kept, columns + 1 + 2 * kept])
    if transposed:
        return list(by_column.split([columns + 1, kept, kept])), [columns, rows, kept]
    return [*by_row.split([rows + 1, kept]), None], [rows, columns, kept]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--only", choices=FLAVOURS, help="build this one")
    chosen = parser.parse_args().only
    for flavour in [chosen] if chosen else FLAVOURS:
        print(f"{flavour}: {build(flavour)}")


if __name__ == "__main__":
    main()
