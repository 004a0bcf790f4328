"""Transforms: a right answer or an error that says what has one, never a silent wrong one."""

from __future__ import annotations

import pytest
import torch
from torch.autograd import forward_ad

import deqcore
from deqcore import Implicit, Phantom, Unrolled

ADJOINTS = [Implicit(), Phantom(), Unrolled()]


@pytest.fixture(params=ADJOINTS, ids=lambda adjoint: type(adjoint).__name__)
def adjoint(request):
    return request.param


def solution_of(w, adjoint):
    return deqcore.fixed_point(lambda z: 0.5 * z + w, torch.zeros(2, 3), adjoint=adjoint).value


def right_or_error(compute, expected):
    try:
        got = compute()
    except (RuntimeError, NotImplementedError) as error:
        assert len(str(error)) > 20  # noqa: PT017  (either outcome is fine)
    else:
        torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("grad", [True, False])
def test_forward_mode_is_that_of_the_adjoint(adjoint, grad):
    w = torch.ones(3)
    expected = torch.full((2, 3), 1.0 if isinstance(adjoint, Phantom) else 2.0)
    with torch.set_grad_enabled(grad):
        _, tangent = torch.func.jvp(lambda w: solution_of(w, adjoint), (w,), (w,))
    torch.testing.assert_close(tangent, expected, rtol=1e-3, atol=1e-3)


def test_forward_mode_of_autograd_itself_names_what_has_it():
    w = torch.ones(3)
    with forward_ad.dual_level(), pytest.raises(RuntimeError, match=r"torch\.func\.jvp"):
        solution_of(forward_ad.make_dual(w, w), Implicit())


def test_unrolled_has_forward_mode():
    w = torch.ones(3)
    _, tangent = torch.func.jvp(lambda w: solution_of(w, Unrolled()), (w,), (w,))
    torch.testing.assert_close(tangent, torch.full((2, 3), 2.0), rtol=1e-3, atol=1e-3)


def test_masked_cells_have_the_tangents_of_dense_ones(adjoint):
    mask = torch.arange(9).reshape(3, 3) % 2 == 0
    pattern = deqcore.SparsityPattern.from_mask(mask)
    places = mask.nonzero(as_tuple=True)
    values = 0.1 * torch.arange(1.0, 6.0)

    def solved(weight, adjoint):
        def f(z):
            return torch.tanh(weight(z)) + 1

        return deqcore.fixed_point(f, torch.zeros(2, 3), adjoint=adjoint).value

    def masked(values):
        return solved(lambda z: deqcore.masked_linear(z, values, pattern), adjoint)

    def dense(values):
        weight = torch.zeros(3, 3).index_put(places, values)
        return solved(lambda z: z @ weight.t(), adjoint)

    _, expected = torch.func.jvp(dense, (values,), (values,))
    assert expected.abs().min() > 0.01
    _, tangent = torch.func.jvp(masked, (values,), (values,))
    torch.testing.assert_close(tangent, expected, rtol=1e-4, atol=1e-5)


def test_func_grad_is_that_of_the_adjoint(adjoint):
    w = torch.ones(3)
    expected = torch.full((3,), 4.0 if not isinstance(adjoint, Phantom) else 2.0)
    gradient = torch.func.grad(lambda w: solution_of(w, adjoint).sum())(w)
    torch.testing.assert_close(gradient, expected, rtol=1e-3, atol=1e-3)


def test_batched_backward_is_right_or_an_error(adjoint):
    w = torch.ones(3, requires_grad=True)
    value = solution_of(w, adjoint)
    grads = torch.eye(6).reshape(6, 2, 3)
    rows = [torch.autograd.grad(value, w, g, retain_graph=True)[0] for g in grads]
    right_or_error(
        lambda: torch.autograd.grad(value, w, grads, is_grads_batched=True)[0], torch.stack(rows)
    )


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("check_every", [0, 1])
@pytest.mark.parametrize("start", [True, False])
def test_vmap_over_unrolled_steps_says_what_can_be_mapped(grad, check_every, start):
    """``start``: over z0, which f then does not show: it is constant."""
    solver = deqcore.Anderson(check_every=check_every)

    def mapped(w):
        z0, shift = (w.expand(2, 3), torch.ones(3)) if start else (torch.zeros(2, 3), w)
        f = (lambda z: shift.expand(2, 3)) if start else (lambda z: 0.5 * z + shift)
        return deqcore.fixed_point(f, z0, solver=solver, adjoint=Unrolled()).value

    with torch.set_grad_enabled(grad), pytest.raises(RuntimeError, match=r"vmap.*Implicit.*dim 0"):
        torch.func.vmap(mapped)(torch.ones(4, 3))


def test_vmap_of_a_backward_solve_says_so():
    w = torch.ones(3, requires_grad=True)
    value = solution_of(w, Implicit())
    with pytest.raises(RuntimeError, match="is_grads_batched"):
        torch.autograd.grad(value, w, torch.ones(6, 2, 3), is_grads_batched=True)


def test_a_solve_beside_what_vmap_maps_over_works():
    with torch.no_grad():
        got = torch.func.vmap(lambda w: w + solution_of(torch.ones(3), Implicit()))(
            torch.ones(4, 3)
        )
    torch.testing.assert_close(got, torch.full((4, 2, 3), 3.0), rtol=1e-3, atol=1e-3)
