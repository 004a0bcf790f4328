"""csrc/cuda/X.cpp on a CPU: what tests/ops and tests/masked do not ask of the emulated ops."""

from __future__ import annotations

import dataclasses
import re
from functools import partial
from typing import Any

import pytest
import torch

from tests.support import op_errors
from tests.support.kernels import named_kernels
from tests.support.masked_cases import DTYPES, NAMES, arguments, check_result, make, oracle, run_op
from tests.support.problems import equal
from tests.support.step_cases import anderson_case, broyden_case
from tests.support.step_checks import check_kernel_against_float64
from tools.emulated_ops import EmulatedOps
from tools.emulation import ROOT

CPU = torch.device("cpu")
CASE = make(16, 32, 5, 0.5).to(torch.float32)
STEPS = op_errors.step_cases()
CALLS: dict[str, tuple[Any, ...]] = {
    **{name: case.args for name, case in STEPS.items()},
    **dict(arguments(name, CASE) for name in ("forward", "values' gradient")),
    "masked_to_dense": (CASE.values, CASE.pattern.indices, 16, 32),
    "masked_from_dense": (CASE.weight, CASE.pattern.indices),
}
OPERANDS = [  # an op, and one of its tensors that has memory to be somewhere, but not its numbers
    (op, index)
    for op, args in CALLS.items()
    for index, arg in enumerate(args)
    if isinstance(arg, torch.Tensor) and arg.numel() and not (op in STEPS and arg is args[-1])
]


@pytest.fixture(scope="module")
def ops() -> EmulatedOps:
    emulated: EmulatedOps = named_kernels("emulated").ops
    return emulated


def call(ops: EmulatedOps, op: str) -> Any:
    args = [a.clone() if isinstance(a, torch.Tensor) else a for a in CALLS[op]]
    with torch.no_grad():
        return getattr(ops, op)(*args)


def test_each_op_with_a_cuda_binding_is_emulated_and_called_here() -> None:
    text = "".join(path.read_text() for path in (ROOT / "csrc/cuda").glob("*.cpp"))
    assert set(re.findall(r'm\.impl\("(\w+)"', text)) == set(CALLS)


def sizes(tensor: torch.Tensor) -> str:
    return f"({', '.join(map(str, tensor.shape))})"


def check_refused(ops: EmulatedOps, op: str, tensor: torch.Tensor, gpu: int, message: str) -> None:
    with (
        ops.emulating(places=[(tensor, gpu)]),
        torch.no_grad(),
        pytest.raises(RuntimeError, match=f"^{re.escape(message)}$"),
    ):
        getattr(ops, op)(*CALLS[op])
    call(ops, op)


@pytest.mark.parametrize(("op", "index"), [operand for operand in OPERANDS if operand[1]])
@pytest.mark.parametrize(("gpu", "place"), [(-1, "the CPU"), (1, "another GPU")])
def test_a_tensor_that_is_elsewhere_is_named(ops, op, index, gpu, place) -> None:
    tensor = CALLS[op][index]
    first = "expected all tensors on one GPU, that of x (cuda:0)"
    check_refused(ops, op, tensor, gpu, f"{first}, got one of shape {sizes(tensor)} on {place}")


@pytest.mark.parametrize("op", CALLS)
def test_a_first_tensor_that_is_elsewhere_is_named(ops, op) -> None:
    x, other = CALLS[op][:2]
    one = "expected all tensors on one GPU"
    message = f"{one}, got the first one, of shape {sizes(x)}, on the CPU"
    check_refused(ops, op, x, -1, message)
    message = f"{one}, that of x (cuda:1), got one of shape {sizes(other)} on another GPU"
    check_refused(ops, op, x, 1, message)


@pytest.mark.parametrize("op", STEPS)
def test_numbers_on_a_gpu_are_refused(ops, op) -> None:
    check_refused(ops, op, CALLS[op][-1], 0, "options: expected a tensor on the CPU")


@pytest.mark.parametrize("op", CALLS)
def test_a_launch_that_fails_is_said_with_the_ops_name(ops, op) -> None:
    words = "this GPU has too little shared memory for a block"
    with (
        ops.emulating(refusal=words),
        pytest.raises(RuntimeError, match=f"^deqcore::{op}: {words}$"),
    ):
        call(ops, op)
    call(ops, op)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("structure", [None, 16])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_operands_may_lie_anywhere_and_have_any_strides(ops, dtype, structure, name) -> None:
    case = make(48, 64, 21, 0.5, structure).to(dtype)
    expected = run_op(name, case, ops)
    torch.testing.assert_close(expected.double(), oracle(name, case), rtol=2e-2, atol=1e-1)
    op, args = arguments(name, case)
    for move in (_one_further, _turned):
        moved = [
            move(a) if isinstance(a, torch.Tensor) and i != 2 else a for i, a in enumerate(args)
        ]
        assert torch.equal(getattr(ops, op)(*moved), expected)


def _one_further(t: torch.Tensor) -> torch.Tensor:
    """The same numbers at an address that is no multiple of 16 bytes."""
    memory = t.new_empty(t.numel() + 1)
    memory[1:] = t.flatten()
    return memory[1:].view(t.shape)


def _turned(t: torch.Tensor) -> torch.Tensor:
    if t.dim() == 1:
        return t.repeat_interleave(2)[::2]
    return t.t().contiguous().t()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("tokens", [1, 130, 300])
def test_blocks_of_64_are_as_exact_on_hopper(ops, tokens, dtype, name) -> None:
    case = make(128, 192, tokens, 0.5, 64)
    with ops.emulating(trial=True, seed=tokens):
        check_result(name, case, dtype, partial(run_op, name, ops=ops))


@pytest.mark.parametrize("make_case", [anderson_case, broyden_case])
def test_steps_are_as_exact_on_the_path_on_trial(ops, make_case) -> None:
    case = make_case(3, 9001, 5, torch.float32, 1)
    step = ops.anderson_step if make_case is anderson_case else ops.broyden_step
    for trial, launches in ((False, 2), (True, 1)):
        with ops.emulating(trial=trial, seed=3):
            case.run(step)
            assert ops.launches() == launches
            check_kernel_against_float64(dataclasses.replace(case, op=step), CPU)


@pytest.mark.parametrize("op", STEPS)
def test_no_order_of_threads_changes_a_bit(ops, op) -> None:
    case = STEPS[op]
    results = []
    for seed in range(4):
        with ops.emulating(seed=seed):
            results.append(case.run(getattr(ops, op)))
    for result in results[1:]:
        assert all(equal(result[name], results[0][name]) for name in result)
