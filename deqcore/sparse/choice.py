"""Which of two ways of a masked matmul is the faster: a table of measured crossovers.

A table has, for each kind of processor (a CPU's instruction set, or a GPU's name), dtype, op and
block size, the least sparsity from which the kernels for kept entries beat a dense product, at some
numbers of tokens. Those that come with deqcore are in ``tables``; ``python -m deqcore.tune``
measures one for this machine and keeps it in the user's cache directory, where it takes precedence.
A GPU without a table takes that of the nearest GPU of its compute capability's major version.
"""

from __future__ import annotations

import os
import platform
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from deqcore import _kernels
from deqcore._compile import constant_when_traced
from deqcore.sparse.crossovers import Line, default_lines, nearest_gpu, read_table

if TYPE_CHECKING:
    from deqcore.sparse.pattern import SparsityPattern

Op = Literal["linear", "outer"]

NEVER = 2.0
# For a processor that nobody has measured: only where sparse wins on all that were.
UNKNOWN: Line = [(1, 0.9)]
# For a GPU that nothing is known of: dense, but where counting (docs/architecture.md) leaves at
# least a factor of two: many tokens, a weight that fills the device, and a high sparsity.
_REMEMBERED = 256  # choices of a pattern
_COUNTED_TOKENS = 2048
_COUNTED_ENTRIES = 2048 * 2048
_COUNTED_SPARSITY = 0.95


def cache_file() -> Path:
    """Where ``python -m deqcore.tune`` keeps this machine's table."""
    if sys.platform == "win32":
        base = os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local"
    elif sys.platform == "darwin":
        base = Path.home() / "Library" / "Caches"
    else:
        base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "deqcore" / "crossovers.json"


def processor_kind() -> str:
    """What a table is measured for: the instruction set of the kernels, and of dense bfloat16."""
    isa = _kernels.loaded.get("cpu", {}).get("isa", "none")
    bf16 = "-bf16" if torch.cpu._is_avx512_bf16_supported() else ""
    return f"{platform.machine().lower()}-{isa}{bf16}"


def gpu_kind(index: int) -> str:
    """What a table is measured for on a GPU: its name."""
    return torch.cuda.get_device_name(index)


def line_name(dtype: torch.dtype, op: str, block: int) -> str:
    """Key of a line in a table."""
    return f"{str(dtype).removeprefix('torch.')}/{op}/{block}"


def _lines(kind: str) -> dict[str, Line]:
    measured = read_table(cache_file()).get(kind)
    return default_lines(kind) if measured is None else measured


def _gpu_lines(index: int) -> dict[str, Line]:
    measured = _lines(gpu_kind(index))
    nearest = None if measured else nearest_gpu(torch.cuda.get_device_capability(index))
    return measured if nearest is None else default_lines(nearest)


# Read once, at import: a traced function must not read files.
LINES = _lines(processor_kind())
_GPU_LINES: dict[int, dict[str, Line]] = {}


def choose(tokens: int, pattern: SparsityPattern, x: Tensor) -> tuple[bool, bool]:
    """Whether the kernels for kept entries are faster, in the product and in the values' gradient.

    Remembered with the pattern, but where the answer hangs on settings of torch.
    """
    key = tokens, x.dtype
    found: tuple[bool, bool] | None = pattern._choices.get(key)
    if found is not None:
        return found
    linear = prefers_sparse("linear", tokens, pattern, x)
    found = linear, linear and prefers_sparse("outer", tokens, pattern, x)
    if len(pattern._choices) > _REMEMBERED:  # lengths of sequences vary
        pattern._choices.clear()
    if _is_measured(x):
        pattern._choices[key] = found
    return found


def note_sparse(pattern: SparsityPattern, x: Tensor, backend: str, dense_outer: bool) -> None:
    """That a product of x was made with the kept entries; for ``was_sparse``."""
    if backend == "auto" and not _is_measured(x):
        return  # settings of torch decide
    if len(pattern._sparse) > _REMEMBERED:
        pattern._sparse.clear()
    pattern._sparse[x.shape, x.dtype, x.device, backend] = dense_outer


def was_sparse(pattern: SparsityPattern, x: Tensor, backend: str) -> bool | None:
    """Whether the values' gradient of a product noted before is dense; None: none was noted."""
    known: dict[Any, bool] = getattr(pattern, "_sparse", {})
    return known.get((x.shape, x.dtype, x.device, backend))


def _is_measured(x: Tensor) -> bool:
    name = line_name(x.dtype, "linear", 1)
    return x.device.type != "cuda" or bool(_gpu_line(x.device.index or 0, name))


def prefers_sparse(op: Op, tokens: int | None, pattern: SparsityPattern, x: Tensor) -> bool:
    """Whether the kernels for kept entries are faster than a dense product here.

    Between two measured numbers of tokens, the higher of their crossovers holds; for any number
    (None), the highest of all.
    """
    if pattern.kept == pattern.shape[0] * pattern.shape[1]:
        return False  # the values are the dense weight
    name = line_name(x.dtype, op, pattern.block)
    if x.device.type == "cuda":
        if not _kernels.CUDA_KERNELS:
            return False
        line = _gpu_line(x.device.index or 0, name)
        if line is None:
            return _counts_on_sparse(op, tokens, pattern, x.dtype)
    elif x.device.type == "cpu" and _kernels.CPU_KERNELS:
        line = LINES.get(name, UNKNOWN)
    else:
        return False
    return pattern.sparsity >= _least_sparsity(line, tokens)


def _least_sparsity(line: Line, tokens: int | None) -> float:
    if tokens is None:
        return max(sparsity for _, sparsity in line)
    least = line[0][1]
    for i, (measured, sparsity) in enumerate(line):
        if measured > tokens:
            if i > 0:
                least = max(least, sparsity)
            break
        least = sparsity
    return least


@constant_when_traced
def _gpu_line(index: int, name: str) -> Line | None:
    """What was measured on a GPU; None if nothing was."""
    if index not in _GPU_LINES:  # at the first product, since it wakes the driver
        _GPU_LINES[index] = _gpu_lines(index)
    return _GPU_LINES[index].get(name)


def _counts_on_sparse(
    op: Op, tokens: int | None, pattern: SparsityPattern, dtype: torch.dtype
) -> bool:
    if tokens is None or tokens < _COUNTED_TOKENS:
        return False
    if pattern.shape[0] * pattern.shape[1] < _COUNTED_ENTRIES:
        return False
    if dtype in (torch.bfloat16, torch.float16):  # dense ones run on tensor cores, so must these
        enough = pattern.block >= (32 if op == "linear" else 64)
    else:
        enough = dtype == torch.float64 or not _multiplies_in_tf32()
    return enough and pattern.sparsity >= _COUNTED_SPARSITY


@constant_when_traced
def _multiplies_in_tf32() -> bool:
    """Whether a dense float32 product may use tensor cores, which the kernels here do not."""
    precision = torch.backends.cuda.matmul.fp32_precision
    if precision == "none":
        precision = getattr(torch.backends, "fp32_precision", "none")
    return precision == "tf32"
