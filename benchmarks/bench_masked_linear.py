"""The masked matmuls against F.linear(x, W * M), torch.sparse CSR and the dense weight gradient."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.harness import Report, compare
from deqcore import SparsityPattern, masked_linear

SIZE, TOKENS = 768, 1576  # a ViT-B linear on a batch of 8 images
FORWARD_GATES = {0.5: 1.1, 0.8: 2.4, 0.9: 4.2, 0.95: 6.5, 0.99: 14.0}
CSR_GATES = {0.8: 3.5, 0.9: 3.5, 0.95: 3.5}
OUTER_GATES = {0.8: 2.0, 0.9: 3.5, 0.95: 6.0, 0.99: 12.0}
AUTO_SPARSITIES = (0.0, 0.25, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.99)
AUTO_TOKENS = (1, 8, 64, 512, 1576)


def run(report: Report) -> None:
    if report.short:
        bench_forward(report, 0.9, FORWARD_GATES[0.9])
        bench_outer(report, 0.9, OUTER_GATES[0.9])
        return
    for sparsity, gate in FORWARD_GATES.items():
        bench_forward(report, sparsity, gate)
    for sparsity, gate in OUTER_GATES.items():
        bench_outer(report, sparsity, gate)
    for sparsity in (0.5, 0.8, 0.9):
        for size in (16, 32, 64):
            bench_blocks(report, sparsity, size)
    for tokens in AUTO_TOKENS:
        for sparsity in AUTO_SPARSITIES:
            bench_auto(report, sparsity, tokens)


def problem(
    sparsity: float, tokens: int = TOKENS, structure: int | None = None, size: int = SIZE
) -> tuple[Tensor, Tensor, SparsityPattern, Tensor]:
    """x, kept values, their pattern, and the same weight dense: W * M."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(size, size, generator=generator)
    scores = torch.rand(size, size, generator=generator)
    pattern = SparsityPattern.from_scores(scores, sparsity, structure=structure)
    x = torch.randn(tokens, size, generator=generator)
    return x, pattern.from_dense(weight), pattern, weight * pattern.mask()


def agree(ours: Callable[[], Tensor], peer: Callable[[], Tensor]) -> None:
    torch.testing.assert_close(ours(), peer(), rtol=1e-4, atol=1e-3)


@torch.no_grad()
def bench_forward(report: Report, sparsity: float, gate: float) -> None:
    x, values, pattern, dense = problem(sparsity)
    csr = dense.to_sparse_csr()
    contestants = {
        "deqcore": lambda: masked_linear(x, values, pattern, backend="sparse"),
        "F.linear(x, W*M)": lambda: F.linear(x, dense),
        "torch.sparse CSR": lambda: (csr @ x.t()).t(),
    }
    agree(contestants["deqcore"], contestants["F.linear(x, W*M)"])
    gates = {"F.linear(x, W*M)": gate}
    if sparsity in CSR_GATES:
        gates["torch.sparse CSR"] = CSR_GATES[sparsity]
    for result in compare(f"masked linear {sparsity:.0%} {TOKENS}x{SIZE}", contestants, gates):
        report.add(result)


@torch.no_grad()
def bench_outer(report: Report, sparsity: float, gate: float) -> None:
    x, _, pattern, _ = problem(sparsity)
    gradient = torch.randn(TOKENS, SIZE)
    outer = torch.ops.deqcore.masked_outer
    contestants = {
        "deqcore": lambda: outer(gradient, x, pattern.indices, SIZE, SIZE, 1),
        "dense weight gradient": lambda: gradient.t() @ x,
    }
    agree(contestants["deqcore"], lambda: pattern.from_dense(gradient.t() @ x))
    gates = {"dense weight gradient": gate}
    for result in compare(f"values' gradient {sparsity:.0%} {TOKENS}x{SIZE}", contestants, gates):
        report.add(result)


@torch.no_grad()
def bench_blocks(report: Report, sparsity: float, size: int) -> None:
    x, values, pattern, dense = problem(sparsity, structure=size)
    gradient = torch.randn(TOKENS, SIZE)
    outer = torch.ops.deqcore.masked_outer
    pairs: dict[str, dict[str, Callable[[], Tensor]]] = {
        f"blocks of {size}, {sparsity:.0%}": {
            "deqcore": lambda: masked_linear(x, values, pattern, backend="sparse"),
            "F.linear(x, W*M)": lambda: F.linear(x, dense),
        },
        f"blocks of {size}, {sparsity:.0%}, values' gradient": {
            "deqcore": lambda: outer(gradient, x, pattern.indices, SIZE, SIZE, size),
            "dense weight gradient": lambda: gradient.t() @ x,
        },
    }
    for name, contestants in pairs.items():
        for result in compare(name, contestants, {}):
            report.add(result)


@torch.no_grad()
def bench_auto(report: Report, sparsity: float, tokens: int) -> None:
    """Auto against dense: at most 5% slower anywhere in the table.

    A layer with a mask multiplies by it at each call, as torch.nn.utils.prune does. One that keeps
    the product has a dense weight beside its kept values, which these layers do not; for one token
    it is the faster up to about 90%, so it is shown, without a gate.
    """
    x, values, pattern, dense = problem(sparsity, tokens)
    weight, mask = dense.clone(), pattern.mask().float()
    contestants = {
        "deqcore auto": lambda: masked_linear(x, values, pattern),
        "F.linear(x, W*M)": lambda: F.linear(x, weight * mask),
        "F.linear, W*M kept": lambda: F.linear(x, dense),
    }
    gates = {"F.linear(x, W*M)": 0.95}
    for result in compare(f"auto {sparsity:.0%} {tokens}x{SIZE}", contestants, gates):
        report.add(result)
