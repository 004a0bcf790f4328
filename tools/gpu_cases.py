"""Small steps on every path of the CUDA kernels, for a sanitizer to watch.

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
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(ROOT / "tests" / "ops")]

from step_cases import anderson_case, broyden_case  # noqa: E402
from step_checks import check_kernel_against_float64  # noqa: E402

# Rows of a warp, of a block, of several chunks; aligned and not; one pass over the history or more.
SHAPES = [(6, 130, 5), (5, 64, 20), (3, 1100, 7), (3, 1029, 40), (2, 8196, 5), (2, 9001, 12)]
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
    print(f"{cases} steps on {device} are as exact as their references")


if __name__ == "__main__":
    main()
