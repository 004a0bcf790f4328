"""How much of each sector of global memory the CUDA kernels use, counted without a GPU.

    python tools/sectors.py              # every kernel, loads and stores, as a GPU's counters
    python tools/sectors.py --places     # and each place in the sources that moves much of it
    python tools/sectors.py --only blocks

A GPU moves 32 bytes at a time (a sector). For each request of a warp the emulation counts the
sectors it touches and the bytes that its lanes use of them; 32 of 32 is the best there is. Loads
into registers and copies into shared memory (cp.async) are apart, as in a GPU's counters
(op_ld and op_ldgsts). What nvcc takes apart into smaller accesses, tools/cuda_build.py shows.
"""

from __future__ import annotations

import argparse
import ctypes
import re
import subprocess
import sys
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from tests.support.masked_cases import arguments
from tests.support.masked_cases import make as masked_case
from tests.support.step_cases import anderson_case, broyden_case, full_rows
from tools.emulation import MASKED_PATHS, PATHS, Emulator, Traffic, build

KINDS = ("load", "store", "copy")
# The tensors of an op in the order in which emulate.cpp reads them.
_ROWS = ("status", "counters", "residuals", "remaining")
_ENTRIES = ("offsets", "columns", "position")
BY_BLOCKS = ("blocks", "few_blocks", "groups", "segments")  # paths
POINTERS = {
    "anderson_step": (
        *("x", "f", "damping", "g_ring", "h_ring", "gram", "best", "x_next", "z_next"),
        *_ROWS,
    ),
    "broyden_step": ("x", "f", "damping", "s_ring", "gram", "best", "x_next", "z_next", *_ROWS),
    "masked_linear": ("x", "values", "bias", "y", *_ENTRIES),
    "masked_outer": ("left", "right", "values", *_ENTRIES),
    "masked_to_dense": ("values", "dense", *_ENTRIES),
    "masked_from_dense": ("dense", "values", *_ENTRIES),
}
DTYPES = {torch.float32: "fp32", torch.bfloat16: "bf16"}
HOT = 0.02  # share of a kernel's sectors from which on a place matters
_SERVANTS = re.compile(r"(/pack\.cuh|/async_copy\.cuh|/hopper\.cuh|/emulation/.*):")
_ARRIVES = re.compile(r"/(async_copy|hopper)\.cuh:")  # a copy, counted when it was asked for
_LAUNCH = re.compile(r"::launch\w*<")


@dataclass(frozen=True)
class Place:
    """Where a kernel moves something, and of what kind that is."""

    kernel: str  # without its template's arguments
    kind: str  # one of KINDS
    tensor: str  # by its name in emulate.cpp, or "workspace"
    line: str  # file:line
    text: str  # what the source says there


@dataclass
class Count:
    requests: int = 0
    sectors: int = 0
    used: int = 0  # bytes

    @property
    def of_32(self) -> float:
        """Bytes used of a sector, on average."""
        return self.used / self.sectors

    def __iadd__(self, other: Count) -> Count:
        self.requests += other.requests
        self.sectors += other.sectors
        self.used += other.used
        return self


class SectorCounter(Emulator):
    """The kernels in this process, and what the warps of the last call did, in ``counts``."""

    def __init__(self, library: Path) -> None:
        super().__init__(library)
        self._names: dict[int, tuple[str, str]] = {}
        self._library.emulate_sectors.restype = ctypes.c_int64
        self.counts: dict[Place, Count] = {}

    def run(
        self,
        op: str,
        seed: int,
        pointers: Sequence[Tensor | None],
        ints: Sequence[int],
        doubles: Sequence[float],
    ) -> Traffic:
        self._library.emulate_forget()
        for tensor in pointers:
            size = 0 if tensor is None else tensor.numel() * tensor.element_size()
            address = None if tensor is None else tensor.data_ptr()
            self._library.emulate_watch(ctypes.c_void_p(address), ctypes.c_int64(size))
        traffic = super().run(op, seed, pointers, ints, doubles)
        self.counts = self._collect((*POINTERS[op], "workspace"))
        return traffic

    def _collect(self, tensors: Sequence[str]) -> dict[Place, Count]:
        room = self._library.emulate_sectors(None, ctypes.c_int64(0))
        numbers = (ctypes.c_int64 * room)()
        self._library.emulate_sectors(numbers, ctypes.c_int64(room))
        sites = list(_sites(list(numbers)))
        self._look_up({code for *_, codes in sites for code in codes})
        counts: dict[Place, Count] = defaultdict(Count)
        for kind, tensor, count, codes in sites:
            if kind == "copy" or not _ARRIVES.search(self._names[codes[0]][1]):
                counts[self._place(kind, tensors[tensor], codes)] += count
        return dict(counts)

    def _look_up(self, codes: Iterable[int]) -> None:
        unknown = sorted(set(codes) - self._names.keys())
        if not unknown:
            return
        # What returns to an address was called from before it.
        text = "\n".join(hex(code - 1) for code in unknown)
        command = ["addr2line", "-f", "-C", "-e", str(self.library)]
        done = subprocess.run(command, input=text, capture_output=True, text=True, check=True)
        lines = done.stdout.splitlines()
        self._names |= dict(zip(unknown, zip(lines[::2], lines[1::2], strict=True), strict=True))

    def _place(self, kind: str, tensor: str, codes: Sequence[int]) -> Place:
        frames = [self._names[code] for code in codes]  # innermost first
        launch = next(i for i, (name, _) in enumerate(frames) if _LAUNCH.search(name))
        own = frames[:launch]
        line = next((line for _, line in own if not _SERVANTS.search(line)), own[-1][1])
        path, number = line.split(" ")[0].rsplit(":", 1)
        name = path.split("csrc/")[-1]
        text = (ROOT / "csrc" / name).read_text().splitlines()[int(number) - 1].strip()
        return Place(_short(own[-1][0]), kind, tensor, f"{name}:{number}", text)


def _sites(numbers: list[int]) -> Iterator[tuple[str, int, Count, list[int]]]:
    at = 0
    while at < len(numbers):
        kind, tensor, requests, sectors, used, depth = numbers[at : at + 6]
        at += 6 + depth
        if requests:
            yield KINDS[kind], tensor, Count(requests, sectors, used), numbers[at - depth : at]


def _short(name: str) -> str:
    """A function's name without namespaces, template's arguments and parameters."""
    name = name.replace("(anonymous namespace)::", "")
    while (shorter := re.sub(r"<[^<>]*>", "", name)) != name:
        name = shorter
    return name.split("(")[0].split(" ")[-1].rsplit("::", 1)[-1]


def by_kernel(counts: dict[Place, Count]) -> dict[tuple[str, str], Count]:
    """Sums for each kernel and kind, as a GPU's counters give them."""
    sums: dict[tuple[str, str], Count] = defaultdict(Count)
    for place, count in counts.items():
        sums[place.kernel, place.kind] += count
    return dict(sums)


def hot_places(counts: dict[Place, Count]) -> dict[Place, Count]:
    """The places that move at least the share HOT of their kernel's sectors."""
    moved: dict[str, int] = defaultdict(int)
    for place, count in counts.items():
        moved[place.kernel] += count.sectors
    return {p: c for p, c in counts.items() if c.sectors >= HOT * moved[p.kernel]}


def cases() -> dict[str, Callable[[SectorCounter], Any]]:
    """Each op on each path, by name: small, and of the kind that the path is for."""
    return _steps() | _products()


def _steps() -> dict[str, Callable[[SectorCounter], Any]]:
    found: dict[str, Callable[[SectorCounter], Any]] = {}
    for path in PATHS:
        for dtype, name in DTYPES.items():
            found[f"anderson {path} {name}"] = partial(_anderson, path, dtype)
            found[f"broyden {path} history {name}"] = partial(_broyden, path, dtype)
    return found


def _products() -> dict[str, Callable[[SectorCounter], Any]]:
    found: dict[str, Callable[[SectorCounter], Any]] = {}
    for op in ("masked_linear", "masked_outer"):
        for path in MASKED_PATHS[op]:
            if path in ("tiles", "small_tiles"):
                continue  # what strips are to replace
            for dtype in (torch.bfloat16,) if path in BY_BLOCKS else DTYPES:
                found[f"{op} {path} {DTYPES[dtype]}"] = partial(_masked, op, path, dtype)
    return found


def _shape(path: str) -> tuple[int, int]:
    return (1, 65536) if path == "split" else (4, 4096)


def _anderson(path: str, dtype: torch.dtype, counter: SectorCounter) -> None:
    case = full_rows(anderson_case(*_shape(path), 5, dtype, 1, safeguard=1e9), 5)
    counter.step("anderson_step", path)(*case.args)


def _broyden(path: str, dtype: torch.dtype, counter: SectorCounter) -> None:
    rows, dim = _shape(path)
    case = broyden_case(rows, dim, 30, torch.float32, 1, history_dtype=dtype)
    ring = torch.randn(rows, 30, dim) * 0.7 ** torch.arange(30)[:, None]
    case = full_rows(case.with_tensors(s_ring=ring.to(dtype)), 20)
    counter.step("broyden_step", path)(*case.args)


def _masked(op: str, path: str, dtype: torch.dtype, counter: SectorCounter) -> None:
    # So many kept entries that what follows them in a workspace begins within a sector.
    tokens = 4 if path == "gather" else 64 if path.startswith("few") else 256
    blocks = path in BY_BLOCKS
    columns, sparsity, block = (512, 0.5, 64) if blocks else (544, 0.9, None)
    case = masked_case(256, columns, tokens, sparsity, block).to(dtype)
    _, args = arguments("forward" if op == "masked_linear" else "values' gradient", case)
    if op == "masked_linear":
        args = (*args[:3], None, *args[4:])  # a bias is read once, at the end
    counter.masked(op, path)(*args)


def print_table(counter: SectorCounter, chosen: Iterable[str], places: bool) -> None:
    print("| case | kernel | loads | stores | copies |\n|---|---|---|---|---|")
    found = cases()
    for name in chosen:
        found[name](counter)
        sums = by_kernel(counter.counts)
        for kernel in dict.fromkeys(kernel for kernel, _ in sums):
            cells = [sums.get((kernel, kind)) for kind in KINDS]
            told = " | ".join("-" if c is None else f"{c.of_32:.1f}" for c in cells)
            print(f"| {name} | {kernel} | {told} |")
        if places:
            for place, count in hot_places(counter.counts).items():
                print(
                    f"    {place.kernel}: {count.of_32:.1f} of 32, {place.kind} {place.tensor}, "
                    f"{count.sectors} sectors, {place.line}: {place.text}"
                )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--only", default="", help="cases with this in their name")
    parser.add_argument("--places", action="store_true", help="show where, too")
    options = parser.parse_args()
    counter = SectorCounter(build("sectors"))
    print_table(counter, [name for name in cases() if options.only in name], options.places)


if __name__ == "__main__":
    main()
