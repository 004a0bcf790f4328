"""Forward mode and torch.func through masked matmuls: the derivatives of the dense layer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn import functional as F

from deqcore import masked_linear
from tests.support.masked_cases import Case, make

BACKENDS = ("auto", "sparse", "dense")
SPARSITIES = (0.5, 0.95)  # of the two ways of filling a dense weight, and both sides of "auto"
ARGUMENTS = ("x", "values", "bias")


@pytest.fixture(params=SPARSITIES)
def case(request: Any) -> Case:
    return make(16, 12, 3, request.param)


def functions(case: Case, name: str, backend: Any) -> tuple[Any, Any, Tensor]:
    """The masked product as a function of one argument, the dense one, and that argument."""
    places = case.pattern.mask().nonzero(as_tuple=True)

    def dense(x: Tensor, values: Tensor, bias: Tensor) -> Tensor:
        weight = torch.zeros(16, 12, dtype=values.dtype).index_put(places, values)
        return F.linear(x, weight, bias)

    def masked(x: Tensor, values: Tensor, bias: Tensor) -> Tensor:
        return masked_linear(x, values, case.pattern, bias, backend=backend)

    inputs = {"x": case.x, "values": case.values, "bias": case.bias}

    def of_one(function: Callable[..., Tensor]) -> Callable[[Tensor], Tensor]:
        return lambda one: function(**(inputs | {name: one})).square()

    return of_one(masked), of_one(dense), inputs[name]


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("name", ARGUMENTS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_jvp(case: Case, backend: str, name: str, grad: bool) -> None:
    masked, dense, at = functions(case, name, backend)
    with torch.set_grad_enabled(grad):
        ours = torch.func.jvp(masked, (at,), (at.sin(),))
        theirs = torch.func.jvp(dense, (at,), (at.sin(),))
    torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("requires_grad", [True, False])
@pytest.mark.parametrize("name", ARGUMENTS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_dual_tensors(case: Case, backend: str, name: str, requires_grad: bool) -> None:
    masked, dense, at = functions(case, name, backend)

    def tangent(function: Any) -> list[Tensor | None]:
        leaf = at.clone().requires_grad_(requires_grad)
        with forward_ad.dual_level():
            y = forward_ad.unpack_dual(function(forward_ad.make_dual(leaf, at.sin()))).tangent
            assert y is not None
            grad = torch.autograd.grad(y.square().sum(), leaf)[0] if requires_grad else None
            return [y.detach(), grad]

    torch.testing.assert_close(tangent(masked), tangent(dense))


@pytest.mark.parametrize("transform", ["grad", "jacrev", "jacfwd", "hessian", "vmap of grad"])
@pytest.mark.parametrize("name", ARGUMENTS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_transforms(case: Case, backend: str, name: str, transform: str) -> None:
    masked, dense, at = functions(case, name, backend)

    def run(function: Any) -> Tensor:
        if transform == "vmap of grad":
            several = torch.stack([at, at.sin(), at.cos()])
            return torch.vmap(torch.func.grad(lambda one: function(one).sum()))(several)
        if transform in ("grad", "hessian"):
            return getattr(torch.func, transform)(lambda one: function(one).sum())(at)
        return getattr(torch.func, transform)(function)(at)

    torch.testing.assert_close(run(masked), run(dense))


def test_grad_transform_in_no_grad_mode(case: Case) -> None:
    masked, dense, at = functions(case, "values", "sparse")
    with torch.no_grad():
        ours = torch.func.grad(lambda values: masked(values).sum())(at)
    torch.testing.assert_close(ours, torch.func.grad(lambda values: dense(values).sum())(at))


def test_forward_mode_of_each_op(case: Case) -> None:
    pattern, shape = case.pattern, case.pattern.shape
    ops, indices = torch.ops.deqcore, pattern.indices
    words = pattern._words
    weight = case.weight.clone()
    runs: list[tuple[Callable[..., Tensor], tuple[Tensor, ...]]] = [
        (lambda v: ops.masked_to_dense(v, indices, *shape), (case.values,)),
        (lambda v: ops.masked_expand(v, words, indices, *shape), (case.values,)),
        (lambda w: ops.masked_from_dense(w, indices), (weight,)),
        (pattern.to_dense, (case.values,)),
        (pattern.from_dense, (weight,)),
        (
            lambda g, x: ops.masked_outer(g, x, indices, *shape, pattern.block),
            (case.grad, case.x),
        ),
        (
            lambda x, v, b: ops.masked_two_four(x, v, indices, b, *shape),
            (case.x, case.values, case.bias),
        ),
        (
            lambda g, v: ops.masked_linear(g, v, indices, None, *shape, 1, True, False),
            (case.grad, case.values),
        ),
    ]
    for run, inputs in runs:
        leaves = [tensor.clone().requires_grad_() for tensor in inputs]
        assert torch.autograd.gradcheck(run, leaves, check_forward_ad=True, fast_mode=True)
