"""Whole solves and their gradients where the device is, against those of the CPU in float64."""

from __future__ import annotations

import dataclasses

import pytest
import torch

import deqcore
from deqcore import Anderson, Broyden, Implicit, Phantom, Picard, Unrolled
from tests.support.problems import equal, wave, wave_batch

SOLVERS = [Picard(damping=0.7), Anderson(), Anderson(memory=12, restart=9), Broyden(memory=6)]
ADJOINTS = [
    Implicit(),
    Implicit(solver=Broyden(rtol=1e-10)),
    Phantom(steps=3),
    Unrolled(),
    Unrolled(checkpoint_every=4),
]
NEARLY = {"rtol": 1e-9, "atol": 1e-9}  # the sums of a GPU are taken in another order


def tight(solver, **options):
    return dataclasses.replace(solver, rtol=1e-11, atol=0.0, max_steps=200, **options)


@pytest.mark.parametrize("solver", SOLVERS, ids=str)
@pytest.mark.parametrize("dim", [33, 1030, 9000])
def test_a_solve_is_that_of_the_cpu(device, solver, dim):
    batch = wave_batch(6, dim, 1)
    there = deqcore.fixed_point(wave, *(t.to(device) for t in batch), solver=tight(solver))
    here = deqcore.fixed_point(wave, *batch, solver=tight(solver))
    assert there.value.device.type == device.type
    assert equal(there.status.cpu(), here.status)
    assert (there.steps.cpu() - here.steps).abs().max() <= 1
    torch.testing.assert_close(there.value.cpu(), here.value, **NEARLY)


@pytest.mark.parametrize("solver", SOLVERS, ids=repr)
@pytest.mark.parametrize("check_every", [0, 1, 3])
def test_when_the_host_looks_changes_no_bit(device, solver, check_every):
    batch = [t.to(device) for t in wave_batch(6, 100, 2, torch.float32)]
    solver = dataclasses.replace(solver, max_steps=60)
    with torch.no_grad():
        first = deqcore.fixed_point(wave, *batch, solver=solver)
        solver = dataclasses.replace(solver, check_every=check_every)
        other = deqcore.fixed_point(wave, *batch, solver=solver)
    for name in ("value", "status", "residual", "steps"):
        assert equal(getattr(other, name), getattr(first, name)), name
    late = 0 if device.type == "cpu" else 1  # looks
    if check_every:
        assert other.evaluations <= int(other.steps.max()) + check_every * (late + 1)
    else:
        assert other.evaluations == 60


@pytest.mark.parametrize("adjoint", ADJOINTS, ids=str)
def test_gradients_are_those_of_the_cpu(device, adjoint):
    if isinstance(adjoint, Implicit):
        adjoint = dataclasses.replace(adjoint, solver=tight(adjoint.solver))

    def gradients(device):
        z0, shift, strength = (t.to(device) for t in wave_batch(5, 70, 3))
        shift.requires_grad_()
        strength.requires_grad_()
        solver = tight(Anderson())
        solution = deqcore.fixed_point(wave, z0, shift, strength, solver=solver, adjoint=adjoint)
        solution.value.square().sum().backward()
        return shift.grad.cpu(), strength.grad.cpu()

    for there, here in zip(gradients(device), gradients(torch.device("cpu")), strict=True):
        torch.testing.assert_close(there, here, rtol=1e-7, atol=1e-9)


def test_a_masked_layer_and_its_gradients_are_those_of_the_cpu(device):
    torch.manual_seed(0)
    mask = torch.rand(48, 64) < 0.3
    weight, x = torch.randn(48, 64, dtype=torch.float64), torch.randn(10, 64, dtype=torch.float64)
    pattern = deqcore.SparsityPattern.from_mask(mask)
    results = []
    for where in (device, torch.device("cpu")):
        values = weight[mask].to(where).requires_grad_()
        inputs = x.to(where).requires_grad_()
        deqcore.masked_linear(inputs, values, pattern.to(where)).square().sum().backward()
        results.append((values.grad.cpu(), inputs.grad.cpu()))
    for there, here in zip(*results, strict=True):
        torch.testing.assert_close(there, here, rtol=1e-12, atol=1e-12)
