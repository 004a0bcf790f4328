"""Train a pruned implicit layer: one whole step against the same layer with dense masks.

A multilayer perceptron as the cell of a DEQ, pruned by magnitude. The peer is
`torch.nn.utils.prune`, which multiplies each weight by its mask whenever the layer runs and then
multiplies by all of it. A step is the forward solve, the loss, and the backward solve; the
gradients of both layers are compared before they are timed.

    python examples/pruned_deq.py [--tokens 1576] [--width 768] [--structure 16]
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time

import torch
from torch import Tensor, nn
from torch.nn.utils import prune

import deqcore


class Cell(nn.Module):
    """z -> x + a small step of an MLP: a contraction, so that the solve converges."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.up = nn.Linear(width, 2 * width)
        self.down = nn.Linear(2 * width, width)

    def forward(self, z: Tensor, x: Tensor) -> Tensor:
        return x + 0.5 * self.down(torch.relu(self.up(z)))


def make_pair(
    dense: deqcore.ImplicitLayer, sparsity: float, structure: int | None
) -> tuple[deqcore.ImplicitLayer, deqcore.ImplicitLayer]:
    """The layer pruned by deqcore, and with the same weights masked by torch.nn.utils.prune."""
    pruned, masked = copy.deepcopy(dense), copy.deepcopy(dense)
    deqcore.prune_layer(pruned.cell, sparsity=sparsity, structure=structure)
    for name in ("up", "down"):
        kept = getattr(pruned.cell, name).pattern.mask()
        prune.custom_from_mask(getattr(masked.cell, name), "weight", kept)
    return pruned, masked


def train_step(layer: nn.Module, x: Tensor, target: Tensor) -> None:
    layer.zero_grad()
    (layer(x) - target).square().mean().backward()


def check_gradients(pruned: nn.Module, masked: nn.Module) -> float:
    """The largest difference of the kept weights' gradients, relative to the largest gradient."""
    worst = 0.0
    for name in ("up", "down"):
        ours = getattr(pruned.cell, name)
        dense = ours.pattern.from_dense(getattr(masked.cell, name).weight_orig.grad)
        worst = max(worst, float((ours.values.grad - dense).abs().max() / dense.abs().max()))
    return worst


def seconds(layer: nn.Module, x: Tensor, target: Tensor) -> float:
    start = time.thread_time()
    train_step(layer, x, target)
    return time.thread_time() - start


def megabytes(layer: nn.Module) -> float:
    """Of parameters, their gradients and masks; a pattern's indices count as masks."""
    tensors = [*layer.parameters(), *(p.grad for p in layer.parameters() if p.grad is not None)]
    tensors += list(layer.buffers())
    modules = layer.modules()
    tensors += [m.pattern.indices for m in modules if isinstance(m, deqcore.MaskedLinear)]
    return sum(t.numel() * t.element_size() for t in tensors) / 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--tokens", type=int, default=1576)
    parser.add_argument("--width", type=int, default=768)
    parser.add_argument("--structure", type=int, choices=[16, 32, 64])
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()

    torch.manual_seed(0)
    torch.set_num_threads(1)  # one thread's own time is measured
    x = torch.randn(options.tokens, options.width)
    target = torch.randn(options.tokens, options.width)
    solver = deqcore.Anderson(rtol=1e-4, max_steps=20)
    dense = deqcore.ImplicitLayer(Cell(options.width), solver=solver)

    print(
        f"{'sparsity':>8} {'ratio':>6} {'ours':>8} {'masked':>8} {'memory':>15} {'gradients':>10}"
    )
    for sparsity in (0.8, 0.9, 0.95):
        pruned, masked = make_pair(dense, sparsity, options.structure)
        train_step(pruned, x, target)
        train_step(masked, x, target)
        difference = check_gradients(pruned, masked)
        assert difference < 1e-3, difference
        pairs = [
            (seconds(pruned, x, target), seconds(masked, x, target)) for _ in range(options.rounds)
        ]
        ours, theirs = (statistics.median(column) for column in zip(*pairs, strict=True))
        ratio = statistics.median(theirs / ours for ours, theirs in pairs)
        print(
            f"{sparsity:8.0%} {ratio:5.2f}x {ours:7.2f}s {theirs:7.2f}s "
            f"{megabytes(pruned):5.1f}/{megabytes(masked):.1f} MB {difference:10.1e}"
        )


if __name__ == "__main__":
    main()
