"""``root``: a residual measured against its own first one, in a norm and units of one's choice."""

from __future__ import annotations

import math

import pytest
import torch

import deqcore
from deqcore import Anderson, Broyden, Picard, Status, Unrolled
from tests.support.problems import rms

# Functions of one variable without a root, and where to start.
NO_ROOT = {
    "exp": (torch.exp, 0.0),
    "-exp": (lambda z: -torch.exp(z), 0.0),
    "exp(-z)": (lambda z: torch.exp(-z), 0.0),
    "1 + z^2": (lambda z: 1 + z * z, 0.5),
    "-1 - z^2": (lambda z: -1 - z * z, 0.5),
    "2 + sin": (lambda z: 2 + torch.sin(z), 0.0),
    "-2 - cos": (lambda z: -2 - torch.cos(z), 0.0),
    "-(2 + tanh)": (lambda z: -(2 + torch.tanh(z)), 0.0),
    "2 + tanh": (lambda z: 2 + torch.tanh(z), 0.0),
    "sigmoid": (torch.sigmoid, 0.0),
    "-softplus": (lambda z: -torch.nn.functional.softplus(z), 0.0),
    "1 / (1 + z^2)": (lambda z: 1 / (1 + z * z), 0.3),
    "sqrt(1 + z^2)": (lambda z: torch.sqrt(1 + z * z), 0.2),
    "exp(-z^2)": (lambda z: torch.exp(-z * z), 0.5),
    "one": (lambda z: torch.ones_like(z), 0.0),
}
KINDS = [Picard, Anderson, Broyden]


@pytest.fixture(params=KINDS, ids=lambda kind: kind.__name__)
def kind(request):
    return request.param


def tensor(value, dtype=torch.float64):
    return torch.full((1, 1), value, dtype=dtype)


# Each function is a row of one solve. Unrolled takes the same decisions from the same steps: one
# dtype is enough of it.
@pytest.mark.parametrize("max_steps", [50, 400])
@pytest.mark.parametrize(
    ("adjoint", "dtype"),
    [(None, torch.float64), (None, torch.float32), (Unrolled(), torch.float32)],
    ids=["loop-float64", "loop-float32", "Unrolled-float32"],
)
def test_a_function_without_a_root_does_not_converge(kind, dtype, adjoint, max_steps):
    functions, starts = zip(*NO_ROOT.values(), strict=True)
    options = {} if adjoint is None else {"adjoint": adjoint}

    def g(z):
        return torch.cat([own(row) for own, row in zip(functions, z.split(1), strict=True)])

    with torch.no_grad():
        z0 = torch.tensor(starts, dtype=dtype)[:, None]
        solution = deqcore.root(g, z0, solver=kind(max_steps=max_steps), **options)
    found = solution.status == Status.CONVERGED
    assert not [name for name, row in zip(NO_ROOT, found.tolist(), strict=True) if row]


WITH_ROOT = {
    "z^2 - 2": (lambda z: z * z - 2, 1.0, 0.3, math.sqrt(2)),
    "cos z - z": (lambda z: torch.cos(z) - z, 0.0, 1.0, 0.7390851332151607),
    "z^3 - 1": (lambda z: 1 - z**3, 0.5, 0.3, 1.0),
    "exp(z) - 2": (lambda z: 2 - torch.exp(z), 0.0, 0.5, math.log(2)),
    "z, root at 0": (lambda z: -torch.sinh(z), 1.0, 0.7, 0.0),
    "shifted far": (lambda z: 1e3 - z, 0.0, 1.0, 1e3),
    "tanh(z) - 0.5": (lambda z: 0.5 - torch.tanh(z), 0.0, 1.0, math.atanh(0.5)),
}


@pytest.mark.parametrize("name", WITH_ROOT)
@pytest.mark.parametrize("adjoint", [None, Unrolled()], ids=["loop", "Unrolled"])
def test_a_root_is_found(kind, name, adjoint):
    g, start, damping, exact = WITH_ROOT[name]
    sign = -1.0 if name == "z^2 - 2" else 1.0
    options = {} if adjoint is None else {"adjoint": adjoint}
    with torch.no_grad():
        solution = deqcore.root(
            lambda z: sign * g(z), tensor(start), solver=kind(damping=damping, max_steps=100),
            **options,
        )  # fmt: skip
    solution.raise_for_status()
    assert solution.value.item() == pytest.approx(exact, rel=2e-4, abs=2e-4)
    assert solution.residual.item() == pytest.approx(abs(g(solution.value).item()))
    assert solution.residual.item() <= 1e-6 + 1e-4 * abs(g(tensor(start)).item())


def test_a_small_function_is_not_done_after_one_step(kind):
    g = lambda z: 1e-4 * (z * z - 2)
    solution = deqcore.root(g, tensor(1.9), solver=kind(atol=0.0, max_steps=60))
    assert solution.steps > 1
    if solution.converged:
        assert abs(solution.value.item() - math.sqrt(2)) < 1e-3
        assert g(solution.value).abs() <= 1e-4 * g(tensor(1.9)).abs()
    if kind is not Picard:  # a step of which is 1e-4 of the way here
        assert solution.converged


def test_a_start_that_is_a_root_takes_one_evaluation(kind):
    solution = deqcore.root(lambda z: z - 1, torch.ones(3, 2), solver=kind())
    solution.raise_for_status()
    assert solution.steps.tolist() == [1, 1, 1]
    assert torch.equal(solution.value, torch.ones(3, 2))


def test_rows_of_a_root_end_by_themselves(kind):
    target = torch.tensor([[1.0], [5.0], [-3.0]], dtype=torch.float64)
    factor = torch.tensor([[1.0], [0.7], [0.3]], dtype=torch.float64)
    g = lambda z, t, c: c * (t - z) + 0.1 * torch.sin(t - z)
    together = deqcore.root(g, torch.zeros_like(target), target, factor, solver=kind(max_steps=90))
    together.raise_for_status()
    for i in range(3):
        row = slice(i, i + 1)
        alone = deqcore.root(
            g, torch.zeros(1, 1).double(), target[row], factor[row], solver=kind(max_steps=90)
        )
        for name in ("value", "residual", "steps", "status"):
            assert torch.equal(getattr(alone, name), getattr(together, name)[row])


def test_norm_and_scales_decide_when_a_row_is_done():
    """Two components in units that are 1e6 apart."""
    units = torch.tensor([[1.0, 1e6]], dtype=torch.float64)
    target = torch.tensor([[1.0, 2e6]], dtype=torch.float64)
    speed = torch.tensor([[0.3, 0.9]], dtype=torch.float64)
    g = lambda z: speed * (target - z)
    z0 = torch.zeros_like(target)
    coarse = deqcore.root(g, z0, solver=Picard(max_steps=200, atol=0.0))
    fine = deqcore.root(
        g, z0, solver=Picard(max_steps=200, atol=0.0), f_scale=1 / units, norm="max"
    )
    for solution in (coarse, fine):
        solution.raise_for_status()
    assert abs(coarse.value[0, 0] - 1) > 1e-2  # lost beside the large component
    assert abs(fine.value[0, 0] - 1) < 1e-3
    scaled = (g(fine.value) / units).abs().max()
    assert fine.residual.item() == pytest.approx(scaled.item())
    assert fine.residual.item() <= 1e-4 * (g(z0) / units).abs().max().item()


def test_max_norm_is_that_of_the_worst_component(kind):
    target = torch.linspace(-2, 3, 7, dtype=torch.float64)[None]
    g = lambda z: 0.8 * (target - z) + 0.1 * torch.sin(z).roll(1, 1)
    solution = deqcore.root(g, torch.zeros_like(target), solver=kind(), norm="max")
    solution.raise_for_status()
    assert solution.residual.item() == pytest.approx(g(solution.value).abs().max().item(), rel=1e-6)


def test_u_scale_makes_steps_independent_of_units():
    """The same problem in metres and in millimetres takes the same steps to the same place."""
    mixed = torch.tensor([[1.0, 1024.0, 2.0**-10]], dtype=torch.float64)
    base = torch.tensor([[0.3, -1.2, 0.8]], dtype=torch.float64)
    g = lambda y: torch.cos(y.roll(1, 1)) * 0.7 + base - y
    z0 = torch.zeros(1, 3, dtype=torch.float64)
    for solver in (Anderson(), Broyden()):
        plain = deqcore.root(g, z0, solver=solver)
        scaled = deqcore.root(
            lambda z: g(z / mixed) * mixed, z0, solver=solver, u_scale=1 / mixed, f_scale=1 / mixed
        )
        plain.raise_for_status()
        torch.testing.assert_close(scaled.value / mixed, plain.value, rtol=1e-12, atol=1e-12)
        assert torch.equal(scaled.steps, plain.steps)


def test_gradient_of_a_root_is_that_of_its_equation():
    a = torch.tensor([[2.0], [3.0]], dtype=torch.float64, requires_grad=True)
    tight = Broyden(rtol=1e-12, atol=1e-13, max_steps=100)
    for options in ({}, {"u_scale": torch.tensor([4.0]).double()}, {"norm": "max"}):
        z = deqcore.root(
            lambda z, a: 0.2 * (a - z * z), torch.ones(2, 1).double(), a, solver=tight,
            adjoint=deqcore.Implicit(solver=Anderson(rtol=1e-10, max_steps=100)), **options,
        )  # fmt: skip
        z.raise_for_status()
        (grad,) = torch.autograd.grad(z.value.sum(), a)
        torch.testing.assert_close(grad, 0.5 / a.detach().sqrt(), rtol=1e-7, atol=0)


def test_unrolled_and_checkpointed_roots_agree_with_the_loop():
    target = torch.tensor([[1.0, 2.0], [5.0, 0.1]], dtype=torch.float64)
    g = lambda z, t: 0.6 * (t - z) + 0.1 * torch.sin(z * t)
    solutions = [
        deqcore.root(g, torch.zeros_like(target), target, solver=Anderson(), adjoint=adjoint)
        for adjoint in (deqcore.Implicit(), Unrolled(), Unrolled(checkpoint_every=2))
    ]
    for solution in solutions:
        solution.raise_for_status()
        torch.testing.assert_close(solution.value, solutions[0].value, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(solution.residual, solutions[0].residual, rtol=1e-6, atol=1e-12)
        assert torch.equal(solution.steps, solutions[0].steps)


def test_residual_of_a_row_that_failed_is_that_of_its_value(kind):
    g = lambda z: torch.cat([1 + z[:, :1] ** 2, 3 - z[:, 1:]], 1)
    z0 = torch.tensor([[0.4, 0.0]], dtype=torch.float64)
    for norm, measure in (("rms", rms), ("max", lambda x: x.abs().amax(1))):
        solution = deqcore.root(g, z0, solver=kind(max_steps=30), norm=norm)
        assert not solution.converged.any()
        torch.testing.assert_close(
            solution.residual, measure(g(solution.value)), rtol=1e-6, atol=1e-12
        )


def test_options_of_root_are_refused_by_name():
    g = lambda z: 1 - z
    z0 = torch.zeros(2, 3)
    with pytest.raises(ValueError, match="norm: expected 'rms' or 'max', got 'l2'"):
        deqcore.root(g, z0, norm="l2")
    for name in ("u_scale", "f_scale"):
        with pytest.raises(ValueError, match=f"{name}: expected positive finite numbers"):
            deqcore.root(g, z0, **{name: torch.tensor([1.0, 0.0, 1.0])})
        with pytest.raises(ValueError, match=rf"{name}: .*\(2, 3\).*got \(4,\)"):
            deqcore.root(g, z0, **{name: torch.ones(4)})
