"""The ops against float64, over dtypes, shapes, sparsities and numbers of tokens."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from deqcore import SparsityPattern
from tests.support.kernels import Kernels
from tests.support.masked_cases import (
    DTYPES,
    NAMES,
    Case,
    check_result,
    make,
    run_op,
)

# On both sides of the widths that kernels take at a time: 4, 8, 16, 32, 48, 64, 96 tokens.
TOKENS = (0, 1, 4, 5, 8, 9, 16, 17, 48, 64, 65, 100, 200)


def check(kernels: Kernels, name: str, case: Case, dtype: torch.dtype) -> None:
    """The kernel's error is at most twice that of the reference in the same dtype, plus a floor."""
    check_result(name, case, dtype, partial(run_op, name, ops=kernels.ops))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("sparsity", [0.0, 0.5, 0.9, 1.0])
def test_error_is_at_most_twice_the_references(
    kernels: Kernels, name: str, dtype: torch.dtype, sparsity: float
) -> None:
    for tokens in TOKENS:
        check(kernels, name, make(37, 53, tokens, sparsity), dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("size", [16, 32, 64])
def test_blocks(kernels: Kernels, name: str, dtype: torch.dtype, size: int) -> None:
    for sparsity in (0.0, 0.6, 1.0):
        for tokens in (0, 1, 3, 4, 13, 64, 130, 300):
            check(kernels, name, make(128, 192, tokens, sparsity, structure=size), dtype)


@pytest.mark.parametrize("name", NAMES)
def test_wide_weights_go_through_several_blocks_of_columns(kernels: Kernels, name: str) -> None:
    check(kernels, name, make(40, 3000, 70, 0.7), torch.float32)
    check(kernels, name, make(3000, 40, 200, 0.7), torch.float32)
    check(kernels, name, make(600, 700, 333, 0.97), torch.float64)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize(
    ("rows", "columns"),
    [(1, 1), (3, 7), (1, 8), (5, 16), (37, 53), (300, 64), (64, 640), (9, 1001)],
)
def test_expanding_puts_every_value_where_the_mask_is_true(
    dtype: torch.dtype, threads: int, rows: int, columns: int
) -> None:
    torch.set_num_threads(threads)
    generator = torch.Generator().manual_seed(rows * columns)
    for sparsity in (0.0, 0.1, 0.5, 0.95, 1.0):
        mask = torch.rand(rows, columns, generator=generator) >= sparsity
        pattern = SparsityPattern.from_mask(mask)
        values = torch.randn(pattern.kept, generator=generator).to(dtype)
        expected = torch.zeros(rows, columns, dtype=dtype)
        expected[mask] = values
        words, indices = pattern._words, pattern.indices
        dense = torch.ops.deqcore.masked_expand(values, words, indices, rows, columns)
        assert torch.equal(dense, expected)
        assert torch.equal(pattern.to_dense(values), expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (0, 5), (5, 0), (37, 53), (300, 64)])
def test_dense_weights_and_back(
    kernels: Kernels, dtype: torch.dtype, rows: int, columns: int
) -> None:
    for sparsity in (0.0, 0.4, 1.0):
        case = make(rows, columns, 0, sparsity).to(dtype)
        indices = case.pattern.indices
        dense = kernels.ops.masked_to_dense(case.values, indices, rows, columns)
        assert torch.equal(dense, case.weight)
        assert torch.equal(
            kernels.ops.masked_from_dense(dense.t().contiguous().t(), indices), case.values
        )


@pytest.mark.parametrize("name", NAMES)
@given(
    rows=st.integers(0, 70),
    columns=st.integers(0, 70),
    tokens=st.integers(0, 140),
    sparsity=st.floats(0, 1),
    dtype=st.sampled_from(DTYPES),
)
def test_any_shape(
    kernels: Kernels,
    name: str,
    rows: int,
    columns: int,
    tokens: int,
    sparsity: float,
    dtype: torch.dtype,
) -> None:
    check(kernels, name, make(rows, columns, tokens, sparsity, seed=rows + columns), dtype)


@pytest.mark.parametrize("name", NAMES)
def test_empty_rows_and_columns(kernels: Kernels, name: str) -> None:
    case = make(30, 40, 20, 0.5)
    mask = case.pattern.mask()
    mask[::3], mask[:, 1::4], mask[-2:], mask[:, :5] = False, False, False, False
    pattern = type(case.pattern).from_mask(mask)
    check(
        kernels,
        name,
        Case(pattern, case.x, torch.randn(pattern.kept), case.bias, case.grad),
        torch.float32,
    )


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("structure", [None, 16])
def test_threads_do_not_change_a_bit(name: str, structure: int | None) -> None:
    op = partial(run_op, name)
    for tokens in (3, 50, 700):
        case = make(320, 256, tokens, 0.6, structure).to(torch.float32)
        results = []
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            results.append(op(case))
        assert all(torch.equal(result, results[0]) for result in results)


@pytest.mark.parametrize("name", ["forward", "input gradient"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("structure", [None, 16])
def test_a_tokens_result_does_not_depend_on_the_others(
    kernels: Kernels, name: str, dtype: torch.dtype, structure: int | None, kernels_only: None
) -> None:
    op = partial(run_op, name, ops=kernels.ops)
    case = make(96, 160, 150, 0.7, structure).to(dtype)
    whole = op(case)
    for first, last in ((0, 1), (3, 7), (9, 18), (20, 53), (50, 150)):
        part = Case(case.pattern, case.x[first:last], case.values, case.bias, case.grad[first:last])
        assert torch.equal(op(part), whole[first:last])


@pytest.mark.parametrize("structure", [16, 32])
def test_blocks_and_single_entries_agree_bit_for_bit(
    kernels: Kernels, structure: int, kernels_only: None
) -> None:
    op = partial(run_op, "forward", ops=kernels.ops)
    case = make(128, 128, 90, 0.5, structure).to(torch.float32)
    entries = type(case.pattern).from_mask(case.pattern.mask())
    single = Case(entries, case.x, case.values, case.bias, case.grad)
    assert torch.equal(op(case), op(single))


@pytest.mark.parametrize("name", ["forward", "input gradient"])
def test_nan_token_leaves_others_bitwise_equal(kernels: Kernels, name: str) -> None:
    op = partial(run_op, name, ops=kernels.ops)
    case = make(50, 60, 70, 0.5).to(torch.float32)
    clean = op(case)
    case.x[33], case.grad[33] = float("nan"), float("inf")
    spoilt = op(case)
    others = torch.arange(70) != 33
    assert torch.equal(spoilt[others], clean[others])
    assert not spoilt[33].isfinite().all()


def test_dropped_weights_are_not_multiplied(kernels: Kernels, kernels_only: None) -> None:
    """0 * inf would be NaN in a dense product."""
    case = make(20, 30, 10, 0.5).to(torch.float32)
    dropped = ~case.pattern.mask()
    case.x[4, 7] = float("inf")
    y = run_op("forward", case, kernels.ops)
    assert y[4, dropped[:, 7]].isfinite().all()
