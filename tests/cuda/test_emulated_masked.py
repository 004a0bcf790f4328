"""The CUDA kernels of the masked matmuls on a CPU: every path, with threads in any order."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.support.masked_cases import DTYPES, Case, arguments, check_result, make
from tools.emulation import MASKED_PATHS, EmulationError, Emulator

ORDERS = st.integers(0, 99)
LINEAR = ("forward", "input gradient")
WAYS = [(name, path) for name in LINEAR for path in ("large", "medium", "few")]
WAYS += [("values' gradient", path) for path in ("many", "few")]
DEFAULT_WAYS = [(name, path) for name in LINEAR for path in ("tiles", "small_tiles")]
DEFAULT_WAYS += [("values' gradient", "tiles")]
BLOCK_WAYS = [(name, path) for name in LINEAR for path in ("blocks", "few_blocks")]
BLOCK_WAYS += [("values' gradient", "blocks")]
STRIPS = [torch.float32, torch.bfloat16, torch.float16]
HALVES = [torch.bfloat16, torch.float16]
TILE_WAYS = [(name, "groups") for name in LINEAR] + [("values' gradient", "segments")]


def emulate(emulator: Emulator, name: str, path: str, order: int, case: Case) -> Tensor:
    op, args = arguments(name, case)
    return emulator.masked(op, path, order)(*args)


@pytest.mark.parametrize(("name", "path"), WAYS + DEFAULT_WAYS)
@settings(max_examples=settings().max_examples)
@given(
    rows=st.integers(0, 70),
    columns=st.integers(0, 70),
    tokens=st.one_of(st.integers(0, 40), st.sampled_from([64, 127, 128, 129, 200])),
    sparsity=st.floats(0, 1),
    dtype=st.sampled_from(DTYPES),
    order=ORDERS,
)
def test_error_is_at_most_twice_the_references(
    emulator, name, path, rows, columns, tokens, sparsity, dtype, order
):
    case = make(rows, columns, tokens, sparsity, seed=rows + columns)
    check_result(name, case, dtype, partial(emulate, emulator, name, path, order))


@pytest.mark.parametrize(("name", "path"), WAYS + DEFAULT_WAYS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_several_chunks_of_columns_tiles_of_rows_and_of_tokens(emulator, name, path, dtype):
    """9 to 768 columns make a chunk, and up to 320 rows and 256 tokens a tile."""
    run = partial(emulate, emulator, name, path, 7)
    check_result(name, make(40, 850, 270, 0.9), dtype, run)
    check_result(name, make(530, 30, 5, 0.9), dtype, run)


@pytest.mark.parametrize("name", LINEAR)
@pytest.mark.parametrize("dtype", STRIPS, ids=str)
@settings(max_examples=5)
@given(rows=st.integers(30, 430), columns=st.integers(1, 300), sparsity=st.floats(0.98, 1))
def test_tall_strips_for_very_few_entries(emulator, name, dtype, rows, columns, sparsity):
    case = make(rows, columns, 150, sparsity, seed=rows)
    check_result(name, case, dtype, partial(emulate, emulator, name, "large", 2))


@pytest.mark.parametrize("dtype", STRIPS, ids=str)
def test_more_columns_than_are_sorted_at_a_time(emulator, dtype):
    """4608 columns are; a strip of many entries has several batches in a chunk, one of few one."""
    for sparsity in (0.3, 0.998):
        case = make(20, 9300, 3, sparsity)
        check_result("forward", case, dtype, partial(emulate, emulator, "forward", "large", 4))
        run = partial(emulate, emulator, "values' gradient", "many", 4)
        check_result("values' gradient", case, dtype, run)


def inexact(case: Case) -> Case:
    """With numbers whose sums have to be rounded, unlike those of the other tests."""
    tensors = (case.x, case.values, case.bias, case.grad)
    return Case(case.pattern, *(torch.randn_like(tensor) for tensor in tensors))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("name", "path"), WAYS + BLOCK_WAYS)
def test_sums_are_rounded_no_worse_than_the_references(emulator, name, path, dtype):
    if (name, path) in BLOCK_WAYS and dtype not in HALVES:
        pytest.skip("blocks of other types are entries")
    size = 32 if (name, path) in BLOCK_WAYS else None
    case = inexact(make(64, 416, 140, 0.5, structure=size))
    check_result(name, case, dtype, partial(emulate, emulator, name, path, 3))


@pytest.mark.parametrize(("name", "path"), WAYS)
def test_empty_rows_and_columns(emulator, name, path):
    case = make(30, 240, 20, 0.5)
    mask = case.pattern.mask()
    mask[::3], mask[:, 1::4], mask[-2:], mask[:, 90:220] = False, False, False, False
    pattern = type(case.pattern).from_mask(mask)
    values = torch.randn(pattern.kept, dtype=torch.float64)
    case = Case(pattern, case.x, values, case.bias, case.grad)
    check_result(name, case, torch.float32, partial(emulate, emulator, name, path, 1))


@pytest.mark.parametrize("name", LINEAR)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@given(order=ORDERS, tokens=st.integers(1, 140))
@settings(max_examples=5)
def test_a_token_depends_on_nothing_but_itself(emulator, name, dtype, order, tokens):
    """Bit for bit: neither on the others nor on the path, which their number decides."""
    case = make(50, 60, 140, 0.6).to(dtype)
    whole = emulate(emulator, name, "large", 1, case)
    last = 140 - tokens
    part = Case(case.pattern, case.x[last:], case.values, case.bias, case.grad[last:])
    for path in ("large", "medium", "few", "tiles", "small_tiles"):
        assert torch.equal(emulate(emulator, name, path, order, part), whole[last:]), path


MOST_GATHERED = {torch.float32: 4, torch.bfloat16: 8, torch.float16: 8}


@pytest.mark.parametrize("name", LINEAR)
@pytest.mark.parametrize("dtype", STRIPS, ids=str)
@settings(max_examples=settings().max_examples)
@given(
    rows=st.integers(0, 70),
    columns=st.integers(0, 300),
    tokens=st.integers(0, 8),
    sparsity=st.floats(0, 1),
    order=ORDERS,
)
def test_a_few_tokens_are_gathered_as_exactly(
    emulator, name, dtype, rows, columns, tokens, sparsity, order
):
    case = make(rows, columns, min(tokens, MOST_GATHERED[dtype]), sparsity, seed=rows)
    check_result(name, case, dtype, partial(emulate, emulator, name, "gather", order))


@pytest.mark.parametrize("name", LINEAR)
@pytest.mark.parametrize("dtype", STRIPS, ids=str)
def test_a_gathered_token_depends_on_nothing_but_itself(emulator, name, dtype):
    case = inexact(make(50, 300, MOST_GATHERED[dtype], 0.6)).to(dtype)
    whole = emulate(emulator, name, "gather", 1, case)
    for tokens in range(1, MOST_GATHERED[dtype]):
        tensors = (case.x[-tokens:], case.values, case.bias, case.grad[-tokens:])
        last = emulate(emulator, name, "gather", 2, Case(case.pattern, *tensors))
        assert torch.equal(last, whole[-tokens:]), tokens


def test_more_tokens_than_can_be_gathered_are_refused(emulator):
    case = make(20, 30, 5, 0.5).to(torch.float32)
    with pytest.raises(EmulationError, match="too many tokens to gather"):
        emulate(emulator, "forward", "gather", 1, case)


@pytest.mark.parametrize(("name", "path"), BLOCK_WAYS)
@settings(max_examples=settings().max_examples // 2)
@given(
    size=st.sampled_from([16, 32, 64]),
    rows=st.integers(0, 3),
    columns=st.integers(0, 4),
    tokens=st.one_of(st.integers(0, 40), st.sampled_from([64, 65, 129])),
    sparsity=st.floats(0, 1),
    dtype=st.sampled_from(HALVES),
    order=ORDERS,
)
def test_blocks_on_tensor_cores_are_as_exact_as_the_reference(
    emulator, name, path, size, rows, columns, tokens, sparsity, dtype, order
):
    case = make(size * rows, size * columns, tokens, sparsity, structure=size, seed=rows)
    check_result(name, case, dtype, partial(emulate, emulator, name, path, order))


@pytest.mark.parametrize(("name", "path"), BLOCK_WAYS)
@pytest.mark.parametrize("size", [16, 32, 64])
def test_several_tiles_of_tokens_by_blocks(emulator, name, path, size):
    case = make(2 * size, 64, 270, 0.5, structure=size)
    check_result(name, case, torch.bfloat16, partial(emulate, emulator, name, path, 5))


@pytest.mark.parametrize(("name", "path"), TILE_WAYS)
@settings(max_examples=settings().max_examples // 4)
@given(
    rows=st.integers(1, 6),
    columns=st.integers(1, 6),
    tokens=st.one_of(st.integers(1, 40), st.sampled_from([64, 65, 129, 300])),
    sparsity=st.floats(0, 0.9),
    dtype=st.sampled_from(HALVES),
    order=ORDERS,
)
def test_tiles_of_64_are_as_exact_as_the_reference(
    emulator, name, path, rows, columns, tokens, sparsity, dtype, order
):
    case = make(64 * rows, 64 * columns, tokens, sparsity, structure=64, seed=rows)
    check_result(name, inexact(case), dtype, partial(emulate, emulator, name, path, order))


@pytest.mark.parametrize(("name", "path"), TILE_WAYS)
def test_rows_of_blocks_without_any_and_full_ones_side_by_side(emulator, name, path):
    """Groups with no block, segments of each length, a column that a whole group has."""
    kept = torch.zeros(10, 6, dtype=torch.bool)
    kept[4], kept[5, :5], kept[6, 3], kept[7, 3:], kept[9, 0] = True, True, True, True, True
    mask = kept.repeat_interleave(64, 0).repeat_interleave(64, 1)
    case = make(*mask.shape, 140, 0.5)
    pattern = type(case.pattern).from_mask(mask, structure=64)
    values = torch.randn(pattern.kept, dtype=torch.float64)
    case = Case(pattern, case.x, values, case.bias, case.grad)
    check_result(name, case, torch.bfloat16, partial(emulate, emulator, name, path, 2))


@pytest.mark.parametrize("name", LINEAR)
def test_a_token_depends_on_nothing_but_itself_by_tiles(emulator, name):
    case = make(128, 192, 200, 0.5, structure=64).to(torch.bfloat16)
    whole = emulate(emulator, name, "groups", 1, case)
    part = Case(case.pattern, case.x[70:], case.values, case.bias, case.grad[70:])
    assert torch.equal(emulate(emulator, name, "groups", 2, part), whole[70:])


@pytest.mark.parametrize("name", LINEAR)
@pytest.mark.parametrize("size", [16, 32, 64])
def test_a_token_depends_on_nothing_but_itself_by_blocks(emulator, name, size):
    case = make(size, 2 * size, 80, 0.5, structure=size).to(torch.float16)
    whole = emulate(emulator, name, "blocks", 1, case)
    part = Case(case.pattern, case.x[70:], case.values, case.bias, case.grad[70:])
    for path in ("blocks", "few_blocks"):
        assert torch.equal(emulate(emulator, name, path, 2, part), whole[70:]), path


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize(("name", "path"), WAYS)
def test_blocks_of_other_types_are_entries(emulator, name, path, dtype):
    case = make(48, 64, 70, 0.5, structure=16)
    check_result(name, case, dtype, partial(emulate, emulator, name, path, 1))


@given(
    rows=st.integers(0, 40),
    columns=st.integers(0, 70),
    sparsity=st.floats(0, 1),
    dtype=st.sampled_from(DTYPES),
    order=ORDERS,
)
def test_dense_weights_and_back(emulator, rows, columns, sparsity, dtype, order):
    case = make(rows, columns, 0, sparsity).to(dtype)
    indices, weight = case.pattern.indices, case.weight
    made = emulator.masked("masked_to_dense", "only", order)(case.values, indices, rows, columns)
    assert torch.equal(made, weight)
    back = emulator.masked("masked_from_dense", "only", order)(weight, indices)
    assert torch.equal(back, case.values)


@pytest.mark.parametrize("path", MASKED_PATHS["masked_linear"])
def test_dropped_weights_are_not_multiplied(emulator, path):
    """0 * inf would be NaN in a dense product."""
    size = {"blocks": 16, "few_blocks": 16, "groups": 64}.get(path)
    tokens, own = (4, 3) if path == "gather" else (10, 4)
    case = make(4 * (size or 8), 2 * (size or 24), tokens, 0.5, size)
    case = case.to(torch.bfloat16 if size else torch.float32)
    dropped = ~case.pattern.mask()
    case.x[own, 7] = float("inf")
    y = emulate(emulator, "forward", path, 1, case)
    assert y[own, dropped[:, 7]].isfinite().all()
    assert y[torch.arange(tokens) != own].isfinite().all()
    assert not y[own].isfinite().all()


@pytest.mark.parametrize("path", ["many", "few"])
def test_entries_away_from_a_nan_are_not_touched(emulator, path):
    case = make(20, 30, 10, 0.5).to(torch.float32)
    clean = emulate(emulator, "values' gradient", path, 1, case)
    case.x[4, 7] = float("nan")
    spoilt = emulate(emulator, "values' gradient", path, 1, case)
    there = case.pattern.mask().nonzero()[:, 1] == 7
    assert spoilt[there].isnan().all()
    assert torch.equal(spoilt[~there], clean[~there])


@pytest.mark.parametrize(("name", "path"), WAYS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_memory_that_is_not_aligned_gives_the_same_bits(emulator, name, path, dtype):
    case = make(48, 64, 40, 0.5).to(dtype)
    expected = emulate(emulator, name, path, 1, case)
    shifted = []
    for tensor in (case.x, case.values, case.bias, case.grad):
        room = torch.empty(tensor.numel() + 1, dtype=dtype)[1:]
        shifted.append(room.view_as(tensor).copy_(tensor))
    assert torch.equal(emulate(emulator, name, path, 1, Case(case.pattern, *shifted)), expected)
