"""The CUDA kernels on a CPU: every path against the float64 oracle, with threads in any order."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from deqcore.ops._rows import ACTIVE
from tests.support.problems import equal
from tests.support.step_cases import StepCase, anderson_case, broyden_case
from tests.support.step_checks import check_kernel_against_float64
from tools.emulation import PATHS, EmulationError, Emulator

CPU = torch.device("cpu")
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
MEMORIES = st.one_of(st.integers(1, 12), st.sampled_from([16, 33, 64]))
SHORT_MEMORIES = st.integers(1, 30)  # what the warp path's shared memory holds
DIMS = st.one_of(st.integers(0, 70), st.sampled_from([127, 128, 129, 300, 1023, 1024]))
LONG_DIMS = [4096, 4100, 9001]
ORDERS = st.integers(0, 99)
ANDERSON_OPTIONS = st.fixed_dictionaries(
    {
        "patience": st.sampled_from([1, 4, 25]),
        "max_steps": st.sampled_from([3, 10, 10_000]),
        "ridge": st.sampled_from([1e-8, 1e-3]),
        "start": st.sampled_from([0, 2, 7]),
        "restart": st.sampled_from([0, 1, 4]),
        "safeguard": st.sampled_from([1.0, 2.0, float("inf")]),
        "max_weight": st.sampled_from([1.0, 10.0, 1e4, float("inf")]),
    }
)
BROYDEN_OPTIONS = st.fixed_dictionaries(
    {"patience": st.sampled_from([1, 4, 25]), "max_steps": st.sampled_from([3, 10, 10_000])}
)


def make_case(op: str, *args, **options) -> StepCase:
    return (anderson_case if op == "anderson_step" else broyden_case)(*args, **options)


def emulated(case: StepCase, op: str, emulator: Emulator, path: str, order: int = 1) -> StepCase:
    return dataclasses.replace(case, op=emulator.step(op, path, order))


def run(case: StepCase, op: str, emulator: Emulator, path: str, order: int = 1):
    case = emulated(case, op, emulator, path, order)
    return case.run(case.op)


@pytest.mark.parametrize("path", PATHS)
@settings(max_examples=2 * settings().max_examples)
@given(data=st.data(), batch=st.integers(0, 6), dim=DIMS, dtype=st.sampled_from(DTYPES))
def test_anderson_kernel_is_as_exact_as_the_reference(emulator, path, data, batch, dim, dtype):
    memory = data.draw(SHORT_MEMORIES if path == "warp" else MEMORIES)
    seed, order = data.draw(st.integers(0, 10_000)), data.draw(ORDERS)
    case = anderson_case(batch, dim, memory, dtype, seed, **data.draw(ANDERSON_OPTIONS))
    check_kernel_against_float64(emulated(case, "anderson_step", emulator, path, order), CPU)


@pytest.mark.parametrize("path", PATHS)
@settings(max_examples=2 * settings().max_examples)
@given(data=st.data(), batch=st.integers(0, 6), dim=DIMS, dtype=st.sampled_from(DTYPES))
def test_broyden_kernel_is_as_exact_as_the_reference(emulator, path, data, batch, dim, dtype):
    memory = data.draw(SHORT_MEMORIES if path == "warp" else MEMORIES)
    seed, order = data.draw(st.integers(0, 10_000)), data.draw(ORDERS)
    case = broyden_case(batch, dim, memory, dtype, seed, **data.draw(BROYDEN_OPTIONS))
    check_kernel_against_float64(emulated(case, "broyden_step", emulator, path, order), CPU)


@pytest.mark.parametrize("op", ["anderson_step", "broyden_step"])
@pytest.mark.parametrize("path", ["split", "cluster"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dim", LONG_DIMS)
def test_kernels_are_as_exact_as_the_reference_on_rows_of_several_chunks(
    emulator, op, path, dim, dtype
):
    case = make_case(op, 3, dim, 9, dtype, dim)
    check_kernel_against_float64(emulated(case, op, emulator, path), CPU)


@pytest.mark.parametrize("op", ["anderson_step", "broyden_step"])
@pytest.mark.parametrize("path", ["split", "cluster"])
def test_a_row_too_long_for_short_chunks_is_as_exact_as_the_reference(emulator, op, path):
    case = make_case(op, 1, 512 * 4096 + 1, 2, torch.float32, 5)
    check_kernel_against_float64(emulated(case, op, emulator, path), CPU)


@pytest.mark.parametrize("op", ["anderson_step", "broyden_step"])
@pytest.mark.parametrize(
    ("dim", "dtype"), [(70_004, torch.float32), (70_001, torch.float16), (40_000, torch.float64)]
)
def test_a_cluster_takes_rows_tile_by_tile(emulator, op, dim, dtype):
    case = make_case(op, 1, dim, 6, dtype, dim)
    check_kernel_against_float64(emulated(case, op, emulator, "cluster", order=2), CPU)


@pytest.mark.parametrize("op", ["anderson_step", "broyden_step"])
def test_how_many_blocks_share_a_row_changes_no_bit(emulator, op):
    """Eight where rows are many, one for each part where they are few."""
    case = make_case(op, 40, 34_000, 2, torch.float64, 7)
    together = run(case, op, emulator, "cluster")
    assert emulator.traffic.blocks == 40 * 8
    one = {n: t[:2].clone() for n, t in case.tensors.items()}
    one["damping"] = case.tensors["damping"]
    one["remaining"] = (one["status"] == ACTIVE).sum(dtype=torch.int32).reshape(1)
    alone = run(dataclasses.replace(case, tensors=one), op, emulator, "cluster", order=3)
    assert emulator.traffic.blocks == 2 * 16
    for name in ("x_next", "status", "counters", "residuals", "gram"):
        assert equal(alone[name], together[name][:2]), name


@pytest.mark.parametrize("op", ["anderson_step", "broyden_step"])
def test_a_gpu_with_smaller_clusters_gives_the_same_bits_or_says_so(emulator, op):
    case = make_case(op, 1, 34_000, 2, torch.float64, 7)
    expected = run(case, op, emulator, "cluster")
    with emulator.clusters_of(9):
        result = run(case, op, emulator, "cluster")
        assert emulator.traffic.blocks == 9
    assert all(equal(result[name], expected[name]) for name in expected)
    with emulator.clusters_of(7), pytest.raises(EmulationError, match="no clusters that are large"):
        run(case, op, emulator, "cluster")


@pytest.mark.parametrize("op", ["anderson_step", "broyden_step"])
@pytest.mark.parametrize("path", PATHS)
@given(dim=DIMS, seed=st.integers(0, 999), order=ORDERS, dtype=st.sampled_from(DTYPES))
def test_a_row_depends_on_nothing_but_itself(emulator, op, path, dim, seed, order, dtype):
    """Bit for bit: neither on its batch-mates nor on its place, which decides its alignment."""
    case = make_case(op, 5, dim, 4, dtype, seed)
    together = run(case, op, emulator, path)
    for row in (0, 3):
        one = {n: t[row : row + 1].clone() for n, t in case.tensors.items()}
        one["damping"] = case.tensors["damping"]
        one["remaining"] = (one["status"] == ACTIVE).sum(dtype=torch.int32).reshape(1)
        alone = run(dataclasses.replace(case, tensors=one), op, emulator, path, order)
        for name in ("x_next", "z_next", "status", "counters", "residuals"):
            assert equal(alone[name][0], together[name][row]), name


@pytest.mark.parametrize("op", ["anderson_step", "broyden_step"])
@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_memory_that_is_not_aligned_gives_the_same_bits(emulator, op, path, dtype):
    case = make_case(op, 4, 256, 5, dtype, 3)
    for name in case.tensors:
        if case.tensors[name].shape[-1:] != (256,):
            continue
        tensor = case.tensors[name]
        shifted = torch.empty(tensor.numel() + 1, dtype=tensor.dtype)[1:].view_as(tensor)
        moved = {n: t.clone() for n, t in case.tensors.items()}
        moved[name] = shifted.copy_(tensor)
        with torch.no_grad():
            emulator.step(op, path)(*moved.values(), case.numbers)
        expected = run(case, op, emulator, path)
        assert all(equal(moved[n], expected[n]) for n in expected), name


@pytest.mark.parametrize("op", ["anderson_step", "broyden_step"])
@pytest.mark.parametrize("path", PATHS)
@given(dim=DIMS, seed=st.integers(0, 999), order=ORDERS, dtype=st.sampled_from(DTYPES))
def test_the_next_iterate_may_overwrite_the_current_one(
    emulator, op, path, dim, seed, order, dtype
):
    """A captured solve runs in place: x_next is x."""
    case = make_case(op, 5, dim, 4, dtype, seed)
    expected = run(case, op, emulator, path)
    tensors = {n: t.clone() for n, t in case.tensors.items()}
    tensors["x_next"] = tensors["x"]
    emulator.step(op, path, order)(*tensors.values(), case.numbers)
    for name in set(expected) - {"x"}:
        assert equal(tensors[name], expected[name]), name
