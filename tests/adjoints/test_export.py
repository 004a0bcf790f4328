"""torch.export, and runs without values: all steps of a solver that looks at none, or an error."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

import deqcore
from deqcore import (
    Anderson,
    Broyden,
    Implicit,
    ImplicitLayer,
    NewtonKrylov,
    Phantom,
    Picard,
    Unrolled,
)

FIXED = {"check_every": 0, "max_steps": 3}  # few: a trace has some hundred nodes for each


class Cell(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(3, 3)
        nn.init.orthogonal_(self.linear.weight, gain=0.5)

    def forward(self, z, x):
        return torch.tanh(self.linear(z) + x)


class Model(nn.Module):
    def __init__(self, **options):
        super().__init__()
        self.layer = ImplicitLayer(Cell(), **options)

    def forward(self, x):
        return self.layer(2 * x)


def exported(model, **options):
    return torch.export.export(model, (torch.ones(2, 3),), **options)


@pytest.mark.parametrize(
    ("solver", "adjoint"),
    [
        (Picard(**FIXED), Implicit()),
        (Picard(**FIXED), Phantom()),
        (Picard(**FIXED), Unrolled()),
        (Anderson(**FIXED, memory=2), Implicit()),
        (Broyden(**FIXED, memory=2), Implicit()),
        (NewtonKrylov(**FIXED, memory=1), Implicit()),
    ],
    ids=str,
)
def test_an_exported_layer_takes_all_steps(solver, adjoint):
    model = Model(solver=solver, adjoint=adjoint)
    program = exported(model)
    assert not any("deqcore" in str(node.target) for node in program.graph.nodes)
    x = torch.randn(2, 3)
    torch.testing.assert_close(program.module()(x), model(x), rtol=1e-5, atol=1e-6)


def test_an_exported_layer_takes_batches_of_any_size():
    model = Model(solver=Anderson(**FIXED, memory=2))
    program = exported(model, dynamic_shapes=({0: torch.export.Dim("batch", min=1)},))
    for rows in (1, 7):
        x = torch.randn(rows, 3)
        torch.testing.assert_close(program.module()(x), model(x), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("batch", ["rows", "coupled"])
def test_an_exported_program_is_trained(batch):
    model = Model(solver=Picard(**FIXED), adjoint=Unrolled(), batch=batch)
    program = exported(model).module()
    x = torch.randn(2, 3)
    grads = [torch.autograd.grad(f(x).sum(), list(f.parameters())) for f in (program, model)]
    torch.testing.assert_close(*grads)


def test_export_of_a_root_with_aux():
    class Root(nn.Module):
        def forward(self, x):
            found = deqcore.root(
                lambda z: (x - 0.5 * z, z + 1), torch.zeros_like(x), solver=Picard(**FIXED),
                has_aux=True,
            )  # fmt: skip
            return found.value, found.aux, found.status

    program, x = exported(Root()).module(), torch.randn(2, 3)
    value, aux, status = program(x)
    torch.testing.assert_close((value, aux, status), Root()(x))
    torch.testing.assert_close(aux, value + 1)


@pytest.mark.parametrize("strict", [False, True])
def test_export_of_as_many_steps_as_values_need_says_what_to_do(strict):
    with pytest.raises(Exception, match="check_every=0"):
        exported(Model(), strict=strict)


def test_an_exported_layer_is_none_the_worse():
    model = Model(solver=Picard(**FIXED))
    exported(model)
    assert model.layer.report is None
    copy.deepcopy(model)(torch.ones(2, 3)).sum().backward()


@pytest.mark.parametrize("adjoint", [Implicit(), Phantom(), Unrolled()], ids=str)
@pytest.mark.parametrize("solve", [deqcore.fixed_point, deqcore.root])
def test_a_run_without_values_has_shapes_or_says_what_to_do(adjoint, solve):
    with FakeTensorMode():
        x, z0 = torch.ones(2, 3), torch.zeros(2, 3)
        value = solve(lambda z: x - 0.5 * z, z0, solver=Anderson(**FIXED), adjoint=adjoint).value
        assert value.shape == (2, 3)
        with pytest.raises(RuntimeError, match=r"FakeTensorMode.*check_every=0"):
            solve(lambda z: x - 0.5 * z, z0, adjoint=adjoint)
