"""DDP and FSDP2, two processes: the gradients are those of one process with all rows."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import deqcore
from deqcore import Anderson, Broyden, Implicit, Phantom, Picard, Unrolled
from tests.support.ranks import run_on_two_ranks

TIGHT = Anderson(rtol=1e-11, atol=1e-12, max_steps=200)
ADJOINTS = {"implicit": Implicit(solver=TIGHT), "phantom": Phantom(steps=3), "unrolled": Unrolled()}
KINDS = ("ddp", "fsdp2", "fsdp2, each layer")
ROWS = 6


class Cell(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        nn.init.orthogonal_(self.linear.weight, gain=0.7)

    def forward(self, z: Tensor, x: Tensor) -> Tensor:
        return torch.tanh(self.linear(z) + x)


class Affine(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.ones(3, dtype=torch.float64))

    def forward(self, z: Tensor, factors: Tensor) -> Tensor:
        return factors * z + self.bias


def model_and_rows(adjoint: str) -> tuple[nn.Sequential, Tensor]:
    torch.manual_seed(0)
    layer = deqcore.ImplicitLayer(Cell(), solver=TIGHT, adjoint=ADJOINTS[adjoint])
    model = nn.Sequential(nn.Linear(4, 4), layer, nn.Linear(4, 1)).double()
    return model, torch.randn(ROWS, 4, dtype=torch.float64)


def gradients(model: nn.Module) -> dict[str, Tensor]:
    full = {}
    for name, parameter in model.named_parameters():
        grad = parameter.grad
        assert grad is not None, name
        full[name.removeprefix("module.")] = getattr(grad, "full_tensor", lambda g=grad: g)()
    return full


def wrapped(model: nn.Sequential, kind: str) -> nn.Module:
    if kind == "ddp":
        return DistributedDataParallel(model)
    from torch.distributed.fsdp import fully_shard

    if kind == "fsdp2, each layer":
        for module in model:
            fully_shard(module)
    fully_shard(model)
    return model


def run_rank(rank: int, store: str) -> None:
    """What each of the two processes does: compare with one process, on its half of the rows."""
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    check_a_fallback_on_one_rank(rank)
    for kind, adjoint in itertools.product(KINDS, ADJOINTS):
        alone, x = model_and_rows(adjoint)
        alone(x).square().mean().backward()
        expected = gradients(alone)
        model = wrapped(model_and_rows(adjoint)[0], kind)
        for _ in range(2):  # the second step finds the parameters as the first left them
            model.zero_grad()
            model(x.tensor_split(2)[rank]).square().mean().backward()
            found = gradients(model)
            assert found.keys() == expected.keys()
            for name, grad in expected.items():
                torch.testing.assert_close(found[name], grad, rtol=1e-8, atol=1e-10)
        layer = (model.module if kind == "ddp" else model)[1]
        report = layer.report
        assert report.status.shape == (ROWS // 2,)  # of this process's rows
        assert report.converged.all()
        assert adjoint != "implicit" or report.backward.converged.all()
    dist.destroy_process_group()


def check_a_fallback_on_one_rank(rank: int) -> None:
    """Only rank 0 has rows that need one; no rank waits for the other's, both have the mean."""
    steep = torch.tensor([[[3.0, -3.0, 0.5]], [[0.1, 0.2, 0.3]]], dtype=torch.float64)
    adjoint = Implicit(solver=Picard(rtol=1e-10, atol=0.0, max_steps=90), on_failure="fallback")
    solver = Broyden(rtol=1e-12, atol=1e-13, max_steps=60)
    layer = deqcore.ImplicitLayer(Affine(), solver=solver, adjoint=adjoint)
    model = DistributedDataParallel(layer)
    model(steep[rank]).sum().backward()
    exact = (1 / (1 - steep)).mean(0)[0]
    torch.testing.assert_close(layer.cell.bias.grad, exact, rtol=1e-8, atol=1e-8)


def test_two_processes_have_the_gradients_of_one(tmp_path: Path):
    run_on_two_ranks(f"{__name__}.run_rank", tmp_path)


def test_a_sharded_cell_would_wait_for_ever_and_is_an_error():
    from torch.distributed.fsdp import fully_shard

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        layer = deqcore.ImplicitLayer(nn.Sequential(nn.Linear(4, 4)))
        fully_shard(layer.cell[0], mesh=dist.init_device_mesh("cpu", (1,)))
        with pytest.raises(RuntimeError, match=r"cell\.0 is sharded.*fully_shard on the Implicit"):
            layer(torch.randn(2, 4))
    finally:
        dist.destroy_process_group()
