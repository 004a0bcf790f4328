"""Every op with four threads, from two Python threads at a time; the bits are those of one thread.

    python -m tests.faults.sanitized.run_ops LIBRARY

In a process that ThreadSanitizer watches: see tools/sanitized_threads.py.
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

import deqcore
from tests.support.problems import equal
from tests.support.step_cases import anderson_case, broyden_case

Op = Callable[[], list[Tensor]]


def steps() -> Iterator[tuple[str, Op]]:
    """Whole rows to a thread, all rows shared by all threads, and one such row after the other."""
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        sizes = [(21, 70), (2, 40_000), (2, 140_000)]
        for batch, dim in sizes if dtype == torch.float32 else sizes[:2]:
            for kind, make in (("anderson", anderson_case), ("broyden", broyden_case)):
                case = make(batch, dim, 6, dtype, 3)
                name = f"{kind} {batch} x {dim} {dtype}"
                yield (
                    name,
                    lambda case=case: [t for t in case.run(case.op).values() if t is not None],
                )


def products() -> Iterator[tuple[str, Op]]:
    ops = torch.ops.deqcore
    generator = torch.Generator().manual_seed(0)
    for dtype in (torch.float32, torch.bfloat16):
        for structure in (None, 16):
            scores = torch.rand(96, 128, generator=generator)
            pattern = deqcore.SparsityPattern.from_scores(scores, 0.75, structure=structure)
            values = torch.randn(pattern.kept, generator=generator).to(dtype)
            bias = torch.randn(96, generator=generator).to(dtype)
            sizes = 96, 128
            for tokens in (3, 90):
                x = torch.randn(tokens, 128, generator=generator).to(dtype)
                y = torch.randn(tokens, 96, generator=generator).to(dtype)
                rest = pattern.indices, *sizes
                name = f"{tokens} tokens, {structure}, {dtype}"
                block = pattern.block

                def forward(x=x, values=values, bias=bias, rest=rest, block=block):
                    return [ops.masked_linear(x, values, rest[0], bias, *rest[1:], block, False,
                                              False)]  # fmt: skip

                def back(y=y, values=values, rest=rest, block=block):
                    return [ops.masked_linear(y, values, rest[0], None, *rest[1:], block, True,
                                              False)]  # fmt: skip

                def outer(x=x, y=y, rest=rest, block=block):
                    return [ops.masked_outer(y, x, *rest, block)]

                yield f"masked_linear, {name}", forward
                yield f"its transpose, {name}", back
                yield f"masked_outer, {name}", outer

            def dense(values=values, pattern=pattern, sizes=sizes):
                full = ops.masked_to_dense(values, pattern.indices, *sizes)
                expanded = ops.masked_expand(values, pattern._words, pattern.indices, *sizes)
                return [full, expanded, ops.masked_from_dense(full, pattern.indices)]

            yield f"to and from dense, {structure}, {dtype}", dense


def main() -> None:
    library = ctypes.CDLL(sys.argv[1])
    torch.set_grad_enabled(False)
    count = 0
    for name, op in [*steps(), *products()]:
        library.use_threads(1)
        expected = op()
        library.use_threads(4)

        def run(_, op=op):
            with torch.no_grad():  # of this thread
                return op()

        with ThreadPoolExecutor(2) as pool:
            for found in pool.map(run, range(2)):
                for a, b in zip(found, expected, strict=True):
                    assert equal(a, b), name
        count += 1
    print(f"{count} ops with four threads in two Python threads: no race, and the same bits")


if __name__ == "__main__":
    main()
