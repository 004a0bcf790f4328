"""`python -m deqcore.tune`: measure where sparse matmuls begin to beat dense ones here.

`--device cuda` measures the current GPU, with TF32 as torch's settings have it.

The table goes into the user's cache directory, where `masked_linear(..., backend="auto")` finds it
from the next start of Python on.
"""

from __future__ import annotations

import argparse
import functools
import math
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor

from deqcore import _kernels
from deqcore.sparse import choice
from deqcore.sparse.crossovers import Line, default_file, read_table, write_table
from deqcore.sparse.functional import masked_linear
from deqcore.sparse.pattern import SparsityPattern

SIZES = (256, 768)  # a crossover must hold at each
TOKENS = (1, 8, 64, 512)
GPU_SIZES = (768, 4096)
GPU_TOKENS = (1, 64, 512, 2048, 8192)
SPARSITIES = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.98)
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
BLOCKS = (1, 16, 32, 64)
CPU = torch.device("cpu")
Clock = Callable[[Callable[[], Tensor], int], float]
MARGIN = 1.03  # sparse must win by this much, so that noise in a measurement costs nothing


def measure(
    seconds: float, say: Callable[[str], None], device: torch.device = CPU
) -> dict[str, Line]:
    """Crossovers of a device, by line name; ``seconds`` is spent on each comparison."""
    lines: dict[str, Line] = {}
    numbers = TOKENS if device.type == "cpu" else GPU_TOKENS
    for dtype in DTYPES:
        for block in BLOCKS:
            for op in ("linear", "outer"):
                name = choice.line_name(dtype, op, block)
                line = [(n, _crossover(op, n, dtype, block, seconds, device)) for n in numbers]
                lines[name] = line
                say(f"{name:20} " + "  ".join(f"{n}: {_percent(s)}" for n, s in line))
    return lines


def _percent(sparsity: float) -> str:
    return "never" if sparsity > 1 else f"{sparsity:.0%}"


def _crossover(
    op: str, tokens: int, dtype: torch.dtype, block: int, seconds: float, device: torch.device
) -> float:
    """The least of SPARSITIES from which sparse wins at every size, by bisection."""
    sizes = SIZES if device.type == "cpu" else GPU_SIZES
    low, high = 0, len(SPARSITIES)  # sparse wins from `high` on, loses below `low`
    while low < high:
        middle = (low + high) // 2
        wins = all(
            _speedup(op, size, tokens, SPARSITIES[middle], dtype, block, seconds, device) >= MARGIN
            for size in sizes
        )
        low, high = (low, middle) if wins else (middle + 1, high)
    return SPARSITIES[high] if high < len(SPARSITIES) else choice.NEVER


@torch.no_grad()
def _speedup(
    op: str,
    size: int,
    tokens: int,
    sparsity: float,
    dtype: torch.dtype,
    block: int,
    seconds: float,
    device: torch.device,
) -> float:
    """Time of dense over time of sparse, median of rounds in which they take turns."""
    generator = torch.Generator().manual_seed(size)
    pattern = _pattern(size, sparsity, block).to(device)
    values = torch.randn(pattern.kept, generator=generator).to(device, dtype)
    x = torch.randn(tokens, size, generator=generator).to(device, dtype)
    grad = torch.randn(tokens, size, generator=generator).to(device, dtype)
    sparse: Callable[[], Tensor]
    dense: Callable[[], Tensor]
    if op == "linear":
        sparse, dense = (
            functools.partial(masked_linear, x, values, pattern, backend=backend)
            for backend in ("sparse", "dense")
        )
    else:
        outer = torch.ops.deqcore.masked_outer
        sparse = functools.partial(outer, grad, x, pattern.indices, size, size, block)
        dense = functools.partial(_dense_gradient, grad, x, pattern)
    clock = _cpu_seconds if device.type == "cpu" else gpu_seconds
    return statistics.median(_ratios(dense, sparse, seconds, clock))


def _dense_gradient(grad: Tensor, x: Tensor, pattern: SparsityPattern) -> Tensor:
    return pattern.from_dense(grad.t() @ x)


@functools.lru_cache(maxsize=64)
def _pattern(size: int, sparsity: float, block: int) -> SparsityPattern:
    generator = torch.Generator().manual_seed(size)
    scores = torch.rand(size // block, size // block, generator=generator)
    mask = (scores >= sparsity).repeat_interleave(block, 0).repeat_interleave(block, 1)
    return SparsityPattern.from_mask(mask, structure=block if block > 1 else None)


def _ratios(
    dense: Callable[[], Tensor], sparse: Callable[[], Tensor], seconds: float, clock: Clock
) -> Iterator[float]:
    dense(), sparse()
    calls = max(1, math.ceil(seconds / 14 / max(clock(dense, 1), 1e-6)))
    for _ in range(7):
        yield clock(dense, calls) / max(clock(sparse, calls), 1e-9)


def _cpu_seconds(run: Callable[[], Tensor], calls: int) -> float:
    start = time.thread_time()
    for _ in range(calls):
        run()
    return time.thread_time() - start


def gpu_seconds(run: Callable[[], object], calls: int) -> float:
    """Between two events on the current stream, the waits of launches included."""
    before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    before.record()
    for _ in range(calls):
        run()
    after.record()
    after.synchronize()
    return float(before.elapsed_time(after)) / 1e3


def _missing(device: torch.device) -> str | None:
    """Why this device cannot be measured, or None."""
    if device.type == "cpu":
        return None if _kernels.CPU_KERNELS else f"no CPU kernels: {_kernels.missing['cpu']}"
    if device.type != "cuda":
        return f"--device: expected cpu or cuda, got {device}"
    if not _kernels.CUDA_KERNELS:
        return f"no CUDA kernels: {_kernels.missing['cuda']}"
    return None if torch.cuda.is_available() else "no GPU: torch.cuda.is_available() is False"


def _kind(device: torch.device) -> str:
    if device.type == "cpu":
        return choice.processor_kind()
    index = torch.cuda.current_device() if device.index is None else device.index
    return choice.gpu_kind(index)


def main() -> None:
    """Measure, print and write the table."""
    parser = argparse.ArgumentParser(prog="python -m deqcore.tune", description=__doc__)
    parser.add_argument(
        "--seconds", type=float, default=0.05, help="per comparison (default: %(default)s)"
    )
    parser.add_argument("--out", type=Path, help=f"file to write; {choice.cache_file()}")
    parser.add_argument(
        "--as-default", action="store_true", help="write the table that comes with deqcore instead"
    )
    parser.add_argument(
        "--device",
        type=torch.device,
        default=CPU,
        help="cpu, or cuda to measure the current GPU (default: %(default)s)",
    )
    options = parser.parse_args()
    if problem := _missing(options.device):
        parser.exit(1, f"deqcore.tune: {problem}\n")
    # One thread: both ways then do the same work per thread, and waiting is not counted.
    torch.set_num_threads(1)
    kind = _kind(options.device)
    print(f"{kind}: least sparsity at which sparse is faster, by number of tokens")
    say = functools.partial(print, flush=True)
    lines = measure(options.seconds, say, options.device)
    path = default_file(kind) if options.as_default else options.out or choice.cache_file()
    write_table(path, read_table(path) | {kind: lines})
    print(f"written to {path}")


if __name__ == "__main__":
    main()
