"""S1 to S7: the masked products on a GPU against dense, CSR and block sparse ones."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

import deqcore
from benchmarks.gpu_bench import Bench, trial_paths
from deqcore.sparse.functional import Backend
from deqcore.sparse.pattern import Structure

__all__ = ["bench_auto", "bench_few_tokens", "bench_masked", "bench_masked_gradient"]


def masked_problem(
    bench: Bench, size: int, tokens: int, sparsity: float, dtype: torch.dtype, structure: Structure
) -> tuple[Tensor, Tensor, deqcore.SparsityPattern, Tensor]:
    """x, kept values, their pattern, and the same weight dense: W * M."""
    if not bench.real:
        size, tokens = min(size, 128), min(tokens, 64)
    generator = torch.Generator(bench.device).manual_seed(0)

    def randn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=bench.device).to(dtype)

    scores = torch.rand(size, size, generator=generator, device=bench.device)
    pattern = deqcore.SparsityPattern.from_scores(scores, sparsity, structure=structure)
    weight = randn(size, size)
    return randn(tokens, size), pattern.from_dense(weight), pattern, weight * pattern.mask()


def compare_masked(
    bench: Bench,
    gate_name: str,
    problem: tuple[Tensor, Tensor, deqcore.SparsityPattern, Tensor],
    gates: dict[str, float],
    backend: Backend = "sparse",
) -> None:
    """masked_linear against F.linear, and against what else has a gate."""
    x, values, pattern, dense = problem
    exact = x.double() @ dense.double().t()
    contestants: dict[str, Callable[[], Tensor]] = {
        "deqcore": lambda: deqcore.masked_linear(x, values, pattern, backend=backend),
        "F.linear(x, W*M)": lambda: F.linear(x, dense),
    }
    if "torch.sparse CSR" in gates:
        csr = dense.to_sparse_csr()
        contestants["torch.sparse CSR"] = lambda: (csr @ x.t()).t()
    if "torch BSR (Triton)" in gates:
        bsr = dense.to_sparse_bsr((pattern.block, pattern.block))
        contestants["torch BSR (Triton)"] = lambda: F.linear(x, bsr)
    floor = 4 * torch.finfo(x.dtype).eps * exact.abs().max()
    ours, theirs = ((run().double() - exact).abs().max() for run in list(contestants.values())[:2])
    if not ours <= 2 * theirs + floor:
        raise RuntimeError(f"{gate_name}: error {ours:.2e}, of the dense product {theirs:.2e}")
    kind = str(x.dtype).removeprefix("torch.")
    work = f"{gate_name} {kind} {pattern.sparsity:.0%} {len(x)}x{pattern.shape[1]}"
    bench.compare(work, contestants, gates)


def bench_masked(bench: Bench) -> None:
    """S1, S2 and S4: blocks, 2:4 and unstructured against cuBLAS; TF32 is off."""
    for sparsity, gate in ((0.5, 1.3), (0.8, 3.0), (0.9, 5.5)):
        problem = masked_problem(bench, 4096, 8192, sparsity, torch.bfloat16, 64)
        gates = {"F.linear(x, W*M)": gate, "torch BSR (Triton)": 1.3}
        compare_masked(bench, "S1 blocks of 64", problem, gates)
        with trial_paths():
            compare_masked(bench, "S1 blocks of 64 (trial)", problem, {"F.linear(x, W*M)": gate})
    problem = masked_problem(bench, 8192, 8192, 0.5, torch.bfloat16, "2:4")
    compare_masked(bench, "S2 2:4", problem, {"F.linear(x, W*M)": 1.2})
    for sparsity, gate in ((0.9, 2.0), (0.95, 4.0), (0.99, 12.0)):
        problem = masked_problem(bench, 4096, 8192, sparsity, torch.float32, None)
        gates = {"F.linear(x, W*M)": gate, "torch.sparse CSR": 3.0}
        compare_masked(bench, "S4 unstructured", problem, gates)
        with trial_paths():
            compare_masked(bench, "S4 unstructured (trial)", problem, {"F.linear(x, W*M)": gate})


def bench_few_tokens(bench: Bench) -> None:
    """S7: unstructured, bfloat16, few tokens, replayed in a graph: the kernels alone."""
    for tokens in (1, 8, 64):
        x, values, pattern, dense = masked_problem(bench, 4096, tokens, 0.8, torch.bfloat16, None)
        contestants = {
            "deqcore": bench.graphed(
                partial(deqcore.masked_linear, x, values, pattern, backend="sparse")
            ),
            "F.linear(x, W*M)": bench.graphed(partial(F.linear, x, dense)),
        }
        name = f"S7 unstructured bfloat16 80% {tokens}x{pattern.shape[1]} (graph, trial)"
        with trial_paths():
            bench.compare(name, contestants, {"F.linear(x, W*M)": 1.3})


def weight_gradient(grad: Tensor, x: Tensor) -> Tensor:
    return grad.t() @ x


def multiply_masked(x: Tensor, weight: Tensor, mask: Tensor) -> Tensor:
    return F.linear(x, weight * mask)


def bench_masked_gradient(bench: Bench) -> None:
    """S6: the values' gradient against the dense weight gradient."""
    outer = torch.ops.deqcore.masked_outer
    for dtype, structure, gates in (
        (torch.float32, None, (1.3, 2.4)),
        (torch.bfloat16, None, (None, None)),
        (torch.bfloat16, 64, (4.0, 7.0)),
    ):
        for sparsity, gate in zip((0.9, 0.95), gates, strict=True):
            x, _, pattern, _ = masked_problem(bench, 4096, 8192, sparsity, dtype, structure)
            shape = (*pattern.shape, pattern.block)
            grad = torch.randn_like(x)
            contestants: dict[str, Callable[[], Tensor]] = {
                "deqcore": partial(outer, grad, x, pattern.indices, *shape),
                "dense weight gradient": partial(weight_gradient, grad, x),
            }
            kind = "unstructured" if structure is None else f"blocks of {structure}"
            if (dtype, structure) == (torch.bfloat16, None):
                kind += " bfloat16"
            asked = {} if gate is None else {"dense weight gradient": gate}
            name = f"S6 values' gradient {kind} {pattern.sparsity:.0%}"
            bench.compare(name, contestants, asked)
            with trial_paths():
                bench.compare(f"{name} (trial)", contestants, asked)


def bench_auto(bench: Bench) -> None:
    """S5: auto, as this machine's table or the cautious default has it, against dense.

    Run python -m deqcore.tune --device cuda first to judge a measured table.
    """
    for size in (768, 4096):
        for tokens in (1, 512, 8192):
            for dtype, structure in (
                (torch.float32, None), (torch.bfloat16, None), (torch.bfloat16, 64)
            ):  # fmt: skip
                for sparsity in (0.9, 0.99):
                    problem = masked_problem(bench, size, tokens, sparsity, dtype, structure)
                    x, values, pattern, dense = problem
                    mask = pattern.mask().to(dtype)
                    kind = str(dtype).removeprefix("torch.")
                    bench.compare(
                        f"S5 auto {kind} {structure} {sparsity:.0%} {tokens}x{size}",
                        {
                            "deqcore": partial(deqcore.masked_linear, x, values, pattern),
                            "F.linear(x, W*M)": partial(multiply_masked, x, dense, mask),
                        },
                        {"F.linear(x, W*M)": 0.95},
                    )
