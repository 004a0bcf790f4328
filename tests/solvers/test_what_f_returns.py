"""f that returns more than a state, in another order or layout; and what it draws or caches."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

import deqcore
from deqcore import (
    Anderson,
    Broyden,
    ConvergenceError,
    Implicit,
    ImplicitLayer,
    Phantom,
    Picard,
    Unrolled,
)
from deqcore.normalization import spectral_normalize

TIGHT = Anderson(rtol=1e-10, atol=1e-12, max_steps=200, patience=200)
ADJOINTS = [Implicit(solver=TIGHT), Phantom(), Unrolled(), Unrolled(checkpoint_every=2)]


@pytest.fixture(params=ADJOINTS, ids=str)
def adjoint(request):
    return request.param


def halved(z, w):
    return 0.5 * z + w, {"loads": z.square().sum(1), "name": "halved"}


# aux


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("batch", ["rows", "coupled"])
def test_aux_is_that_of_the_evaluation_at_the_solution(adjoint, grad, batch):
    w = torch.rand(3, 2, dtype=torch.float64).requires_grad_()
    with torch.set_grad_enabled(grad):
        solution = deqcore.fixed_point(
            halved, torch.zeros_like(w), w, solver=Picard(max_steps=4), adjoint=adjoint,
            batch=batch, has_aux=True,
        )  # fmt: skip
    assert not solution.converged.all()  # the last iterate may be another one
    assert torch.equal(solution.aux["loads"], solution.value.detach().square().sum(1))
    assert solution.aux["name"] == "halved"
    assert not solution.aux["loads"].requires_grad


def test_values_and_gradients_do_not_depend_on_aux(adjoint):
    w = torch.rand(3, 2, dtype=torch.float64).requires_grad_()

    def solve(f, **options):
        solution = deqcore.fixed_point(f, torch.zeros_like(w), w, adjoint=adjoint, **options)
        return solution.value, torch.autograd.grad(solution.value.square().sum(), w)[0]

    with_aux = solve(halved, has_aux=True)
    without = solve(lambda z, w: halved(z, w)[0])
    for a, b in zip(with_aux, without, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("grad", [True, False])
def test_root_and_layer_have_aux_too(grad):
    w = torch.rand(3, 2, requires_grad=True)
    with torch.set_grad_enabled(grad):
        found = deqcore.root(
            lambda z: (w - 0.5 * z, z.sum(1)), torch.zeros(3, 2), has_aux=True, solver=TIGHT
        )
        value, aux = ImplicitLayer(halved, has_aux=True)(w)
    torch.testing.assert_close(found.value, 2 * w)
    assert torch.equal(found.aux, found.value.detach().sum(1))
    assert torch.equal(aux["loads"], value.detach().square().sum(1))


def test_aux_shares_no_memory_with_the_value():
    with torch.no_grad():
        solution = deqcore.fixed_point(lambda z: (0.5 * z + 1, z), torch.zeros(2, 3), has_aux=True)
    before = solution.aux.clone()
    solution.value.zero_()
    assert torch.equal(solution.aux, before)


def test_a_pair_without_has_aux_is_an_error_that_names_it():
    w = torch.ones(2, 3)
    with pytest.raises(ValueError, match="has_aux=True"):
        deqcore.fixed_point(halved, torch.zeros(2, 3), w)
    with pytest.raises(ValueError, match="has_aux=True"):
        deqcore.spectral_radius(halved, torch.zeros(2, 3), w)
    with pytest.raises(ValueError, match=r"g\(z\): expected a pair \(z, aux\).*got Tensor"):
        deqcore.root(lambda z: -z, torch.zeros(2, 3), has_aux=True)


def test_layer_with_aux_says_so_and_is_copied_and_pickled():
    layer = ImplicitLayer(AuxCell(), has_aux=True)
    assert "has_aux=True" in repr(layer)
    x = torch.randn(2, 3)
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(other(x)[1], layer(x)[1])
    assert "has_aux" not in repr(ImplicitLayer(nn.Identity()))


class AuxCell(nn.Module):
    def forward(self, z, x):
        return 0.5 * torch.tanh(z) + x, z.norm(dim=1)


# Order and layout


@pytest.mark.parametrize("solve", [deqcore.fixed_point, deqcore.root])
def test_keys_of_a_dict_may_come_in_another_order(solve):
    sign = 1 if solve is deqcore.fixed_point else -1
    z0 = {"a": torch.zeros(2, 3), "b": {"c": torch.zeros(2, 1), "d": torch.zeros(2, 2)}}

    def f(z):
        b = {"d": sign * 0.5 * z["b"]["d"] + 3, "c": sign * 0.5 * z["b"]["c"] + 2}
        return {"b": b, "a": sign * 0.5 * z["a"] + 1}

    solution = solve(f, z0, solver=TIGHT)
    assert list(solution.value) == ["a", "b"]
    torch.testing.assert_close(solution.value["a"], torch.full((2, 3), 2.0))
    torch.testing.assert_close(solution.value["b"]["c"], torch.full((2, 1), 4.0))
    torch.testing.assert_close(solution.value["b"]["d"], torch.full((2, 2), 6.0))


def test_scales_of_a_root_go_by_key():
    z0 = {"a": torch.zeros(2, 3), "b": torch.zeros(2, 1)}
    g = lambda z: {"b": 2 - 0.5 * z["b"], "a": 1 - 0.5 * z["a"]}

    def steps(scale):
        return deqcore.root(g, z0, u_scale=scale, f_scale=scale, solver=TIGHT).residual

    assert torch.equal(steps({"b": 2.0, "a": 1.0}), steps({"a": 1.0, "b": 2.0}))


@pytest.mark.parametrize("other", [{"a": 1}, {"a": 1, "b": 1, "c": 1}, [1, 1], {"a": 1, "b": [1]}])
def test_another_structure_is_an_error(other):
    z0 = {"a": torch.zeros(2, 3), "b": torch.zeros(2, 3)}
    value = torch.utils._pytree.tree_map(lambda _: torch.zeros(2, 3), other)
    with pytest.raises(ValueError, match=r"f\(z\): expected the structure of z0"):
        deqcore.fixed_point(lambda z: value, z0)


@pytest.mark.parametrize("layout", [torch.sparse_coo, torch.sparse_csr])
@pytest.mark.parametrize("tree", [True, False])
@pytest.mark.filterwarnings("ignore:Sparse CSR")
def test_a_sparse_value_is_an_error_that_says_what_to_do(layout, tree):
    def f(z):
        if tree:
            return {"a": (0.5 * z["a"] + 1).to_sparse(layout=layout), "b": z["b"]}
        return (0.5 * z + 1).to_sparse(layout=layout)

    z0 = {"a": torch.zeros(2, 3), "b": torch.zeros(2, 1)} if tree else torch.zeros(2, 3)
    with pytest.raises(TypeError, match=r"f\(z\): expected a strided.*to_dense"):
        deqcore.fixed_point(f, z0)
    if not tree:
        with pytest.raises(TypeError, match=r"g\(z\): expected a strided.*to_dense"):
            deqcore.root(f, z0)
        with pytest.raises(TypeError, match=r"z0: expected a strided.*to_dense"):
            deqcore.fixed_point(lambda z: z, z0.to_sparse(layout=layout))


# Caches of parametrizations


class Normed(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(3, 3)
        self.double()
        spectral_normalize(self, 0.7)

    def forward(self, z, x):
        return torch.tanh(self.linear(z)) + x


@pytest.mark.parametrize("filled", [False, True], ids=["empty", "filled"])
def test_gradients_inside_a_cache_of_parametrizations_are_those_without(adjoint, filled):
    torch.manual_seed(3)
    cell = Normed().eval()
    x = torch.randn(4, 3, dtype=torch.float64)

    def gradients():
        cell.zero_grad()
        if filled:
            cell(x, x)
        value = deqcore.fixed_point(cell, torch.zeros_like(x), x, adjoint=adjoint).value
        value.square().sum().backward()
        return [p.grad.clone() for p in cell.parameters()]

    plain = gradients()
    with parametrize.cached():
        cached = gradients()
    assert len(plain) == 2
    for a, b in zip(plain, cached, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=0)


def test_a_cache_of_parametrizations_still_saves_work():
    cell, calls = Normed().eval(), []
    norm = cell.linear.parametrizations.weight[0]
    norm.register_forward_hook(lambda *_: calls.append(1))
    x = torch.randn(4, 3, dtype=torch.float64)
    with parametrize.cached():
        solution = deqcore.fixed_point(cell, torch.zeros_like(x), x)
        assert solution.evaluations > 4
        assert len(calls) == 2  # without a graph, and with one
        deqcore.fixed_point(cell, torch.zeros_like(x), x)
        assert len(calls) == 2


# Randomness


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("solver", [Anderson(), Broyden(), Picard(max_steps=12)], ids=str)
@pytest.mark.parametrize("adjoint", ADJOINTS, ids=str)
def test_dropout_in_f_is_named_where_it_keeps_rows_from_converging(solver, adjoint, grad):
    x = torch.ones(32, 8, requires_grad=True)
    f = lambda z: 0.5 * nn.functional.dropout(z, 0.3) + x
    with torch.set_grad_enabled(grad):
        solution = deqcore.fixed_point(f, torch.zeros(32, 8), solver=solver, adjoint=adjoint)
    assert solution.draws_numbers
    with pytest.raises(ConvergenceError, match=r"f is random.*dropout.*FixedDropout"):
        solution.report().raise_for_status()


def test_rows_that_do_not_converge_for_other_reasons_are_not_called_random(adjoint):
    solution = deqcore.fixed_point(
        lambda z: 3 - z, torch.zeros(2, 3), solver=Picard(max_steps=30), adjoint=adjoint
    )
    assert not solution.draws_numbers
    with pytest.raises(ConvergenceError) as error:
        solution.raise_for_status()
    assert "random" not in str(error.value)


def test_a_layer_names_random_cells():
    class Random(nn.Module):
        def forward(self, z, x):
            return 0.5 * z + x + torch.rand_like(z)

    layer = ImplicitLayer(Random())
    layer(torch.ones(2, 3))
    with pytest.raises(ConvergenceError, match="f is random"):
        layer.report.raise_for_status()
