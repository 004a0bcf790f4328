"""The Jacobian penalty and the spectral radius, against dense linear algebra."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import deqcore
from deqcore import jacobian_penalty, spectral_radius
from deqcore.regularizers import _Linearization
from tests.support.problems import affine, generator, wave, wave_batch

SEEDS = st.integers(0, 2**31)
F64 = torch.float64


def matrices(batch, dim, seed):
    return torch.randn(batch, dim, dim, generator=generator(seed), dtype=F64)


def rowwise(z, J):  # [B, D], [B, D, D]
    return torch.einsum("bij,bj->bi", J, z)


def radii(J):
    return torch.linalg.eigvals(J).abs().amax(-1)


# Penalty


@given(batch=st.integers(1, 4), dim=st.integers(1, 9), seed=SEEDS)
def test_vjps_with_every_basis_vector_give_the_exact_frobenius_norm(batch, dim, seed):
    J = matrices(batch, dim, seed)
    point = _Linearization(rowwise, torch.zeros(batch, dim, dtype=F64), (J,))
    basis = torch.eye(dim, dtype=F64)
    total = sum(point.vjp(e.expand(batch, dim), create_graph=False).square().sum(1) for e in basis)
    torch.testing.assert_close(total, J.square().sum((1, 2)))


@given(batch=st.integers(1, 5), dim=st.integers(1, 20), seed=SEEDS)
def test_penalty_of_an_elementwise_map_is_exact_in_one_sample(batch, dim, seed):
    slope = torch.randn(batch, dim, generator=generator(seed), dtype=F64)
    penalty = jacobian_penalty(lambda z: slope * z, torch.ones(batch, dim, dtype=F64))
    torch.testing.assert_close(penalty, slope.square().mean())


def test_penalty_has_the_frobenius_norm_as_its_mean():
    batch, dim, samples = 3, 6, 3000
    J = matrices(batch, dim, 1)
    expected = J.square().sum() / (batch * dim)
    z = torch.zeros(batch, dim, dtype=F64)
    penalty = jacobian_penalty(rowwise, z, J, samples=samples, generator=generator(2))
    # The variance of one row's estimate: 2 * (|JJ^T|_F^2 - |diag|^2).
    gram = J @ J.mT
    off_diagonal = gram - torch.diag_embed(gram.diagonal(dim1=1, dim2=2))
    sigma = (2 * off_diagonal.square().sum() / samples).sqrt() / (batch * dim)
    assert abs(penalty - expected) < 4 * sigma


@given(seed=SEEDS)
def test_gradient_of_the_penalty_is_that_of_finite_differences(seed):
    z0, shift, _ = wave_batch(2, 4, seed)
    scale = torch.tensor(0.7, dtype=F64)

    def penalty(z, shift, scale):
        return jacobian_penalty(
            lambda z, s: torch.tanh(wave(z, s, scale)), z, shift, generator=generator(seed)
        )

    inputs = [t.requires_grad_() for t in (z0, shift, scale)]
    assert torch.autograd.gradcheck(penalty, inputs)


def test_penalty_of_a_solution_trains_the_cell_through_the_solve():
    A, b = affine(5, 0.5)
    scale = torch.tensor(0.9, dtype=F64, requires_grad=True)
    solver = deqcore.Anderson(rtol=1e-12, atol=0.0)

    def penalty(scale):
        def f(z):
            return scale * torch.tanh(z @ A.T + b)

        value = deqcore.fixed_point(
            f, torch.zeros(2, 5, dtype=F64), solver=solver, adjoint=deqcore.Implicit(solver=solver)
        ).value
        return jacobian_penalty(f, value, generator=generator(3))

    assert torch.autograd.gradcheck(penalty, scale, atol=1e-6)


def test_penalty_of_a_pytree_is_that_of_its_concatenation():
    J = matrices(3, 6, 4)
    z = torch.zeros(3, 6, dtype=F64)
    state = {"a": z[:, :4].reshape(3, 2, 2), "b": z[:, 4:]}

    def f(state):
        out = rowwise(torch.cat([state["a"].flatten(1), state["b"]], 1), J)
        return {"a": out[:, :4].reshape(3, 2, 2), "b": out[:, 4:]}

    one = jacobian_penalty(rowwise, z, J, generator=generator(5))
    torch.testing.assert_close(jacobian_penalty(f, state, generator=generator(5)), one)
    torch.testing.assert_close(
        spectral_radius(f, state, generator=generator(6)),
        spectral_radius(rowwise, z, J, generator=generator(6)),
    )


def test_half_precision_states_give_float32():
    z = torch.ones(2, 3, dtype=torch.bfloat16)
    assert jacobian_penalty(lambda z: 0.5 * z, z) == 0.25
    assert jacobian_penalty(lambda z: 0.5 * z, z).dtype == torch.float32
    assert spectral_radius(lambda z: 0.5 * z, z).dtype == torch.float32


# Spectral radius


@given(batch=st.integers(1, 4), dim=st.integers(1, 12), seed=SEEDS)
def test_radius_is_exact_when_the_krylov_space_is_everything(batch, dim, seed):
    J = matrices(batch, dim, seed)
    radius = spectral_radius(rowwise, torch.zeros(batch, dim, dtype=F64), J, krylov=dim + 3)
    torch.testing.assert_close(radius, radii(J), rtol=1e-6, atol=1e-9)


@given(angle=st.floats(0, math.pi), dim=st.integers(1, 6))
def test_radius_of_rotations_and_reflections_is_found(angle, dim):
    c, s = 0.9 * math.cos(angle), 0.9 * math.sin(angle)
    turn = torch.tensor([[c, -s], [s, c]], dtype=F64)
    flip = torch.tensor([[0.9, 0.0], [0.0, -0.9]], dtype=F64)
    J = torch.stack([torch.block_diag(*[block] * dim) for block in (turn, flip)])
    radius = spectral_radius(rowwise, torch.ones(2, 2 * dim, dtype=F64), J)
    torch.testing.assert_close(radius, torch.full((2,), 0.9, dtype=F64))


@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_rows_whose_krylov_space_ends_early_leave_others_alone(dtype):
    dim = 16
    J = matrices(5, dim, 7).to(dtype)
    J[0] = 0.7 * torch.eye(dim, dtype=dtype)  # ends after 1 step
    J[1] = torch.outer(J[1, 0], J[1, 1])  # after 2
    J[2] = 0
    J[3] = torch.diag(torch.ones(dim - 1, dtype=dtype), 1)  # nilpotent: every eigenvalue is 0
    radius = spectral_radius(rowwise, torch.zeros(5, dim, dtype=dtype), J, krylov=dim)
    expected = radii(J.double()).to(dtype)
    keep = [0, 1, 2, 4]
    torch.testing.assert_close(radius[keep], expected[keep], rtol=1e-4, atol=1e-6)
    assert radius[3] < 0.5  # an eigenvalue of multiplicity n moves by eps ** (1 / n)


def test_few_vectors_find_a_separated_eigenvalue_in_many_dimensions():
    J = torch.diag(torch.linspace(-0.5, 0.5, 400, dtype=F64))
    J[17, 17] = -0.95
    radius = spectral_radius(lambda z: z @ J.T, torch.zeros(3, 400, dtype=F64))
    torch.testing.assert_close(radius, torch.full((3,), 0.95, dtype=F64), rtol=1e-6, atol=0)


def test_radius_of_a_row_that_is_not_finite_is_nan_and_its_own():
    J = matrices(3, 5, 8)
    expected = radii(J)
    J[1, 0, 0] = torch.nan
    radius = spectral_radius(rowwise, torch.ones(3, 5, dtype=F64), J)
    assert radius[1].isnan()
    torch.testing.assert_close(radius[[0, 2]], expected[[0, 2]])


# Both


def test_modes_do_not_matter_and_nothing_is_kept():
    cell = nn.Sequential(nn.Linear(6, 6), nn.Tanh()).eval().requires_grad_(False)
    z = torch.randn(2, 6)
    before = {name: value.clone() for name, value in cell.state_dict().items()}
    radius = spectral_radius(cell, z, generator=generator(9))
    penalty = jacobian_penalty(cell, z, generator=generator(9))
    for mode in (torch.no_grad(), torch.inference_mode()):
        with mode:
            x = z.clone()
            again = jacobian_penalty(cell, x, generator=generator(9))
            torch.testing.assert_close(again, penalty.detach())
            assert not again.requires_grad
            torch.testing.assert_close(spectral_radius(cell, x, generator=generator(9)), radius)
    assert not radius.requires_grad
    assert not z.requires_grad
    assert all(torch.equal(value, before[name]) for name, value in cell.state_dict().items())


def test_a_constant_map_has_neither():
    z = torch.ones(2, 3)
    weight = torch.ones(2, 3, requires_grad=True)
    for f in (lambda z: torch.ones(2, 3), lambda z: 2 * weight):
        assert jacobian_penalty(f, z) == 0
        assert spectral_radius(f, z).tolist() == [0, 0]


@pytest.mark.parametrize("shape", [(0, 3), (2, 0), ()])
def test_empty_and_scalar_states(shape):
    z = torch.ones(shape)
    rows = shape[0] if shape else 1
    expected = 0.5 if z.numel() else 0.0
    assert spectral_radius(lambda z: 0.5 * z, z).tolist() == pytest.approx([expected] * rows)
    assert jacobian_penalty(lambda z: 0.5 * z, z) == expected**2


def test_a_generator_makes_them_repeatable_and_spares_the_global_one():
    J = matrices(2, 8, 10)
    z = torch.zeros(2, 8, dtype=F64)
    state = torch.get_rng_state()
    for function in (jacobian_penalty, lambda *a, **k: spectral_radius(*a, krylov=3, **k)):
        first, second, third = (
            function(rowwise, z, J, generator=generator(seed)) for seed in (1, 1, 2)
        )
        assert torch.equal(first, second)
        assert not torch.equal(first, third)
    assert torch.equal(torch.get_rng_state(), state)


def test_wrong_arguments_are_named():
    z = torch.ones(2, 3)
    for bad in (0, 1.5, True, None):
        with pytest.raises(ValueError, match="samples: expected an integer of at least 1"):
            jacobian_penalty(torch.tanh, z, samples=bad)
        with pytest.raises(ValueError, match="krylov: expected an integer of at least 1"):
            spectral_radius(torch.tanh, z, krylov=bad)
    for function in (jacobian_penalty, spectral_radius):
        with pytest.raises(TypeError, match="f: expected a callable, got Tensor"):
            function(z, torch.tanh)
        with pytest.raises(TypeError, match="expected a tensor, got float"):
            function(torch.tanh, 1.0)
        with pytest.raises(ValueError, match=r"expected shape \(2, 3\)"):
            function(lambda z: z[:, :2], z)


def test_both_work_where_the_device_is(device):
    z = torch.zeros(3, 4, device=device)
    for rng in (None, torch.Generator().manual_seed(1), torch.Generator(device).manual_seed(1)):
        radius = spectral_radius(lambda z: 0.5 * z, z, generator=rng)
        penalty = jacobian_penalty(lambda z: 0.5 * z, z, generator=rng)
        assert (radius.device.type, penalty.device.type) == (device.type, device.type)
        assert radius.tolist() == pytest.approx([0.5] * 3)
        assert penalty.item() == pytest.approx(0.25)
