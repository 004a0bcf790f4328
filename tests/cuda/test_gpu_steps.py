"""The CUDA kernels on a GPU, against the oracle in float64."""

from __future__ import annotations

import pytest
import torch

from deqcore.ops._rows import ACTIVE
from tests.support.problems import equal, generator
from tests.support.step_cases import StepCase, anderson_case, broyden_case
from tests.support.step_checks import check_kernel_against_float64, require_kernels

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
DIMS = [0, 1, 3, 31, 33, 128, 511, 512, 513, 1024, 4095, 4096, 8192, 8193, 12_289, 65_536]
MEMORIES = [1, 2, 3, 5, 6, 8, 9, 17, 33, 64]


def drawn(op: str, seed: int) -> StepCase:
    g = generator(seed)

    def pick(values):
        return values[int(torch.randint(len(values), (), generator=g))]

    make = anderson_case if op == "anderson_step" else broyden_case
    return make(pick([1, 2, 5, 19]), pick(DIMS), pick(MEMORIES), pick(DTYPES), seed)


@pytest.mark.parametrize("op", ["anderson_step", "broyden_step"])
@pytest.mark.parametrize("seed", range(60))
def test_kernel_is_as_exact_as_the_reference(cuda_device, op, seed):
    require_kernels(cuda_device)
    check_kernel_against_float64(drawn(op, seed), cuda_device)


@pytest.mark.parametrize("seed", range(30))
def test_kernel_with_a_bfloat16_history_is_as_exact_as_the_reference(cuda_device, seed):
    require_kernels(cuda_device)
    drawn_case = drawn("broyden_step", seed)
    batch, dim = drawn_case.tensors["x"].shape
    memory, dtype = drawn_case.options["memory"], DTYPES[1 + seed % 3]
    case = broyden_case(batch, dim, memory, dtype, seed, history_dtype=torch.bfloat16)
    check_kernel_against_float64(case, cuda_device)


@pytest.mark.parametrize("op", ["anderson_step", "broyden_step"])
@pytest.mark.parametrize("seed", range(20))
def test_a_row_depends_on_nothing_but_itself(cuda_device, op, seed):
    """Bit for bit: neither on its batch-mates nor on its place, which decides its alignment."""
    require_kernels(cuda_device)
    case = drawn(op, seed).to(cuda_device)
    together = case.run(case.op)
    row = len(case.tensors["x"]) - 1
    one = {n: t[row:].clone() for n, t in case.tensors.items()}
    one["damping"] = case.tensors["damping"]
    one["z_next"] = case.tensors["z_next"][row:].clone()
    one["remaining"] = (one["status"] == ACTIVE).sum(dtype=torch.int32).reshape(1)
    alone = case.with_tensors(**one).run(case.op)
    for name in ("x_next", "status", "counters", "residuals"):
        assert equal(alone[name][0], together[name][row]), name


@pytest.mark.parametrize("op", ["anderson_step", "broyden_step"])
def test_tensors_on_different_devices_are_refused(cuda_device, op):
    require_kernels(cuda_device)
    case = drawn(op, 1)
    tensors = {n: t.to(cuda_device) for n, t in case.tensors.items()}
    tensors["status"] = case.tensors["status"]
    with pytest.raises(RuntimeError, match=r"on one GPU, that of x .* on the CPU"):
        case.op(*tensors.values(), case.numbers)
