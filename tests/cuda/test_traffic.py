"""Bytes that the kernels move, by count, against the formulas of docs/architecture.md."""

from __future__ import annotations

import pytest
import torch

from tests.support.step_cases import anderson_case, broyden_case, full_rows
from tools.emulation import PATHS


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("memory", [1, 2, 5, 8, 16])
@pytest.mark.parametrize("dim", [256, 257])
def test_an_anderson_step_moves_2m_plus_4_elements(emulator, path, memory, dim):
    """One less where a cluster takes the row from push to move: it has its newest iterate."""
    case = full_rows(anderson_case(4, dim, memory, torch.float32, 1, safeguard=1e9), memory)
    step = emulator.step("anderson_step", path)
    traffic = step(*[t.clone() for t in case.tensors.values()], case.numbers)
    moved = (traffic.read + traffic.written) / (4 * 4 * dim)
    assert moved == 2 * memory + (3 if path == "cluster" else 4)
    # Past 4 (8 on the split path) others, a residual is read again while the cache has it.
    assert traffic.read_again / (4 * 4 * dim) <= max(0, (memory - 2) // 4)
    assert traffic.launches == (2 if path == "split" else 1)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("stored", [0, 1, 8, 20, 29])
@pytest.mark.parametrize("dim", [256, 257])
def test_a_broyden_step_moves_fewer_than_2k_plus_12_elements(emulator, path, stored, dim):
    case = broyden_case(4, dim, 30, torch.float32, 1)
    ring = torch.randn(4, 30, dim) * 0.7 ** torch.arange(30)[:, None]
    case = full_rows(case.with_tensors(s_ring=ring), stored)
    step = emulator.step("broyden_step", path)
    traffic = step(*[t.clone() for t in case.tensors.values()], case.numbers)
    moved = (traffic.read + traffic.written) / (4 * 4 * dim)
    assert moved <= 2 * stored + 7
    assert moved >= stored + 6  # a row whose update is singular restarts and reads less
    passes = -(-stored // (4 if dim % 4 else 8))
    assert traffic.read_again / (4 * 4 * dim) <= 3 * max(0, passes - 1)
    assert traffic.launches == (2 if path == "split" else 1)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_f_saves_its_bytes(emulator, path, dtype):
    """f is read, and z_next written, in two bytes an element."""
    case = full_rows(anderson_case(4, 256, 5, dtype, 1, safeguard=1e9), 5)
    traffic = emulator.step("anderson_step", path)(*case.args)
    in_x = 2 * 5 + (2 if path == "cluster" else 3)
    assert traffic.read + traffic.written == 4 * 256 * (4 * in_x + 2 * 2)


def test_rows_that_have_ended_are_only_copied(emulator):
    case = full_rows(anderson_case(4, 256, 5, torch.float32, 1), 5)
    case.tensors["status"].fill_(0)
    traffic = emulator.step("anderson_step", "warp")(*case.args)
    assert traffic.read + traffic.written == 4 * 256 * 4 * 2
    case.tensors["x_next"] = case.tensors["x"]  # in place there is nothing to do
    traffic = emulator.step("anderson_step", "warp")(*case.args)
    assert traffic.read + traffic.written == 0
