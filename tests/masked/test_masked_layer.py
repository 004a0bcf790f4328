"""MaskedLinear, prune_layer and restore_pruned."""

from __future__ import annotations

import copy
import re
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import prune

import deqcore
from deqcore import MaskedLinear, SparsityPattern
from deqcore.sparse import choice


def layer(sparsity: float = 0.75, bias: bool = True, structure: Any = None) -> MaskedLinear:
    linear = nn.Linear(64, 32, bias=bias)
    scores = linear.weight.detach().abs()
    pattern = SparsityPattern.from_scores(scores, sparsity, structure=structure)
    return MaskedLinear.from_linear(linear, pattern)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("structure", [None, 16])
def test_computes_what_the_linear_layer_would(bias: bool, structure: Any) -> None:
    masked = layer(bias=bias, structure=structure)
    linear = masked.to_linear()
    x = torch.randn(3, 5, 64)
    torch.testing.assert_close(masked(x), linear(x))
    assert torch.equal(masked.weight, linear.weight)
    again = MaskedLinear.from_linear(linear, masked.pattern)
    assert torch.equal(again.values, masked.values)
    assert (masked.bias is not None) == bias


def test_only_kept_values_are_parameters() -> None:
    masked = layer(0.75)
    shapes = {name: tuple(p.shape) for name, p in masked.named_parameters()}
    assert shapes == {"values": (512,), "bias": (32,)}
    assert not list(masked.buffers())


def test_from_linear_keeps_dtype_mode_and_requires_grad() -> None:
    linear = nn.Linear(8, 4, dtype=torch.bfloat16).eval()
    linear.weight.requires_grad_(False)
    masked = MaskedLinear.from_linear(linear, torch.ones(4, 8, dtype=torch.bool))
    assert masked.values.dtype == torch.bfloat16
    assert not masked.training
    assert not masked.values.requires_grad
    assert masked.bias is not None
    assert masked.bias.requires_grad
    back = masked.to_linear()
    assert not back.weight.requires_grad
    assert back.bias.requires_grad


def test_moves_with_its_pattern() -> None:
    masked = layer()
    meta = copy.deepcopy(masked).to("meta")
    assert meta.pattern.device.type == "meta"
    back = meta.to_empty(device="cpu")
    assert torch.equal(back.pattern.indices, masked.pattern.indices)
    assert masked.double().values.dtype == torch.float64
    assert masked.pattern.indices.dtype == torch.int32
    with torch.device("meta"):
        assert MaskedLinear(masked.pattern.to("meta")).values.device.type == "meta"


def test_the_pattern_follows_values_that_are_assigned_to_a_meta_layer() -> None:
    masked = layer()
    with torch.device("meta"):
        other = MaskedLinear(masked.pattern.to("meta"))
    other.load_state_dict(masked.state_dict(), assign=True)
    assert other.pattern.device.type == "cpu"
    x = torch.randn(2, 64)
    assert torch.equal(other(x), masked(x))


@pytest.mark.parametrize("sparsity", [0.0, 0.75, 1.0])
def test_writing_to_the_weight_changes_nothing_and_gradients_pass_it(sparsity: float) -> None:
    masked = layer(sparsity)
    before = masked.values.detach().clone()
    with torch.no_grad():
        masked.weight.add_(1)
    assert torch.equal(masked.values, before)
    masked.weight.sum().backward()
    assert masked.values.grad is not None
    assert torch.equal(masked.values.grad, torch.ones_like(before))


@pytest.mark.parametrize("backend", ["auto", "sparse", "dense"])
@pytest.mark.parametrize("structure", [None, 16])
def test_meta_tensors_give_the_shapes(backend: Any, structure: Any) -> None:
    masked = layer(structure=structure)
    masked.backend = backend
    meta = masked.to("meta")
    y = meta(torch.empty(2, 3, 64, device="meta"))
    assert y.device.type == "meta"
    assert y.shape == (2, 3, 32)
    y.sum().backward()
    assert meta.values.grad is not None
    assert meta.values.grad.shape == meta.values.shape


def test_repr_says_sparsity() -> None:
    assert repr(layer(0.75)) == (
        "MaskedLinear(in_features=64, out_features=32, bias=True, sparsity=75.0% (512 kept), "
        "backend='auto')"
    )
    assert "structure=16" in repr(layer(0.75, structure=16))


def test_initial_values_are_bounded_like_nn_linear() -> None:
    masked = MaskedLinear(layer().pattern)
    assert masked.values.abs().max() <= 1 / 8
    assert masked.values.std() > 0.05


def test_state_dict_round_trip() -> None:
    masked = layer()
    state = masked.state_dict()
    assert sorted(state) == ["bias", "pattern", "values"]
    other = MaskedLinear(masked.pattern)
    result = other.load_state_dict(state)
    assert not result.missing_keys
    assert not result.unexpected_keys
    x = torch.randn(2, 64)
    assert torch.equal(other(x), masked(x))


def test_safetensors_round_trip(tmp_path: Any) -> None:
    safetensors = pytest.importorskip("safetensors.torch")
    model = nn.Sequential(layer(), nn.ReLU())
    safetensors.save_file(model.state_dict(), tmp_path / "m.safetensors")
    state = safetensors.load_file(tmp_path / "m.safetensors")
    other = nn.Sequential(MaskedLinear(model[0].pattern), nn.ReLU())
    other.load_state_dict(state)
    assert torch.equal(other[0].values, model[0].values)


def test_state_dict_of_another_pattern_is_refused() -> None:
    first, second = nn.Sequential(layer(0.75)), nn.Sequential(layer(0.5))
    expected = (
        r"0\.pattern: expected the pattern of this layer \(512 of 32 x 64 kept\), got another "
        r"\(1024 of 32 x 64 kept\), and they differ in \d+ entries.*deqcore\.restore_pruned"
    )
    before = first[0].values.clone()
    with pytest.raises(RuntimeError, match=expected):
        first.load_state_dict(second.state_dict())
    with pytest.raises(RuntimeError, match=expected):
        first.load_state_dict(second.state_dict(), strict=False)
    assert torch.equal(first[0].values, before)


def test_state_dict_of_a_dense_layer_or_with_a_damaged_pattern_is_refused() -> None:
    masked = layer()
    state = masked.state_dict()
    damaged = state | {"pattern": state["pattern"][:-1]}
    with pytest.raises(RuntimeError, match=r"pattern: packed: damaged"):
        masked.load_state_dict(damaged)
    with pytest.raises(RuntimeError, match=r"weight is dense.*deqcore\.prune_layer"):
        masked.load_state_dict(nn.Linear(64, 32).state_dict())


@pytest.mark.parametrize("present", [["values", "bias"], ["values"]])
@pytest.mark.parametrize("strict", [True, False])
def test_values_without_a_pattern_are_not_loaded_and_what_is_there_is_not_called_missing(
    present: list[str], strict: bool
) -> None:
    model = nn.Sequential(layer())
    before = copy.deepcopy(model.state_dict())
    state = {f"0.{name}": torch.zeros_like(before[f"0.{name}"]) for name in present}
    with pytest.raises(
        RuntimeError, match=r"0\.values came without 0\.pattern.*whole state"
    ) as raised:
        model.load_state_dict(state, strict=strict)
    missing = re.search(r"Missing key\(s\) in state_dict: (.*?)\.\s", str(raised.value))
    absent = [f'"0.{name}"' for name in ("values", "bias", "pattern") if name not in present]
    assert (missing and missing[1].split(", ")) == (absent if strict else None)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_bias_alone_needs_no_pattern() -> None:
    model = nn.Sequential(layer())
    before = model[0].values.clone()
    result = model.load_state_dict({"0.bias": torch.ones(32)}, strict=False)
    assert sorted(result.missing_keys) == ["0.pattern", "0.values"]
    assert torch.equal(model[0].bias, torch.ones(32))
    assert torch.equal(model[0].values, before)


@pytest.mark.parametrize("bias", [True, False])
def test_where_a_state_dict_has_nothing_of_a_layer_all_of_it_is_missing(bias: bool) -> None:
    model = nn.Sequential(layer(bias=bias))
    result = model.load_state_dict({}, strict=False)
    expected = ["0.bias"] * bias + ["0.pattern", "0.values"]
    assert sorted(result.missing_keys) == expected
    assert not result.unexpected_keys


def test_bad_masks_and_linears() -> None:
    linear = nn.Linear(6, 4)
    with pytest.raises(ValueError, match=r"expected the weight's shape \(4, 6\).*got \(6, 4\)"):
        MaskedLinear.from_linear(linear, torch.ones(6, 4, dtype=torch.bool))
    with pytest.raises(TypeError, match=r"expected dtype torch\.bool, got torch\.float32"):
        MaskedLinear.from_linear(linear, torch.ones(4, 6))
    with pytest.raises(TypeError, match=r"expected an nn\.Linear, got Conv2d"):
        MaskedLinear.from_linear(nn.Conv2d(1, 1, 1), torch.ones(1, 1))
    normed = nn.utils.parametrizations.weight_norm(nn.Linear(6, 4))
    with pytest.raises(ValueError, match="remove_parametrizations first"):
        MaskedLinear.from_linear(normed, torch.ones(4, 6, dtype=torch.bool))
    with pytest.raises(TypeError, match="expected a SparsityPattern, got Tensor"):
        MaskedLinear(torch.ones(4, 6))
    with pytest.raises(ValueError, match="backend: expected"):
        MaskedLinear(layer().pattern, backend="fast")


def test_compiles_as_a_module() -> None:
    masked = layer()
    torch.compiler.reset()
    compiled = torch.compile(masked, fullgraph=True, backend="aot_eager")
    x = torch.randn(4, 64)
    torch.testing.assert_close(compiled(x), masked(x))


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("measured", [(0.9, 0.1, 0.1), (0.1, 0.1, 0.9), (0.1, 0.1, 0.1)])
def test_exports_with_a_dynamic_batch(
    monkeypatch: pytest.MonkeyPatch, measured: tuple[float, ...], strict: bool
) -> None:
    line = list(zip((1, 8, 64), measured, strict=True))
    monkeypatch.setattr(choice._kernels, "CPU_KERNELS", True)
    for op in ("linear", "outer"):
        name = choice.line_name(torch.float32, op, 1)
        monkeypatch.setitem(choice.LINES, name, line)
    masked, batch = layer(0.75), torch.export.Dim("batch")
    x = torch.randn(4, 64)
    program = torch.export.export(masked, (x,), dynamic_shapes=({0: batch},), strict=strict)
    called = {str(node.target) for node in program.graph.nodes}
    # One program for all sizes: sparse only where it wins at each of them.
    assert ("deqcore.masked_linear.default" in called) == (max(measured) < 0.75)
    for tokens in (2, 30, 200):
        x = torch.randn(tokens, 64)
        torch.testing.assert_close(program.module()(x), masked(x))


class Cell(nn.Module):
    """A contraction; its middle linear is used twice."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.inner = nn.Linear(width, width)
        self.outer = nn.Sequential(nn.Linear(width, width, bias=False))
        self.again = self.inner
        with torch.no_grad():
            for linear in (self.inner, self.outer[0]):
                linear.weight.mul_(0.5)

    def forward(self, z: Tensor, x: Tensor) -> Tensor:
        return 0.3 * torch.tanh(self.again(self.outer(torch.tanh(self.inner(z))))) + x


def test_prune_layer_replaces_every_linear_and_keeps_sharing() -> None:
    cell = Cell()
    dense = {name: p.detach().clone() for name, p in cell.named_parameters()}
    assert deqcore.prune_layer(cell, sparsity=0.8) is cell
    assert isinstance(cell.inner, MaskedLinear)
    assert cell.again is cell.inner
    assert isinstance(cell.outer[0], MaskedLinear)
    kept = cell.inner.pattern.mask()
    assert cell.inner.pattern.kept == round(0.2 * 1024)
    assert dense["inner.weight"].abs()[kept].min() >= dense["inner.weight"].abs()[~kept].max()
    assert torch.equal(cell.inner.values, dense["inner.weight"][kept])


def test_prune_layer_by_given_scores() -> None:
    cell = Cell()
    scores = {"outer.0": torch.rand(32, 32)}
    deqcore.prune_layer(cell, scores, 0.5, structure=16)
    assert isinstance(cell.inner, nn.Linear)
    assert isinstance(cell.outer[0], MaskedLinear)
    assert cell.outer[0].pattern.structure == 16
    single = deqcore.prune_layer(nn.Linear(4, 4), lambda linear: linear.weight, 0.5)
    assert isinstance(single, MaskedLinear)


def test_prune_layer_refuses_what_does_not_fit() -> None:
    with pytest.raises(ValueError, match=r"no linear named 'out'; there are 'inner'"):
        deqcore.prune_layer(Cell(), {"out": torch.ones(32, 32)})
    with pytest.raises(ValueError, match=r"scores of 'inner'.*\(32, 32\), got \(3, 3\)"):
        deqcore.prune_layer(Cell(), {"inner": torch.ones(3, 3)})
    with pytest.raises(ValueError, match=r"has no nn\.Linear to prune"):
        deqcore.prune_layer(nn.ReLU())


def test_restore_pruned_gives_a_dense_layer_the_patterns() -> None:
    pruned = deqcore.prune_layer(Cell(), sparsity=0.6)
    restored = deqcore.restore_pruned(Cell(), pruned.state_dict())
    z, x = torch.randn(3, 32), torch.randn(3, 32)
    assert torch.equal(restored(z, x), pruned(z, x))
    assert restored.again is restored.inner
    other = deqcore.restore_pruned(deqcore.prune_layer(Cell(), sparsity=0.9), pruned.state_dict())
    assert torch.equal(other(z, x), pruned(z, x))
    with pytest.raises(ValueError, match=r"inner\.pattern belongs to a pruned linear, but"):
        deqcore.restore_pruned(nn.Linear(2, 2), pruned.state_dict())


@pytest.mark.parametrize("frozen", ["weight", "bias"])
def test_restore_pruned_keeps_what_is_frozen(frozen: str) -> None:
    linear = nn.Linear(8, 4)
    state = deqcore.prune_layer(linear, sparsity=0.5).state_dict()
    getattr(linear, frozen).requires_grad_(False)
    for start in (linear, deqcore.prune_layer(linear, sparsity=0.25)):
        restored = deqcore.restore_pruned(start, state)
        assert isinstance(restored, MaskedLinear)
        assert restored.values.requires_grad == (frozen == "bias")
        assert restored.bias is not None
        assert restored.bias.requires_grad == (frozen == "weight")


@pytest.mark.parametrize("structure", [None, 16])
def test_pruned_implicit_layer_has_the_solution_and_gradients_of_the_masked_dense_one(
    structure: Any,
) -> None:
    dense = deqcore.ImplicitLayer(Cell().double(), deqcore.Anderson(rtol=1e-10, atol=1e-12))
    pruned = copy.deepcopy(dense)
    deqcore.prune_layer(pruned.cell, sparsity=0.5, structure=structure, backend="sparse")
    for name in ("inner", "outer.0"):
        masked = pruned.cell.get_submodule(name)
        assert isinstance(masked, MaskedLinear)
        prune.custom_from_mask(dense.cell.get_submodule(name), "weight", masked.pattern.mask())
    x = torch.randn(6, 32, dtype=torch.float64)
    ours, theirs = pruned(x), dense(x)
    torch.testing.assert_close(ours, theirs, rtol=1e-8, atol=1e-9)
    ours.square().sum().backward()
    theirs.square().sum().backward()
    for name in ("inner", "outer.0"):
        masked = pruned.cell.get_submodule(name)
        full = dense.cell.get_submodule(name).weight_orig.grad
        torch.testing.assert_close(
            masked.values.grad, masked.pattern.from_dense(full), rtol=1e-7, atol=1e-8
        )


@pytest.mark.parametrize("kind", [nn.Parameter, torch.Tensor.clone])
def test_assigning_a_weight_is_an_error_that_says_what_to_do(kind):
    layer = deqcore.MaskedLinear(deqcore.SparsityPattern.from_mask(torch.eye(3).bool()))
    before = layer.values.detach().clone()
    with pytest.raises(AttributeError, match=r"kept entries.*from_dense\(weight\)"):
        layer.weight = kind(torch.ones(3, 3))
    with torch.no_grad():
        layer.values.copy_(layer.pattern.from_dense(torch.ones(3, 3)))
    assert torch.equal(layer.weight, torch.eye(3))
    assert not torch.equal(before, layer.values)
