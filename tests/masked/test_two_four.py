"""2:4 patterns: which way they go, and the op that a GPU with sparse tensor cores runs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from deqcore import SparsityPattern, masked_linear
from deqcore.ops import masked_two_four

OP = torch.ops.deqcore.masked_two_four


def problem(rows: int = 8, columns: int = 12, tokens: int = 5) -> tuple[SparsityPattern, Any]:
    scores = torch.rand(rows, columns)
    pattern = SparsityPattern.from_scores(scores, 0.5, structure="2:4")
    shapes = ((tokens, columns), (pattern.kept,), (rows,))
    return pattern, [torch.randn(s, dtype=torch.float64, requires_grad=True) for s in shapes]


def run(pattern: SparsityPattern, x: Tensor, values: Tensor, bias: Tensor | None) -> Tensor:
    return OP(x, values, pattern.indices, bias, *pattern.shape)


def test_op_and_its_derivatives_are_those_of_a_dense_product() -> None:
    pattern, (x, values, bias) = problem()
    expected = F.linear(x, pattern.to_dense(values), bias)
    torch.testing.assert_close(run(pattern, x, values, bias), expected)
    torch.library.opcheck(OP.default, (x, values, pattern.indices, bias, *pattern.shape))
    assert torch.autograd.gradcheck(lambda *args: run(pattern, *args), (x, values, bias))
    assert torch.autograd.gradgradcheck(
        lambda *args: run(pattern, *args), (x, values, bias), fast_mode=True
    )


def test_a_processor_without_sparse_tensor_cores_runs_the_kernels_for_entries(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pattern, (x, values, bias) = problem()
    assert not masked_two_four.fits(x, *pattern.shape)
    sparse = masked_linear(x, values, pattern, bias, backend="sparse")
    monkeypatch.setattr(masked_two_four, "fits", lambda *args: True)
    torch.testing.assert_close(masked_linear(x, values, pattern, bias, backend="sparse"), sparse)


class OnGpu:
    device = torch.device("cuda", 0)

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype


@pytest.mark.parametrize(
    ("rows", "columns", "dtype", "capable", "expected"),
    [
        (32, 64, torch.bfloat16, True, True),
        (64, 128, torch.float16, True, True),
        (64, 128, torch.float16, False, False),
        (64, 128, torch.float32, True, False),
        (48, 128, torch.float16, True, False),
        (32, 96, torch.float16, True, False),
    ],
)
def test_what_fits(
    rows: int,
    columns: int,
    dtype: torch.dtype,
    capable: bool,
    expected: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(masked_two_four, "_has_sparse_tensor_cores", lambda index: capable)
    x: Any = OnGpu(dtype)
    assert masked_two_four.fits(x, rows, columns) is expected


def test_a_pattern_of_another_structure_never_goes_to_pytorch_s_support(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pattern, (x, values, bias) = problem()
    unstructured = SparsityPattern.from_mask(pattern.mask())
    asked: list[object] = []
    monkeypatch.setattr(masked_two_four, "fits", lambda *args: asked.append(args) or False)
    masked_linear(x, values, unstructured, bias, backend="sparse")
    assert not asked
    masked_linear(x, values, pattern, bias, backend="sparse")
    assert asked


def test_a_compressed_weight_is_kept_until_its_values_change(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pattern, (_, values, _) = problem()
    made: list[Tensor] = []

    def compress(dense: Tensor) -> Tensor:
        made.append(dense.clone())
        return made[-1]

    monkeypatch.setattr(torch.sparse, "to_sparse_semi_structured", compress)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    values = values.detach()
    args = (pattern.indices, *pattern.shape)
    first = masked_two_four._compressed(values, *args)
    assert masked_two_four._compressed(values, *args) is first
    values.mul_(2)
    second = masked_two_four._compressed(values, *args)
    torch.testing.assert_close(second, 2 * first)
    assert len(made) == 2
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert masked_two_four._compressed(values, *args) is not second
