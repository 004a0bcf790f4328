"""masked_linear: derivatives, leading dimensions, autocast, torch.compile, backends, bad inputs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from deqcore import SparsityPattern, masked_linear
from deqcore.sparse import choice
from tests.support.masked_cases import DTYPES, Case, make

BACKENDS = ("auto", "sparse", "dense")


def leaves(case: Case) -> list[Tensor]:
    return [t.clone().requires_grad_() for t in (case.x, case.values, case.bias)]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("structure", [None, 16])
def test_gradients_of_any_order(backend: Any, structure: int | None) -> None:
    case = make(16, 32, 5, 0.5, structure)
    sampled = structure is not None  # or the Jacobian of 256 values takes seconds

    def run(x: Tensor, values: Tensor, bias: Tensor) -> Tensor:
        return masked_linear(x, values, case.pattern, bias, backend=backend)

    assert torch.autograd.gradcheck(run, leaves(case), fast_mode=sampled)
    assert torch.autograd.gradgradcheck(run, leaves(case), fast_mode=True)


def test_gradients_where_the_dense_weight_gradient_is_the_faster() -> None:
    case = make(6, 8, 5, 0.5)

    def run(x: Tensor, values: Tensor) -> Tensor:
        shape = (*case.pattern.shape, 1)
        return torch.ops.deqcore.masked_linear(
            x, values, case.pattern.indices, None, *shape, False, True
        )

    assert torch.autograd.gradcheck(run, leaves(case)[:2])
    assert torch.autograd.gradgradcheck(run, leaves(case)[:2])


@pytest.mark.parametrize("pattern", ["empty", "full"])
def test_gradients_of_an_empty_and_a_full_weight(pattern: str) -> None:
    case = make(4, 6, 3, 1.0 if pattern == "empty" else 0.0)
    for backend in BACKENDS:

        def run(x: Tensor, values: Tensor, bias: Tensor, backend: Any = backend) -> Tensor:
            return masked_linear(x, values, case.pattern, bias, backend=backend)

        assert torch.autograd.gradcheck(run, leaves(case))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gradients_against_the_dense_layer(dtype: torch.dtype) -> None:
    case = make(40, 56, 90, 0.8)
    exact = leaves(case)
    F.linear(exact[0], case.pattern.to_dense(exact[1]), exact[2]).backward(case.grad)
    case = case.to(dtype)
    ours = leaves(case)
    y = masked_linear(ours[0], ours[1], case.pattern, ours[2], backend="sparse")
    y.backward(case.grad)
    tolerance = 40 * torch.finfo(dtype).eps
    for mine, dense in zip(ours, exact, strict=True):
        assert mine.grad is not None
        assert dense.grad is not None
        assert mine.grad.dtype == dtype
        worst = (mine.grad.double() - dense.grad).abs().max()
        assert worst <= tolerance * dense.grad.abs().max()


def test_only_what_is_asked_for_is_computed_and_kept() -> None:
    case = make(8, 12, 5, 0.5)
    x, values, bias = leaves(case)
    masked_linear(x, values.detach(), case.pattern, bias, backend="sparse").sum().backward()
    assert x.grad is not None
    assert values.grad is None
    masked_linear(x.detach(), values, case.pattern, backend="sparse").sum().backward()
    assert values.grad is not None


@pytest.mark.parametrize("structure", [None, 16])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_opcheck(structure: int | None, dtype: torch.dtype) -> None:
    case = make(32, 48, 7, 0.6, structure).to(dtype)
    x, values, bias = leaves(case)
    shape = (*case.pattern.shape, case.pattern.block)
    indices = case.pattern.indices
    ops = torch.ops.deqcore
    for transposed in (False, True):
        inputs = (case.grad.clone().requires_grad_(), None) if transposed else (x, bias)
        args = (inputs[0], values, indices, inputs[1], *shape, transposed, False)
        torch.library.opcheck(ops.masked_linear.default, args)
    grad = case.grad.clone().requires_grad_()
    torch.library.opcheck(ops.masked_outer.default, (grad, x, indices, *shape))
    torch.library.opcheck(ops.masked_to_dense.default, (values, indices, *shape[:2]))
    words = case.pattern._words
    torch.library.opcheck(ops.masked_expand.default, (values, words, indices, *shape[:2]))
    weight = case.weight.detach().clone().requires_grad_()
    torch.library.opcheck(ops.masked_from_dense.default, (weight, indices))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("leading", [(), (5,), (2, 3, 4), (0,), (3, 0, 2), (1, 1)])
def test_any_leading_dimensions(backend: Any, leading: tuple[int, ...]) -> None:
    case = make(10, 12, 1, 0.5)
    x = torch.randn(*leading, 12, dtype=torch.float64, requires_grad=True)
    y = masked_linear(x, case.values, case.pattern, case.bias, backend=backend)
    torch.testing.assert_close(y, F.linear(x, case.weight, case.bias))
    y.sum().backward()
    assert x.grad is not None
    assert x.grad.shape == x.shape


@pytest.mark.parametrize("backend", BACKENDS)
def test_any_strides(backend: Any) -> None:
    case = make(10, 12, 20, 0.5)
    expected = F.linear(case.x, case.weight, case.bias)
    strided = torch.empty(12, 40, dtype=torch.float64).t()[::2]
    strided.copy_(case.x)
    values = torch.stack([case.values, case.values], 1)[:, 0]
    y = masked_linear(strided, values, case.pattern, case.bias, backend=backend)
    torch.testing.assert_close(y, expected)


@pytest.mark.parametrize("rows", [0, 3])
@pytest.mark.parametrize("columns", [0, 4])
@pytest.mark.parametrize("tokens", [0, 2])
@pytest.mark.parametrize("backend", BACKENDS)
def test_sizes_of_zero(rows: int, columns: int, tokens: int, backend: Any) -> None:
    case = make(rows, columns, tokens, 0.5)
    x, values, bias = leaves(case)
    y = masked_linear(x, values, case.pattern, bias, backend=backend)
    torch.testing.assert_close(y, F.linear(x, case.weight, bias))
    y.sum().backward()
    assert x.grad is not None
    assert x.grad.shape == (tokens, columns)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_autocast_casts_as_for_a_linear_layer(dtype: torch.dtype, backend: Any) -> None:
    case = make(32, 48, 9, 0.5).to(torch.float32)
    x, values, bias = leaves(case)
    with torch.autocast("cpu", dtype=dtype):
        y = masked_linear(x, values, case.pattern, bias, backend=backend)
        assert y.dtype == dtype
        double = masked_linear(x.double(), values.double(), case.pattern, backend=backend)
        assert double.dtype == torch.float64
    y.float().sum().backward()
    assert values.grad is not None
    assert values.grad.dtype == torch.float32


def test_autocast_leaves_float64_and_integers_alone_and_says_so() -> None:
    case = make(32, 48, 9, 0.5)
    single = case.values.float()
    expected = r"values: expected x's dtype torch.float64, got torch.bfloat16.*leaves float64 as it"
    with torch.autocast("cpu", dtype=torch.bfloat16):
        with message(expected):
            masked_linear(case.x, single, case.pattern)
        with message(r"values: expected x's dtype torch.bfloat16, got torch.float64"):
            masked_linear(case.x.float(), case.values, case.pattern)
        with message(r"x: expected float64, .*got torch.int64"):
            masked_linear(case.x.long(), single, case.pattern)


@pytest.mark.parametrize("backend", BACKENDS)
def test_compiles_without_a_break(backend: Any) -> None:
    case = make(32, 48, 9, 0.7).to(torch.float32)

    def run(x: Tensor, values: Tensor, bias: Tensor) -> Tensor:
        return masked_linear(x.sin(), values, case.pattern, bias, backend=backend).cos()

    torch.compiler.reset()
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    ours, eager = leaves(case), leaves(case)
    y = compiled(*ours)
    torch.testing.assert_close(y, run(*eager))
    y.sum().backward()
    run(*eager).sum().backward()
    for mine, other in zip(ours, eager, strict=True):
        torch.testing.assert_close(mine.grad, other.grad)


@pytest.mark.slow
def test_compiles_with_dynamic_shapes_under_inductor_and_autocast() -> None:
    case = make(32, 48, 9, 0.7).to(torch.float32)

    @torch.compile(fullgraph=True, dynamic=True)
    def run(x: Tensor, values: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return masked_linear(x, values, case.pattern, backend="sparse")

    for tokens in (3, 8, 70):
        x = torch.randn(tokens, 48)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            expected = masked_linear(x, case.values, case.pattern, backend="sparse")
        torch.testing.assert_close(run(x, case.values), expected)


def test_auto_takes_the_table_s_side(monkeypatch: pytest.MonkeyPatch) -> None:
    called: list[str] = []
    original = SparsityPattern.to_dense
    monkeypatch.setattr(
        SparsityPattern, "to_dense", lambda *a: called.append("dense") or original(*a)
    )
    name = choice.line_name(torch.float64, "linear", 1)
    monkeypatch.setattr(choice._kernels, "CPU_KERNELS", True)
    for least, expected in ((0.6, []), (0.8, ["dense"])):
        called.clear()
        monkeypatch.setitem(choice.LINES, name, [(1, least)])
        case = make(32, 48, 20, 0.7)  # a pattern remembers its choices
        masked_linear(case.x, case.values, case.pattern)
        assert called == expected


def message(match: str, error: type[Exception] = ValueError) -> Any:
    return pytest.raises(error, match=match)


def test_bad_inputs_say_what_was_expected_what_came_and_what_to_do() -> None:
    case = make(10, 12, 4, 0.5)
    x, values, pattern = case.x, case.values, case.pattern
    with message(r"values: expected shape \(60,\).*got \(59,\).*pattern.from_dense"):
        masked_linear(x, values[:-1], pattern)
    with message(r"values: expected shape \(60,\).*got \(10, 12\)"):
        masked_linear(x, case.weight, pattern)
    with message(r"x: expected a last dimension of 12.*got shape \(4, 11\)"):
        masked_linear(x[:, 1:], values, pattern)
    with message(r"bias: expected shape \(10,\), got \(9,\)"):
        masked_linear(x, values, pattern, case.bias[1:])
    with message(r"values: expected x's dtype torch.float32, got torch.float64; convert"):
        masked_linear(x.float(), values, pattern)
    for dtype in (torch.int64, torch.bool, torch.complex64, torch.float8_e5m2):
        expected = rf"x: expected float64, float32, bfloat16 or float16, got {dtype}; convert it"
        for backend in BACKENDS:
            with message(expected):
                masked_linear(x.to(dtype), values.to(dtype), pattern, backend=backend)
    with message(r"pattern: expected x's device cpu, got meta; use pattern.to\('cpu'\)"):
        masked_linear(x, values, pattern.to("meta"))
    with message(r"values: expected x's device cpu, got meta; move one"):
        masked_linear(x, values.to("meta"), pattern)
    with message(r"backend: expected 'auto', 'sparse' or 'dense', got 'fast'"):
        masked_linear(x, values, pattern, backend="fast")
    with message(r"pattern: expected a SparsityPattern, got Tensor.*from_mask", TypeError):
        masked_linear(x, values, pattern.mask())
