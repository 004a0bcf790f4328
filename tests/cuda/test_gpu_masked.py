"""The CUDA kernels of the masked matmuls on a GPU, against the oracle and the CPU's kernels."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch.nn import functional as F

from deqcore import SparsityPattern, masked_linear
from tests.support.masked_cases import (
    DTYPES,
    NAMES,
    Case,
    arguments,
    check_result,
    make,
    run_op,
    run_op_on,
)
from tests.support.step_checks import require_kernels

SHAPES = [  # rows, columns, tokens, sparsity, structure
    (1, 1, 1, 0.0, None), (0, 5, 3, 0.5, None), (5, 0, 3, 0.5, None), (5, 6, 0, 0.5, None),
    (37, 53, 5, 0.5, None), (530, 850, 140, 0.9, None), (257, 96, 2000, 0.95, None),
    (4096, 1024, 700, 0.99, None), (2048, 2048, 4097, 0.97, None), (64, 64, 100, 1.0, None),
    (64, 64, 100, 0.0, None), (48, 64, 70, 0.5, 16), (128, 192, 300, 0.6, 32),
    (256, 320, 1, 0.5, 64), (2048, 1024, 1500, 0.8, 64), (2048, 1024, 1500, 0.9, 16),
]  # fmt: skip


def on(device: torch.device, case: Case) -> Case:
    tensors = (case.x, case.values, case.bias, case.grad)
    return Case(case.pattern.to(device), *(tensor.to(device) for tensor in tensors))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_error_is_at_most_twice_the_references(cuda_device, shape, dtype, name):
    require_kernels(cuda_device)
    check_result(name, make(*shape), dtype, partial(run_op_on, cuda_device, name))


@pytest.mark.parametrize("name", ["forward", "input gradient"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("structure", [None, 16, 64])
def test_a_token_depends_on_nothing_but_itself(cuda_device, structure, dtype, name):
    """Bit for bit, over every path that the number of tokens chooses, but that of a few tokens."""
    require_kernels(cuda_device)
    case = on(cuda_device, make(1024, 1024, 9000, 0.95, structure).to(dtype))
    whole = run_op(name, case)

    def last(tokens: int) -> torch.Tensor:
        tensors = (case.x[-tokens:], case.values, case.bias, case.grad[-tokens:])
        return run_op(name, Case(case.pattern, *tensors))

    for tokens in (9000, 8997, 1000, 63, 9):
        assert torch.equal(last(tokens), whole[-tokens:]), tokens
    assert torch.equal(last(1), last(4)[-1:])


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("structure", [None, 32])
def test_the_same_call_gives_the_same_bits(cuda_device, structure, name):
    case = on(cuda_device, make(512, 512, 3000, 0.9, structure).to(torch.bfloat16))
    first = run_op(name, case)
    assert all(torch.equal(run_op(name, case), first) for _ in range(5))


@pytest.mark.parametrize("name", NAMES)
def test_cpu_and_gpu_agree(cuda_device, name):
    case = make(300, 500, 700, 0.9).to(torch.float64)
    ours = run_op(name, on(cuda_device, case)).cpu()
    torch.testing.assert_close(ours, run_op(name, case), rtol=1e-12, atol=1e-10)


@pytest.mark.parametrize("name", NAMES)
def test_work_is_queued_on_the_current_stream(cuda_device, name):
    case = on(cuda_device, make(512, 512, 2000, 0.9).to(torch.float32))
    expected = run_op(name, case)
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)
        late = on(cuda_device, case)
        late.x.copy_(case.x)
        ours = run_op(name, late)
    stream.synchronize()
    assert torch.equal(ours, expected)


@pytest.mark.parametrize("structure", [None, 16])
def test_opcheck_and_gradcheck(cuda_device, structure):
    case = on(cuda_device, make(16, 32, 5, 0.5, structure))
    leaves = [t.clone().requires_grad_() for t in (case.x, case.values, case.bias)]

    def run(x, values, bias):
        return masked_linear(x, values, case.pattern, bias, backend="sparse")

    assert torch.autograd.gradcheck(run, leaves, fast_mode=structure is not None)
    assert torch.autograd.gradgradcheck(run, leaves, fast_mode=True)
    for name in NAMES:
        op, args = arguments(name, case)
        torch.library.opcheck(getattr(torch.ops.deqcore, op).default, args)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dense_weights_and_back(cuda_device, dtype):
    case = on(cuda_device, make(300, 500, 1, 0.9).to(dtype))
    weight = case.weight
    assert torch.equal(weight != 0, case.pattern.mask() & (weight != 0))
    assert torch.equal(case.pattern.from_dense(weight), case.values)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_two_four_weights_and_their_gradients(cuda_device, dtype):
    scores = torch.rand(128, 256)
    pattern = SparsityPattern.from_scores(scores, 0.5, structure="2:4").to(cuda_device)
    shapes = ((70, 256), (pattern.kept,), (128,))
    ours = [torch.randn(s, device=cuda_device, dtype=dtype, requires_grad=True) for s in shapes]
    dense = [t.detach().clone().requires_grad_() for t in ours]
    for _ in range(2):  # the second time with the weight that was kept
        y = masked_linear(ours[0], ours[1], pattern, ours[2], backend="sparse")
        expected = F.linear(dense[0], pattern.to_dense(dense[1]), dense[2])
        torch.testing.assert_close(y, expected, rtol=2e-2, atol=2e-1)
        with torch.no_grad():
            ours[1].mul_(2)
            dense[1].mul_(2)
    y = masked_linear(ours[0], ours[1], pattern, ours[2], backend="sparse")
    expected = F.linear(dense[0], pattern.to_dense(dense[1]), dense[2])
    y.sum().backward()
    expected.sum().backward()
    for mine, other in zip(ours, dense, strict=True):
        torch.testing.assert_close(mine.grad, other.grad, rtol=2e-2, atol=2e-1)


def test_tensors_on_different_devices_are_refused(cuda_device):
    require_kernels(cuda_device)
    case = make(8, 8, 3, 0.5).to(torch.float32)
    op, args = arguments("forward", case)
    with pytest.raises(RuntimeError, match=r"on one GPU, that of x .* on the CPU"):
        getattr(torch.ops.deqcore, op)(args[0].to(cuda_device), *args[1:])


@pytest.mark.slow
def test_the_last_token_of_a_huge_product_is_right(cuda_device):
    """More than 2^31 elements of y."""
    free, _ = torch.cuda.mem_get_info()
    if free < 24 * 2**30:
        pytest.skip(f"needs 24 GB of GPU memory, {free / 2**30:.0f} are free")
    case = on(cuda_device, make(4096, 64, 1, 0.9).to(torch.float32))
    x = torch.randn(2**31 // 4096 + 100, 64, device=cuda_device)
    run = partial(masked_linear, values=case.values, pattern=case.pattern, backend="sparse")
    assert torch.equal(run(x)[-100:], run(x[-100:]))
