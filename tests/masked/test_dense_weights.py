"""Dense weights of kept values: filled once for as long as the values are what they were."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import deqcore
from deqcore import MaskedLinear, SparsityPattern, masked_linear
from deqcore.sparse import dense_weights
from deqcore.sparse.dense_weights import SolveWeights, dense_weight

F32 = torch.float32


@pytest.fixture
def fills(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """The values of each weight that is filled."""
    made: list[Tensor] = []
    original = SparsityPattern.to_dense

    def to_dense(self: SparsityPattern, values: Tensor) -> Tensor:
        made.append(values)
        return original(self, values)

    monkeypatch.setattr(SparsityPattern, "to_dense", to_dense)
    return made


@pytest.fixture(autouse=True)
def _none_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dense_weights, "_kept", {})


@pytest.fixture
def pattern() -> SparsityPattern:
    return SparsityPattern.from_scores(torch.rand(12, 12), 0.6)


@pytest.fixture
def layer(pattern: SparsityPattern) -> MaskedLinear:
    return MaskedLinear(pattern, backend="dense")


def exact(layer: MaskedLinear, x: Tensor) -> Tensor:
    return F.linear(x, layer.weight.detach(), layer.bias)


def test_inference_fills_once_until_the_values_change(
    layer: MaskedLinear, fills: list[Tensor]
) -> None:
    x = torch.randn(3, 12)
    state = {name: value.clone() for name, value in layer.state_dict().items()}
    changes = [
        lambda: None,
        lambda: layer.values.mul_(2),
        lambda: layer.load_state_dict(state),
        lambda: setattr(layer.values, "data", torch.randn_like(layer.values)),
        lambda: torch.optim.SGD([layer.values], 1.0, weight_decay=0.5).step(),
        lambda: setattr(layer, "values", nn.Parameter(torch.randn_like(layer.values))),
        lambda: layer.double().float(),
    ]
    with torch.no_grad():
        for change in changes:
            layer.values.grad = torch.ones_like(layer.values)
            change()
            expected = exact(layer, x)
            fills.clear()
            for _ in range(3):
                assert torch.equal(layer(x), expected)
            assert len(fills) == 1


def test_memory_that_comes_back_is_not_taken_for_what_it_held(pattern: SparsityPattern) -> None:
    values = torch.randn(pattern.kept)
    first = values.data_ptr()
    dense_weight(values, pattern, F32)
    for _ in range(50):  # the allocator hands out what was freed last
        values.data = torch.randn(pattern.kept)
        assert values.data_ptr() != first
    assert torch.equal(dense_weight(values, pattern, F32), pattern.to_dense(values))


def test_a_solve_fills_once_and_has_the_same_bits(
    layer: MaskedLinear, fills: list[Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    x = torch.randn(4, 12)

    def train() -> list[Tensor]:
        layer.zero_grad()
        solution = deqcore.fixed_point(lambda z: 0.5 * torch.tanh(layer(z)) + x, x)
        solution.value.square().sum().backward()
        assert solution.evaluations > 3
        return [solution.value.detach(), layer.values.grad, layer.bias.grad]

    for _ in range(2):
        fills.clear()
        kept = train()
        assert len(fills) == 1
        assert not dense_weights._kept, "a training step changes the values next"
    monkeypatch.setattr(dense_weights, "_may_keep", lambda *args: False)
    assert all(torch.equal(a, b) for a, b in zip(kept, train(), strict=True))
    assert len(fills) > 4


@pytest.mark.parametrize("backend", ["dense", "sparse"])
def test_a_call_like_one_before_is_checked_as_it_was(
    pattern: SparsityPattern, backend: Any
) -> None:
    values, x, bias = torch.randn(pattern.kept), torch.randn(3, 12), torch.randn(12)

    def multiply(*args: Any) -> Tensor:
        return masked_linear(*args, backend=backend)

    expected = multiply(x, values, pattern, bias)
    assert torch.equal(multiply(x, values, pattern, bias), expected)
    for bad, message in (
        ((x.double(), values, pattern, bias), "values: expected x's dtype torch.float64"),
        ((x, values, pattern, bias[:1]), r"bias: expected shape \(12,\), got \(1,\)"),
        ((x, values, pattern, bias.double()), "bias: expected x's dtype torch.float32"),
        ((x, values[1:], pattern, bias), "values: expected shape"),
        ((x[:, 1:], values, pattern, bias), "x: expected a last dimension of 12"),
        ((x.to("meta"), values, pattern, bias), "values: expected x's device meta"),
    ):
        with pytest.raises(ValueError, match=message):
            multiply(*bad)
    with pytest.raises(ValueError, match="backend: expected 'auto', 'sparse' or 'dense'"):
        masked_linear(x, values, pattern, bias, backend="other")
    with torch.autocast("cpu", torch.bfloat16):
        assert multiply(x, values, pattern, bias).dtype == torch.bfloat16
    assert torch.equal(multiply(x, values, pattern, bias), expected)


def test_training_keeps_nothing(layer: MaskedLinear, fills: list[Tensor]) -> None:
    x = torch.randn(3, 12)
    for _ in range(2):
        layer(x).sum().backward()
    assert len(fills) == 2
    assert not dense_weights._kept


def test_what_no_counter_counts_is_seen_after_a_training_step(layer: MaskedLinear) -> None:
    x = torch.randn(3, 12)
    with torch.no_grad():
        layer(x)
    layer(x).sum().backward()
    layer.values.data.mul_(2)
    with torch.no_grad():
        assert torch.equal(layer(x), exact(layer, x))


def test_second_derivatives_reach_the_values(pattern: SparsityPattern) -> None:
    values = torch.randn(pattern.kept, dtype=torch.float64, requires_grad=True)
    x = torch.randn(3, 12, dtype=torch.float64, requires_grad=True)

    def f(x: Tensor, values: Tensor) -> Tensor:
        with torch.no_grad():
            masked_linear(x, values, pattern, backend="dense")
        return masked_linear(x, values, pattern, backend="dense").square()

    assert torch.autograd.gradcheck(f, (x, values))
    assert torch.autograd.gradgradcheck(f, (x, values))


def test_autocast_keeps_the_weight_in_its_dtype(layer: MaskedLinear, fills: list[Tensor]) -> None:
    x = torch.randn(3, 12)
    for dtype in (torch.bfloat16, F32):
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype != F32):
            with torch.no_grad():
                expected = F.linear(x, layer.weight, layer.bias)
                fills.clear()
                assert torch.equal(layer(x), expected)
                assert torch.equal(layer(x), expected)
            layer(x).float().square().sum().backward()
            assert len(fills) == 1
    assert layer.values.grad.dtype == F32


def test_a_weight_kept_in_inference_mode_serves_a_graph(layer: MaskedLinear) -> None:
    x = torch.randn(3, 12, requires_grad=True)
    layer.requires_grad_(False)
    with torch.inference_mode():
        layer(x)
    layer(x).sum().backward()
    torch.testing.assert_close(x.grad, layer.weight.sum(0).expand(3, 12))


def test_values_made_in_inference_mode_are_not_kept(pattern: SparsityPattern) -> None:
    with torch.inference_mode():
        values = torch.randn(pattern.kept)
        for _ in range(2):
            weight = dense_weight(values, pattern, F32)
            assert torch.equal(weight, pattern.to_dense(values))
            values.mul_(2)  # no counter counts this


def test_programs_made_from_a_call_compute_the_weight(layer: MaskedLinear) -> None:
    x = torch.randn(3, 12)
    with torch.no_grad():
        layer(x)
        traced = torch.jit.trace(layer, x)
        exported = torch.export.export(layer, (x,)).module()
        graph = torch.fx.experimental.proxy_tensor.make_fx(
            lambda values, x: masked_linear(x, values, layer.pattern, backend="dense")
        )(layer.values, x)
        compiled = torch.compile(layer, backend="eager", fullgraph=True)
        compiled(x)
        layer.values.mul_(3)
        for module in (traced, compiled):
            assert torch.equal(module(x), exact(layer, x))
        twice = layer.values * 2
        assert torch.equal(graph(twice, x), F.linear(x, layer.pattern.to_dense(twice)))
        assert "deqcore.masked_" in str(exported.graph)


def test_transforms_do_not_see_a_kept_weight(layer: MaskedLinear) -> None:
    x, values = torch.randn(3, 12), layer.values.detach()

    def loss(values: Tensor) -> Tensor:
        return masked_linear(x, values, layer.pattern, backend="dense").square().sum()

    with torch.no_grad():
        loss(values)
        batch = torch.stack([values, 2 * values])
        assert torch.equal(torch.func.vmap(loss)(batch), torch.stack([loss(v) for v in batch]))
        assert torch.func.grad(loss)(values).abs().sum() > 0


def test_a_captured_solve_fills_when_it_begins_and_reads_in_between(
    layer: MaskedLinear, fills: list[Tensor]
) -> None:
    weights = SolveWeights()
    values, pattern = layer.values, layer.pattern
    with weights.used():
        first = dense_weight(values, pattern, F32)
        with torch.no_grad():
            values.mul_(2)
        second = dense_weight(values, pattern, F32)
        assert first.data_ptr() == second.data_ptr()
        assert len(fills) == 1
        weights.fill()
        third = dense_weight(values, pattern, F32)
    assert torch.equal(third, pattern.to_dense(values))
    (grad,) = torch.autograd.grad(third.sum(), values)
    assert torch.equal(grad, torch.ones_like(values))
    with weights.used(), torch.no_grad():
        made = dense_weight(values * 2, pattern, F32)
    assert torch.equal(made, pattern.to_dense(values * 2))


def test_a_weight_goes_with_its_values(pattern: SparsityPattern) -> None:
    values: Any = torch.randn(pattern.kept)
    weight = weakref.ref(dense_weight(values, pattern, F32))
    assert weight() is not None
    del values
    gc.collect()
    assert weight() is None
