"""Training steps before and after the import of torchdeq is changed: docs/from_torchdeq.md.

    python -m benchmarks.changed_import --out benchmarks/results/changed_import.json

Nothing else differs. Seconds are one thread's own time, the fastest of several rounds in turns;
bytes are the peak of live tensors in a step, parameters not counted. Errors are those of the
gradient, relative to one by solves in float64 with tolerances of 1e-10.
"""

from __future__ import annotations

import argparse
import copy
import importlib
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import deqcore
from benchmarks.harness import machine, peak_bytes
from lion_models.base.files import write_json

IMPORTS = {"before": "torchdeq", "after": "deqcore.compat.torchdeq"}
OPTIONS: dict[str, Any] = {
    "f_solver": "anderson", "f_tol": 1e-3, "f_max_iter": 40,
    "b_solver": "anderson", "b_tol": 1e-6, "b_max_iter": 40, "ift": True,
}  # fmt: skip


class ThreeStates(nn.Module):
    """An equilibrium of three tensors that feed each other, as in torchdeq's README."""

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        parts = [nn.Linear(width, width) for _ in range(3)]
        for part in parts:
            nn.init.orthogonal_(part.weight, gain=0.6)
        self.parts = nn.ModuleList(parts)
        self.start = (32, width)

    def solve(self, deq: Any, x: Tensor) -> Tensor:
        def fn(a: Tensor, b: Tensor, c: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            one, two, three = self.parts
            return torch.tanh(one(b) + x), torch.tanh(two(c)), torch.tanh(three(a))

        z0 = torch.zeros_like(x)
        z_out, _ = deq(fn, (z0, z0.clone(), z0.clone()))
        return torch.cat(list(z_out[-1]), dim=-1)


class Block(nn.Module):
    """A transformer block with input injection, as in the sequence models of the DEQ zoo."""

    def __init__(self, width: int = 64, heads: int = 4, length: int = 32) -> None:
        super().__init__()
        self.heads = heads
        self.mix, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)
        self.first, self.second = nn.LayerNorm(width), nn.LayerNorm(width)
        for layer in (self.out, self.down):
            nn.init.orthogonal_(layer.weight, gain=0.5)
        self.start = (8, length, width)

    def cell(self, z: Tensor, x: Tensor) -> Tensor:
        batch, length, width = z.shape
        q, k, v = self.mix(z + x).view(batch, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        seen = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        z = self.first(x + self.out(seen.transpose(1, 2).reshape(batch, length, width)))
        return self.second(z + self.down(torch.relu(self.up(z))))

    def solve(self, deq: Any, x: Tensor) -> Tensor:
        z_out, _ = deq(lambda z: self.cell(z, x), torch.zeros_like(x))
        return z_out[-1]


def step(model: Any, library: str, options: dict[str, Any], x: Tensor) -> Callable[[], Tensor]:
    """Forward, loss and backward; gives the gradient of all parameters."""
    deq = importlib.import_module(library).get_deq(**options)
    deq.train()

    def run() -> Tensor:
        model.zero_grad()
        model.solve(deq, x).square().mean().backward()
        return torch.cat([p.grad.flatten() for p in model.parameters()])

    return run


def exact(model: Any, x: Tensor) -> Tensor:
    """The gradient in float64."""
    tight = OPTIONS | {"f_tol": 1e-10, "b_tol": 1e-10, "f_max_iter": 300, "b_max_iter": 300}
    double = copy.deepcopy(model).double()
    return step(double, IMPORTS["after"], tight, x.double())()


def measure(make: Callable[[], Any], rounds: int) -> dict[str, dict[str, float]]:
    torch.manual_seed(0)
    model = make()
    x = torch.randn(model.start)
    reference = exact(model, x)
    runs = {name: step(model, library, OPTIONS, x) for name, library in IMPORTS.items()}
    found = {
        name: {
            "gradient_error": float((run() - reference).norm() / reference.norm()),
            "peak_bytes": float(peak_bytes(run)),
            "seconds": float("inf"),
        }
        for name, run in runs.items()
    }
    for _ in range(rounds):
        for name, run in runs.items():
            start = time.thread_time()
            run()
            found[name]["seconds"] = min(found[name]["seconds"], time.thread_time() - start)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--out", type=Path, help="JSON to write")
    options = parser.parse_args()
    torch.set_num_threads(1)
    makers = {"three states, 32 x 64 each": ThreeStates, "transformer block, 8 x 32 x 64": Block}
    results = {}
    print("| training step | import | ms | peak MB | error |\n| --- | --- | --- | --- | --- |")
    for work, make in makers.items():
        results[work] = measure(make, options.rounds)
        for name, row in results[work].items():
            print(
                f"| {work} | {name} | {row['seconds'] * 1e3:.1f} | {row['peak_bytes'] / 1e6:.2f} "
                f"| {row['gradient_error']:.1e} |"
            )
    if options.out is not None:
        facts = {"machine": machine(), "options": OPTIONS, "results": results}
        write_json(options.out, facts | {"deqcore": deqcore.__version__, "torchdeq": "0.1.0"})


if __name__ == "__main__":
    main()
