"""NewtonKrylov: hard systems, exactness, its line search; the laws of all solvers are elsewhere."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import deqcore
from benchmarks import hard_problems
from deqcore import Status
from tests.support.problems import Counted, affine

LONG = "extended Rosenbrock, 30"  # a valley along thirty axes: all calls, without a solution
SYSTEMS = {p.name: p for p in hard_problems.problems() if p.name != LONG}
# A local minimum of |g|, where every method that goes down ends.
UNSOLVED = {"Freudenstein and Roth, 2"}


@pytest.mark.parametrize("name", SYSTEMS)
def test_hard_systems_are_solved_or_said_not_to_be(name: str) -> None:
    value, calls, status = hard_problems.by_deqcore(SYSTEMS[name], "NewtonKrylov")
    norm = float(SYSTEMS[name].g(value).norm())
    assert calls <= hard_problems.CALLS
    assert (status == "converged") == (norm <= hard_problems.SOLVED)
    assert name in UNSOLVED or status == "converged", (norm, calls)


def test_the_statements_of_the_systems_have_their_known_roots() -> None:
    roots = {
        "generalized Rosenbrock, 10": [1.0] * 10,
        "Powell singular, 4": [0.0] * 4,
        "Powell badly scaled, 2": [1.09815932969982e-5, 9.10614673986652],
        "Wood, 4": [1.0] * 4,
        "helical valley, 3": [1.0, 0.0, 0.0],
        "Brown almost linear, 10": [1.0] * 10,
        "trigonometric, 10": [0.0] * 10,
        "variably dimensioned, 10": [1.0] * 10,
        "Hammarling 2 x 2 root, 4": [0.01, 50.0, 0.0, 0.01],
        "Dennis and Schnabel, 2": [0.0, 3.0],
        "x (x - 5)^2, 1": [5.0],
        "Freudenstein and Roth, 2": [5.0, 4.0],
        "Boggs, 2": [0.0, 1.0],
        "extended Powell singular, 12": [0.0] * 12,
    }
    for name, root in roots.items():
        g = SYSTEMS[name].g(torch.tensor(root, dtype=torch.float64))
        assert g.abs().max() < 1e-9, name
    # Chebyquad's abscissas of equal weights, n = 2; Moré, Garbow and Hillstrom's 35th.
    two = torch.tensor([0.2113248654051871, 0.7886751345948129], dtype=torch.float64)
    assert hard_problems.chebyquad(two).abs().max() < 1e-12


def test_watsons_system_is_half_the_gradient_of_its_sum_of_squares() -> None:
    z = torch.randn(6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))

    def squares(z: torch.Tensor) -> torch.Tensor:
        total = z[0] ** 2 + (z[1] - z[0] ** 2 - 1) ** 2
        for i in range(1, 30):
            t = i / 29
            slope = sum(j * z[j] * t ** (j - 1) for j in range(1, 6))
            value = sum(z[j] * t**j for j in range(6))
            total = total + (slope - value**2 - 1) ** 2
        return total

    gradient = torch.func.grad(squares)(z)
    torch.testing.assert_close(hard_problems.watson(z), gradient / 2)


@given(st.integers(1, 12), st.integers(0, 500))
def test_an_affine_map_is_solved_in_a_few_newton_steps(dim: int, seed: int) -> None:
    A, b = affine(dim, 3.0, seed)  # far from a contraction
    expected = torch.linalg.solve(torch.eye(dim, dtype=A.dtype) - A, b)
    condition = torch.linalg.cond(torch.eye(dim, dtype=A.dtype) - A)
    if condition > 1e4:
        return
    solver = deqcore.NewtonKrylov(rtol=1e-10, atol=1e-10, memory=12)
    f = Counted(lambda z: z @ A.T + b)
    found = deqcore.fixed_point(f, torch.zeros(1, dim, dtype=A.dtype), solver=solver)
    assert found.converged.all()
    # At most D differences and a step each; the first linear solves are not exact.
    assert f.calls <= 4 * (dim + 1) + 1
    assert (found.value[0] - expected).norm() <= 1e-6 * (1 + expected.norm())


def test_a_short_krylov_space_still_converges() -> None:
    A, b = affine(60, 0.95, 1)
    solver = deqcore.NewtonKrylov(memory=5, rtol=1e-8)
    found = deqcore.fixed_point(
        lambda z: z @ A.T + b, torch.zeros(2, 60, dtype=A.dtype), solver=solver
    )
    assert found.converged.all()


def test_the_line_search_saves_what_full_newton_steps_lose() -> None:
    """arctan: from |z| > 1.39 full Newton steps run away (Dennis and Schnabel 1983)."""
    start = torch.tensor([[1.0], [3.0], [20.0], [-50.0]], dtype=torch.float64)
    found = deqcore.root(
        lambda z: -torch.arctan(z), start, solver=deqcore.NewtonKrylov(rtol=0.0, atol=1e-10)
    )
    assert found.converged.all()
    assert found.value.abs().max() < 1e-9


def test_it_says_so_where_there_is_no_root() -> None:
    solver = deqcore.NewtonKrylov(max_steps=100)
    found = deqcore.root(lambda z: 1 + z * z, torch.ones(1, 1), solver=solver)
    assert found.status.item() != Status.CONVERGED


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_lower_precisions_reach_their_default_tolerance(dtype: torch.dtype) -> None:
    A, b = affine(16, 0.9, 2, torch.float32)
    A, b = A.to(dtype), b.to(dtype)
    found = deqcore.fixed_point(
        lambda z: torch.tanh(z @ A.T + b), torch.zeros(3, 16, dtype=dtype),
        solver=deqcore.NewtonKrylov(),
    )  # fmt: skip
    assert found.converged.all(), found.residual


def test_gradients_are_those_of_the_solution() -> None:
    weight = (0.3 * torch.randn(5, 5, dtype=torch.float64)).requires_grad_()
    x = torch.randn(2, 5, dtype=torch.float64)
    solver = deqcore.NewtonKrylov(rtol=1e-10)

    def value(weight: torch.Tensor) -> torch.Tensor:
        adjoint = deqcore.Implicit(solver=deqcore.NewtonKrylov(rtol=1e-10))
        z0 = torch.zeros_like(x)
        return deqcore.fixed_point(
            lambda z: torch.tanh(z @ weight.T + x), z0, solver=solver, adjoint=adjoint
        ).value

    assert torch.autograd.gradcheck(value, (weight,), atol=1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [({"memory": 0}, "memory must be"), ({"damping": 3.0}, "damping must be"),
     ({"max_step": 3}, "did you mean 'max_steps'")],
)  # fmt: skip
def test_options_are_checked(options: dict[str, float], message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        deqcore.NewtonKrylov(**options)


def test_the_benchmark_compares_with_scipy() -> None:
    rows = hard_problems.measure([SYSTEMS["Boggs, 2"]], bar=False)
    assert [row["solver"] for row in rows[-4:]] == [
        "scipy hybr", "scipy anderson", "scipy broyden1", "scipy krylov",
    ]  # fmt: skip
    assert all(math.isfinite(row["norm"]) for row in rows)
    text = hard_problems.table(rows)
    assert text.splitlines()[-1].startswith("| **solved, of 1** |")
