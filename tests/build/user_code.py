"""What a user writes, for type checkers: tests/build/test_types.py and the workflow CI."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from typing_extensions import assert_type

import deqcore
from deqcore import Anderson, ImplicitLayer, SolveReport, Status
from lion_models import Lion, TrainingConfig, fit, load_backbone, make_task, open_source


class Cell(nn.Module):
    def forward(self, z: Tensor, x: Tensor) -> Tensor:
        return torch.tanh(z + x)


def solve(x: Tensor) -> Tensor:
    solution = deqcore.fixed_point(Cell(), torch.zeros_like(x), x, solver=Anderson(memory=5))
    solution.raise_for_status()
    assert_type(solution.status, Tensor)
    assert_type(solution.steps, Tensor)
    value: Tensor = solution.value
    return value


def layer(x: Tensor) -> SolveReport | None:
    implicit = ImplicitLayer(Cell(), solver=deqcore.Broyden(), adjoint=deqcore.Phantom(steps=3))
    implicit(x)
    return implicit.report


def prune(linear: nn.Linear, x: Tensor) -> None:
    deqcore.prune_layer(linear, sparsity=0.9)
    status: Status = Status.CONVERGED
    print(status.name, deqcore.build_info()["isa"], deqcore.diagnose(Cell(), x, x))


def tune() -> None:
    backbone = load_backbone("tiny-vit")
    task = make_task(open_source("digits", backbone.channels, backbone.image_size), 42, shots=10)
    state = fit(Lion(backbone, classes=len(task.classes)), task, TrainingConfig(epochs=10))
    assert_type(state.best_epoch, int)
