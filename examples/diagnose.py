"""Ask why a solve does not converge, before guessing at options.

A small cell whose weights grew in training: its iterates no longer settle by themselves. `diagnose`
tries every solver, looks at f, and says what to write.

    python examples/diagnose.py [--gain 1.5] [--out diagnosis.png]
"""

from __future__ import annotations

import argparse

import torch
from torch import Tensor, nn

import deqcore


class Cell(nn.Module):
    """z -> tanh(W z + x), W of spectral radius near ``gain``."""

    def __init__(self, width: int, gain: float) -> None:
        super().__init__()
        self.linear = nn.Linear(width, width, bias=False)
        nn.init.normal_(self.linear.weight, std=gain / width**0.5)

    def forward(self, z: Tensor, x: Tensor) -> Tensor:
        return torch.tanh(self.linear(z) + x)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gain", type=float, default=1.5, help="of the weights, default 1.5")
    parser.add_argument("--out", help="PNG to write")
    options = parser.parse_args()
    torch.manual_seed(0)
    cell, x = Cell(64, options.gain), torch.randn(8, 64)

    solution = deqcore.fixed_point(cell, torch.zeros(8, 64), x)
    print(f"by default {int(solution.converged.sum())} of 8 rows converge\n")

    diagnosis = deqcore.diagnose(cell, torch.zeros(8, 64), x)
    print(diagnosis)
    if options.out is not None:
        diagnosis.save(options.out)
        print(f"written to {options.out}")


if __name__ == "__main__":
    main()
