"""Small cases on every path of the CUDA kernels, for a sanitizer to watch.

    compute-sanitizer --tool memcheck python tools/gpu_cases.py

Each case is checked against the reference in float64. With `--device cpu` the same cases run on the
CPU's kernels.
"""

from __future__ import annotations

import argparse
import sys
from functools import partial
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from tests.support.masked_cases import NAMES, check_result, run_op_on
from tests.support.masked_cases import make as masked_case
from tests.support.step_cases import anderson_case, broyden_case
from tests.support.step_checks import check_kernel_against_float64

# Rows of a warp, of a block, of several chunks; aligned and not; one pass over the history or more.
SHAPES = [(6, 130, 5), (5, 64, 20), (3, 1100, 7), (3, 1029, 40), (2, 8196, 5), (2, 9001, 12)]
# Rows, columns, tokens, sparsity and blocks of masked matmuls: few and many tokens, several tiles
# of rows, tokens and columns; nothing kept; one large enough for the path of large products.
MASKED = [
    (37, 53, 5, 0.5, None),
    (300, 850, 140, 0.9, None),
    (33, 20, 70, 1.0, None),
    (4096, 40, 2049, 0.99, None),
    (48, 64, 70, 0.5, 16),
    (64, 96, 300, 0.5, 32),
    (128, 192, 30, 0.5, 64),
    (4096, 128, 1030, 0.97, 64),
]
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--device", default="cuda")
    device = torch.device(parser.parse_args().device)
    narrow = partial(broyden_case, history_dtype=torch.bfloat16)
    cases = 0
    for index, (batch, dim, memory) in enumerate(SHAPES):
        for make in (anderson_case, broyden_case, narrow):
            for dtype in DTYPES if index < 2 else DTYPES[index % 2 :: 2]:
                if make is narrow and dtype == torch.float64:
                    continue  # it has no other history than its own
                case = make(batch, dim, memory, dtype, 10 + index)
                check_kernel_against_float64(case, device)
                cases += 1
    for index, shape in enumerate(MASKED):
        for dtype in (DTYPES[index % 2], DTYPES[2 + index % 2]):
            for name in NAMES:
                check_result(name, masked_case(*shape), dtype, partial(run_op_on, device, name))
                cases += 1
    print(f"{cases} cases on {device} are as exact as their references")


if __name__ == "__main__":
    main()
