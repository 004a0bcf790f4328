"""Histories of more than 2^31 elements: offsets are 64 bits wide."""

from __future__ import annotations

import mmap

import numpy as np
import pytest
import torch
from torch import Tensor

from deqcore.ops._rows import ACTIVE
from tests.support.problems import equal
from tests.support.step_cases import StepCase, anderson_case, broyden_case

DIM, MEMORY = 4096, 64
BATCH = 2**31 // (DIM * MEMORY) + 2  # its last row begins beyond 2^31 elements


def sparse(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Memory that exists where it is written to: 34 GB of addresses, of which a row is used."""
    size = torch.empty(0, dtype=dtype).element_size() * int(np.prod(shape))
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_NORESERVE", 0x4000)
    buffer = mmap.mmap(-1, size, flags=flags)
    return torch.frombuffer(buffer, dtype=dtype).view(shape)


def last_row_of_many(case: StepCase) -> dict[str, Tensor]:
    """The case's only row as the last of a batch; the others have ended, in place."""
    tensors = {}
    for name, tensor in case.tensors.items():
        if name in ("damping", "remaining") or not tensor.numel():
            tensors[name] = tensor.clone()
            continue
        many = sparse((BATCH, *tensor.shape[1:]), tensor.dtype)
        many[-1] = tensor[0]
        tensors[name] = many
    tensors["status"][:-1] = 0
    tensors["x_next"] = tensors["x"]
    return tensors


def active_case(op: str) -> StepCase:
    """One active row with a full ring."""
    make = anderson_case if op == "anderson_step" else broyden_case
    cases = (make(1, DIM, MEMORY, torch.float32, seed) for seed in range(99))
    case = next(case for case in cases if case.tensors["status"] == ACTIVE)
    if op == "broyden_step":
        ring = torch.zeros(1, MEMORY, DIM)
        ring[:, : case.tensors["s_ring"].shape[1]] = case.tensors["s_ring"]
        case = case.with_tensors(s_ring=ring)
    return case


@pytest.mark.parametrize("op", ["anderson_step", "broyden_step"])
@pytest.mark.parametrize("path", ["block", "split"])
def test_the_last_row_of_a_huge_history_is_right(emulator, op, path):
    case = active_case(op)
    expected = case.run(emulator.step(op, path))
    try:
        tensors = last_row_of_many(case)
    except OSError as reason:
        pytest.skip(f"no address space: {reason}")
    assert tensors["g_ring" if op == "anderson_step" else "s_ring"][:-1].numel() >= 2**31
    emulator.step(op, path)(*tensors.values(), case.numbers)
    for name in expected:
        if name in ("damping", "remaining", "x") or not tensors[name].numel():
            continue
        assert equal(tensors[name][-1], expected[name][0]), name


@pytest.mark.slow
@pytest.mark.parametrize("op", ["anderson_step", "broyden_step"])
def test_the_last_row_of_a_huge_history_is_right_on_a_gpu(cuda_device, op):
    """2^31 elements of history in one allocation, where the GPU has room for it."""
    free, _ = torch.cuda.mem_get_info()
    if free < 24 * 2**30:
        pytest.skip(f"needs 24 GB of GPU memory, {free / 2**30:.0f} are free")
    alone = active_case(op).to(cuda_device)
    wide = {}
    for name, tensor in alone.tensors.items():
        if name in ("damping", "remaining") or not tensor.numel():
            wide[name] = tensor.clone()
            continue
        wide[name] = tensor.new_zeros((BATCH, *tensor.shape[1:]))
        wide[name][-1] = tensor[0]
    wide["x_next"] = wide["x"]
    with torch.no_grad():
        alone.op(*wide.values(), alone.numbers)
    expected = alone.run(alone.op)
    for name in ("x_next", "status", "counters", "residuals"):
        assert equal(wide[name][-1], expected[name][0]), name
