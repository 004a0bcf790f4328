"""How the CUDA kernels fill a GPU, without one: launches, registers and what fits a multiprocessor.

    python tools/occupancy.py            # needs nvcc, and a C++ compiler for the emulation

Launches of each op at the sizes of the benchmarks are taken from the launchers themselves, which
the emulation runs without their kernels; registers and static shared memory from ptxas. Blocks of
a multiprocessor follow from NVIDIA's occupancy formula, waves from the multiprocessors of an A100
(108) and of an H100 or H200 (132).
"""

from __future__ import annotations

import argparse
import ctypes
import math
import shutil
import subprocess
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from tools.cuda_build import ARCHITECTURES, Kernel, compile_kernels, short_name
from tools.emulation import PATHS, TYPES, Emulator, build

LIBRARYS_CHOICE = -1  # of a path


@dataclass(frozen=True)
class Multiprocessor:
    """What a multiprocessor has, for the occupancy formula."""

    shared: int  # bytes for all its blocks
    count: int  # of them in a GPU
    registers: int = 65536
    warps: int = 64
    blocks: int = 32
    partitions: int = 4  # each has its share of warps and registers
    register_unit: int = 256  # of a warp
    shared_unit: int = 128
    shared_of_a_block: int = 1024  # which the system takes

    def fitting(self, threads: int, registers: int, shared: int) -> int:
        """Blocks that run at once, for threads and bytes of a block and registers of a thread."""
        warps = math.ceil(threads / 32)
        of_a_warp = _round_up(registers * 32, self.register_unit)
        by_registers = self.registers // self.partitions // of_a_warp * self.partitions // warps
        by_shared = self.shared // _round_up(shared + self.shared_of_a_block, self.shared_unit)
        return min(self.blocks, self.warps // warps, by_registers, by_shared)


GPUS = {"sm_80": Multiprocessor(164 * 1024, 108), "sm_90a": Multiprocessor(228 * 1024, 132)}


def _round_up(number: int, unit: int) -> int:
    return -(-number // unit) * unit


@dataclass(frozen=True)
class Launch:
    """One launch of a kernel."""

    kernel: str
    blocks: int
    threads: int
    shared: int  # bytes of dynamic shared memory


class LaunchRecorder(Emulator):
    """The launchers in this process, without their kernels."""

    def __init__(self, library: Path) -> None:
        super().__init__(library)
        self._library.emulate_launches.restype = ctypes.c_int64
        self.run_no_kernels()

    def run_no_kernels(self) -> None:
        """For all who have this library loaded."""
        self._library.emulate_only_launches(1)

    def run_kernels(self) -> None:
        """The same: run them again."""
        self._library.emulate_only_launches(0)

    def launches(
        self,
        op: str,
        pointers: Sequence[Tensor | None],
        ints: Sequence[int],
        doubles: Sequence[float] = (),
    ) -> list[Launch]:
        """Those of an op with arguments as emulate.cpp reads them; nothing is read or written."""
        self.run(op, 1, pointers, ints, doubles)
        room = self._library.emulate_launches(None, ctypes.c_int64(0))
        numbers = (ctypes.c_int64 * room)()
        self._library.emulate_launches(numbers, ctypes.c_int64(room))
        found = [numbers[i : i + 4] for i in range(0, room, 4)]
        names = self._names(number[0] for number in found)
        return [Launch(name, *rest) for name, (_, *rest) in zip(names, found, strict=True)]

    def _names(self, addresses: Iterable[int]) -> list[str]:
        text = "\n".join(map(hex, addresses))
        command = ["addr2line", "-f", "-C", "-e", str(self.library)]
        done = subprocess.run(command, input=text, capture_output=True, text=True, check=True)
        return [short_name(line) for line in done.stdout.splitlines()[::2]]


def works(recorder: LaunchRecorder) -> Iterator[tuple[str, list[Launch]]]:
    """The launches of each benchmark, by name."""
    fp32, bf16 = TYPES[torch.float32], TYPES[torch.bfloat16]
    memory = torch.empty(16, dtype=torch.uint8)  # aligned; nobody looks at it
    for suffix, path in (("", LIBRARYS_CHOICE), (" (trial)", PATHS["cluster"])):
        for rows, dim in ((32, 151296), (256, 4096), (4096, 256), (1, 65536)):
            if path >= 0 and dim <= 512:
                continue  # stays as it is
            pointers: list[Tensor | None] = [*[memory] * 8, None, *[memory] * 4]
            ints = [fp32, path, rows, dim, 5, 1, 10, 100, 1, 0]
            found = recorder.launches("anderson_step", pointers, ints, [1e-4, 0.0, 1e-8, 2.0, 1e4])
            yield f"Anderson step m=5 {rows}x{dim}{suffix}", found
        for narrow in (0, 1):
            pointers = [*[memory] * 7, None, *[memory] * 4]
            ints = [fp32, path, 32, 151296, 30, 30, 1, 10, 100, narrow]
            found = recorder.launches("broyden_step", pointers, ints, [1e-4, 0.0])
            history = "bf16" if narrow else "fp32"
            yield f"Broyden step k=30 32x151296, history {history}{suffix}", found
    side, tokens = 4096, 8192
    for what, dtype, sparsity, block in (
        ("entries, fp32 90%", fp32, 0.9, 1),
        ("entries, bf16 90%", bf16, 0.9, 1),
        ("blocks of 64, bf16 50%", bf16, 0.5, 64),
    ):
        kept = round((1 - sparsity) * side * side / block**2) * block**2
        ints = [dtype, LIBRARYS_CHOICE, side, side, kept, block, tokens]
        entries = [memory, memory, None]
        found = recorder.launches("masked_linear", [memory, memory, None, memory, *entries], ints)
        yield f"masked_linear {what}", found
        found = recorder.launches("masked_outer", [*[memory] * 3, *entries], ints)
        yield f"masked_outer {what}", found


def print_table(kernels: Iterable[Kernel], recorder: LaunchRecorder) -> None:
    costs = {(kernel.name, kernel.architecture): kernel for kernel in kernels}
    print(
        "| work | launches | kernel | blocks x threads | shared | registers, blocks of a "
        "multiprocessor, occupancy, waves: sm_80 | sm_90 |\n| --- | --- | --- | --- | --- | --- "
        "| --- |"
    )
    for work, launches in works(recorder):
        for index, launch in enumerate(launches):
            head = f"{work} | {len(launches)}" if index == 0 else " | "
            cells = [
                _fit(launch, costs[launch.kernel, architecture], gpu)
                if _may_run(launch, architecture)
                else "-"
                for architecture, gpu in GPUS.items()
            ]
            size = f"{launch.blocks} x {launch.threads}"
            print(f"| {head} | {launch.kernel} | {size} | {launch.shared} | {' | '.join(cells)} |")


def _may_run(launch: Launch, architecture: str) -> bool:
    """Clusters are there from sm_90 on."""
    return "_cluster<" not in launch.kernel or not architecture.startswith("sm_8")


def _fit(launch: Launch, cost: Kernel, gpu: Multiprocessor) -> str:
    fitting = gpu.fitting(launch.threads, cost.registers, launch.shared + cost.static_shared)
    occupancy = fitting * launch.threads / 32 / gpu.warps
    waves = launch.blocks / (fitting * gpu.count)
    return f"{cost.registers}, {fitting}, {occupancy:.1%}, {waves:.2f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--jobs", type=int, help="as many as there are processors if not said")
    jobs = parser.parse_args().jobs
    if shutil.which("nvcc") is None:
        raise SystemExit("nvcc is not on PATH: the kernels' registers cannot be read here")
    print_table(compile_kernels(ARCHITECTURES, jobs), LaunchRecorder(build("sectors")))


if __name__ == "__main__":
    main()
