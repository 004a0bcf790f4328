"""Only plain steps can fail: what mixing has led to since the best iterate is taken back."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import deqcore
from deqcore import Anderson, Broyden, Picard, Status, Unrolled
from tests.support.problems import Counted, affine, generator

MIXING = [Anderson(max_steps=100), Broyden(max_steps=100), Anderson(max_steps=100, safeguard=9e9)]
MEMORIES = st.integers(2, 40)
RADII = st.floats(0.3, 0.99)


def name(solver):
    return f"{type(solver).__name__}-{getattr(solver, 'safeguard', '')}"


@pytest.mark.parametrize("solver", MIXING, ids=name)
def test_a_mixed_step_that_leaves_the_domain_is_taken_back(solver):
    z0 = torch.full((1, 1), 0.01, dtype=torch.float64)
    f = Counted(torch.sqrt)
    with torch.no_grad():
        plain = deqcore.fixed_point(torch.sqrt, z0, solver=Picard(max_steps=100))
        solution = deqcore.fixed_point(f, z0, solver=solver)
    assert any((z < 0).any() for z in f.seen), "this map is meant to be left"
    assert solution.status.tolist() == [Status.CONVERGED]
    assert abs(solution.value - 1).item() < 1e-3
    assert f.calls == solution.evaluations == solution.steps.item() <= plain.steps.item()


@pytest.mark.parametrize("solver", MIXING, ids=name)
def test_all_rows_of_a_square_root_converge_as_by_plain_iteration(solver):
    """sqrt(A z + b) is defined for positive iterates alone, and mixing leaves them in every row."""
    g = generator(1)
    A = torch.rand(5, 5, generator=g, dtype=torch.float64)
    A = A / A.sum(1, keepdim=True)
    b = 1e-3 * torch.rand(5, generator=g, dtype=torch.float64)
    z0 = 1e-2 * torch.rand(200, 5, generator=g, dtype=torch.float64)

    def f(z):
        return torch.sqrt(z @ A.T + b)

    def rows_left(value):
        left.append(value.isnan().any(1))
        return value

    left: list[torch.Tensor] = []
    with torch.no_grad():
        plain = deqcore.fixed_point(f, z0, solver=Picard(max_steps=100))
        solution = deqcore.fixed_point(lambda z: rows_left(f(z)), z0, solver=solver)
    assert torch.stack(left).any(0).all()
    assert plain.converged.all()
    assert solution.converged.all()
    torch.testing.assert_close(solution.value, plain.value, rtol=1e-2, atol=0.0)


@pytest.mark.parametrize("solver", MIXING, ids=name)
def test_a_plain_step_that_fails_ends_the_row_and_is_counted(solver):
    """f is NaN from its sixth call on: the retreat asks once more, and its answer is final."""
    calls = 0

    def f(z):
        nonlocal calls
        calls += 1
        return z @ A.T + b if calls < 6 else z * torch.nan

    A, b = affine(6, 0.9)
    with torch.no_grad():
        solution = deqcore.fixed_point(f, torch.zeros(2, 6, dtype=A.dtype), solver=solver)
    assert solution.status.tolist() == [Status.NONFINITE] * 2
    assert calls == solution.evaluations == 7
    assert solution.steps.tolist() == [7, 7]
    assert solution.value.isfinite().all()


@pytest.mark.parametrize("solver", MIXING, ids=name)
def test_a_mixed_step_that_fails_last_of_all_is_no_verdict(solver):
    z0 = torch.full((1, 1), 0.01, dtype=torch.float64)
    options = {"max_steps": 3}
    solution = deqcore.fixed_point(torch.sqrt, z0, solver=type(solver)(**options))
    assert solution.status.tolist() == [Status.MAX_STEPS]
    torch.testing.assert_close(solution.value, z0)


@pytest.mark.parametrize("solver", MIXING, ids=name)
def test_a_retreat_in_one_row_leaves_the_others_bitwise_equal(solver):
    A, b = affine(4, 0.9)
    domain = torch.tensor([[True], [False], [False]])

    def f(z):
        return torch.where(domain[: len(z)], (z.abs() * z.sign()).sqrt(), (z @ A.T + b))

    z0 = torch.full((3, 4), 0.01, dtype=torch.float64)
    together = deqcore.fixed_point(f, z0, solver=solver)
    for i in range(3):
        mine = domain[i : i + 1]
        alone = deqcore.fixed_point(
            lambda z, mine=mine: torch.where(mine, (z.abs() * z.sign()).sqrt(), z @ A.T + b),
            z0[i : i + 1],
            solver=solver,
        )
        if i == 0:
            assert torch.equal(alone.value[0], together.value[0])
            assert alone.steps[0] == together.steps[0]
    assert together.converged.all()


@pytest.mark.parametrize("memory", [2, 3, 4, 5, 6, 8, 10, 12, 20, 30])
@pytest.mark.parametrize("kind", [Broyden, Anderson])
def test_small_memory_converges_where_plain_iteration_does(kind, memory):
    """It used to stall at memory 6, 8 and 10 after 77 to 258 steps, at errors of 0.02 to 0.08."""
    limits = {"rtol": 1e-8, "atol": 0.0, "max_steps": 600}
    A, b = zip(*(affine(64, 0.95, seed) for seed in range(6)), strict=True)
    columns, b = torch.stack(A).mT.contiguous(), torch.stack(b)

    def f(z):
        return (z[:, None] @ columns)[:, 0] + b

    z0 = torch.zeros_like(b)
    with torch.no_grad():
        plain = deqcore.fixed_point(f, z0, solver=Picard(**limits))
        solution = deqcore.fixed_point(f, z0, solver=kind(memory=memory, **limits))
    assert plain.converged.all()
    assert solution.converged.all()
    assert (solution.steps <= 1.25 * plain.steps + 50).all()


def contraction(kind: str, dim: int, radius: float, seed: int) -> torch.Tensor:
    """A with |A| <= radius in the Euclidean norm."""
    A = torch.randn(dim, dim, generator=generator(seed), dtype=torch.float64)
    if kind == "symmetric":
        A = A + A.T
    elif kind == "rotation":
        A = torch.linalg.qr(A).Q
    elif kind == "shift":  # far from normal
        A = torch.eye(dim, dtype=A.dtype).roll(1, 1)
        A[-1] *= 0.5
    return A * (radius / torch.linalg.matrix_norm(A, 2))


@given(
    st.sampled_from(["symmetric", "rotation", "shift", "any"]),
    st.integers(2, 64),
    RADII,
    MEMORIES,
    st.sampled_from(["Anderson", "Anderson, restarts", "Broyden"]),
    st.integers(0, 999),
)
def test_mixing_is_hardly_slower_than_plain_iteration_on_a_contraction(
    kind, dim, radius, memory, method, seed
):
    """In strict form this holds for no method that forgets: see "What can fail" in the docs."""
    A = contraction(kind, dim, radius, seed)
    g = generator(seed + 1)
    b, z0 = torch.randn(2, 1, dim, generator=g, dtype=torch.float64)
    limits = {"rtol": 1e-8, "atol": 1e-12, "max_steps": 4000}
    solver = {
        "Anderson": Anderson(memory=memory, **limits),
        "Anderson, restarts": Anderson(memory=memory, restart=memory, **limits),
        "Broyden": Broyden(memory=memory, **limits),
    }[method]
    with torch.no_grad():
        plain = deqcore.fixed_point(lambda z: z @ A.T + b, z0, solver=Picard(**limits))
        solution = deqcore.fixed_point(lambda z: z @ A.T + b, z0, solver=solver)
    assert plain.converged.all()
    assert solution.converged.all(), solution
    assert (solution.steps <= 1.25 * plain.steps + 50).all()


@given(
    st.integers(2, 64), RADII, MEMORIES, st.sampled_from([Anderson, Broyden]), st.integers(0, 999)
)
def test_mixing_converges_wherever_plain_iteration_does_on_an_affine_map(
    dim, radius, memory, kind, seed
):
    """Here only the spectral radius is below one; in the Euclidean norm the map may expand."""
    A, b = affine(dim, radius, seed)
    limits = {"rtol": 1e-8, "atol": 1e-12}
    z0 = torch.zeros(1, dim, dtype=torch.float64)
    with torch.no_grad():
        plain = deqcore.fixed_point(
            lambda z: z @ A.T + b, z0, solver=Picard(max_steps=4000, **limits)
        )
        if plain.converged.all():
            solver = kind(memory=memory, max_steps=4000, **limits)
            solution = deqcore.fixed_point(lambda z: z @ A.T + b, z0, solver=solver)
            assert solution.converged.all(), solution
            assert (solution.steps <= 4 * plain.steps + 50).all()


@pytest.mark.parametrize("kind", [Anderson, Broyden])
def test_a_row_that_plain_steps_do_not_improve_has_stalled(kind):
    """Residuals that only grow, whatever is done: once by mixing, and once more without."""
    z0 = torch.tensor([[1.0, 2.0, 3.0]], dtype=torch.float64)
    directions = torch.randn(50, 3, generator=generator(1), dtype=torch.float64)
    calls = 0

    def f(z):
        nonlocal calls
        calls += 1
        return z + (1 + 0.1 * calls) * directions[calls] / directions[calls].norm()

    with torch.no_grad():
        solution = deqcore.fixed_point(f, z0, solver=kind(patience=7, max_steps=40))
    assert solution.status.tolist() == [Status.STALLED]
    assert solution.steps.tolist() == [1 + 7 + 7]
    torch.testing.assert_close(solution.value, z0)


@pytest.mark.parametrize("solver", MIXING, ids=name)
def test_gradients_through_a_retreat_are_those_of_the_rows(solver):
    """Unrolled follows the iterates: a step that was taken back brings no NaN of its own."""
    shift = torch.tensor([[0.02], [0.5]], dtype=torch.float64, requires_grad=True)

    def f(z):  # its gradient is finite outside the domain too
        inside = z + shift > 0
        root = torch.where(inside, z + shift, 1.0).sqrt()
        return torch.where(inside, root, torch.nan)

    z0 = torch.full((2, 1), 0.01, dtype=torch.float64)
    solution = deqcore.fixed_point(f, z0, solver=solver, adjoint=Unrolled())
    assert solution.converged.all()
    solution.value.sum().backward()
    assert shift.grad.isfinite().all()
