"""The CUDA kernels on a CPU with a history in bfloat16: exactness, independence, traffic."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from deqcore.ops._rows import ACTIVE, MIXED
from tests.support.problems import equal
from tests.support.step_cases import StepCase, broyden_case, full_rows
from tests.support.step_checks import check_kernel_against_float64
from tools.emulation import PATHS

CPU = torch.device("cpu")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
MEMORIES = st.one_of(st.integers(1, 12), st.sampled_from([16, 33, 64]))
SHORT_MEMORIES = st.integers(1, 30)  # what the warp path's shared memory holds
DIMS = st.one_of(st.integers(0, 70), st.sampled_from([127, 128, 129, 300, 1023, 1024]))
ORDERS = st.integers(0, 99)


def make_case(batch: int, dim: int, memory: int, dtype: torch.dtype, seed: int) -> StepCase:
    return broyden_case(batch, dim, memory, dtype, seed, history_dtype=torch.bfloat16)


def emulated(case: StepCase, emulator, path: str, order: int = 1) -> StepCase:
    return dataclasses.replace(case, op=emulator.step("broyden_step", path, order))


def run(case: StepCase, emulator, path: str, order: int = 1):
    case = emulated(case, emulator, path, order)
    return case.run(case.op)


@pytest.mark.parametrize("path", PATHS)
@given(data=st.data(), batch=st.integers(0, 6), dim=DIMS, dtype=st.sampled_from(DTYPES))
def test_broyden_kernel_is_as_exact_as_the_reference(emulator, path, data, batch, dim, dtype):
    memory = data.draw(SHORT_MEMORIES if path == "warp" else MEMORIES)
    seed, order = data.draw(st.integers(0, 10_000)), data.draw(ORDERS)
    case = make_case(batch, dim, memory, dtype, seed)
    check_kernel_against_float64(emulated(case, emulator, path, order), CPU)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dim", [4096, 4100, 9001])
def test_broyden_kernel_is_as_exact_as_the_reference_on_several_chunks(emulator, dim, dtype):
    case = make_case(3, dim, 9, dtype, dim)
    check_kernel_against_float64(emulated(case, emulator, "split"), CPU)


@pytest.mark.parametrize("path", PATHS)
@given(dim=DIMS, seed=st.integers(0, 999), order=ORDERS, dtype=st.sampled_from(DTYPES))
def test_a_row_depends_on_nothing_but_itself(emulator, path, dim, seed, order, dtype):
    """Bit for bit: neither on its batch-mates nor on its place, which decides its alignment."""
    case = make_case(5, dim, 4, dtype, seed)
    together = run(case, emulator, path)
    for row in (0, 3):
        one = {n: t[row : row + 1].clone() for n, t in case.tensors.items()}
        one["damping"] = case.tensors["damping"]
        one["remaining"] = (one["status"] == ACTIVE).sum(dtype=torch.int32).reshape(1)
        alone = run(dataclasses.replace(case, tensors=one), emulator, path, order)
        for name in ("x_next", "z_next", "s_ring", "status", "counters", "residuals"):
            assert equal(alone[name][0], together[name][row]), name


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_memory_that_is_not_aligned_gives_the_same_bits(emulator, path, dtype):
    case = make_case(4, 256, 5, dtype, 3)
    expected = run(case, emulator, path)
    wide = [name for name, tensor in case.tensors.items() if tensor.shape[-1:] == (256,)]
    for name in wide:
        tensor = case.tensors[name]
        moved = {n: t.clone() for n, t in case.tensors.items()}
        shifted = torch.empty(tensor.numel() + 1, dtype=tensor.dtype)[1:].view_as(tensor)
        moved[name] = shifted.copy_(tensor)
        emulator.step("broyden_step", path)(*moved.values(), case.numbers)
        assert all(equal(moved[n], expected[n]) for n in expected), name


@pytest.mark.parametrize("path", PATHS)
@given(dim=DIMS, seed=st.integers(0, 999), order=ORDERS, dtype=st.sampled_from(DTYPES))
def test_the_next_iterate_may_overwrite_the_current_one(emulator, path, dim, seed, order, dtype):
    case = make_case(5, dim, 4, dtype, seed)
    expected = run(case, emulator, path)
    tensors = {n: t.clone() for n, t in case.tensors.items()}
    tensors["x_next"] = tensors["x"]
    emulator.step("broyden_step", path, order)(*tensors.values(), case.numbers)
    for name in set(expected) - {"x"}:
        assert equal(tensors[name], expected[name]), name


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("stored", [0, 1, 8, 20, 29])
@pytest.mark.parametrize("dim", [256, 257])
def test_a_broyden_step_moves_its_history_in_half_the_bytes(emulator, path, stored, dim):
    """2k + 1 elements of history and 6 of state, of which a float32 history makes 2k + 7."""
    moved = {}
    for history_dtype in (torch.float32, torch.bfloat16):
        case = broyden_case(4, dim, 30, torch.float32, 1, history_dtype=torch.bfloat16)
        ring = torch.randn(4, 30, dim) * 0.7 ** torch.arange(30)[:, None]
        case = full_rows(case.with_tensors(s_ring=ring.bfloat16()), stored)
        case = case.with_tensors(s_ring=case.tensors["s_ring"].to(history_dtype))
        tensors = {n: t.clone() for n, t in case.tensors.items()}
        step = emulator.step("broyden_step", path)
        traffic = step(*tensors.values(), case.numbers)
        moved[history_dtype] = (traffic.read + traffic.written) / (4 * dim)
        combined = int(tensors["counters"][:, MIXED].sum()) / 4  # 0 where an update was singular
        size = history_dtype.itemsize
        assert moved[history_dtype] == 6 * 4 + size * (stored + combined + 1)
        passes = -(-stored // (4 if dim % 4 else 8))
        assert traffic.read_again / (4 * dim) <= (8 + size) * max(0, passes - 1)
        assert traffic.launches == (2 if path == "split" else 1)
    assert moved[torch.float32] - moved[torch.bfloat16] >= 2 * (stored + 1)
