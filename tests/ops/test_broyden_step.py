"""broyden_step: the kernel against its oracle, and the oracle against a dense inverse."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import deqcore
from deqcore.ops._rows import ACTIVE, HISTORY, MIXED
from tests.support.kernels import check_against_float64
from tests.support.problems import Counted, affine, generator
from tests.support.step_cases import broyden_case
from tests.support.step_checks import (
    check_frozen_rows_untouched,
    check_opcheck,
    check_refuses_autograd,
)

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
MEMORIES = st.one_of(st.integers(1, 12), st.sampled_from([16, 33, 64]))
DIMS = st.one_of(st.integers(0, 70), st.sampled_from([127, 128, 129, 300, 511, 513]))
OPTIONS = st.fixed_dictionaries(
    {"patience": st.sampled_from([1, 4, 25]), "max_steps": st.sampled_from([3, 10, 10_000])}
)


@settings(max_examples=4 * settings().max_examples)
@given(st.integers(0, 9), DIMS, MEMORIES, st.sampled_from(DTYPES), st.integers(0, 10_000), OPTIONS)
def test_kernel_is_as_exact_as_the_reference(kernels, batch, dim, memory, dtype, seed, options):
    check_against_float64(kernels, broyden_case(batch, dim, memory, dtype, seed, **options))


@settings(max_examples=2 * settings().max_examples)
@given(st.integers(0, 9), DIMS, MEMORIES, st.sampled_from(DTYPES[1:]), st.integers(0, 10_000))
def test_kernel_with_a_bfloat16_history_is_as_exact_as_the_reference(
    kernels, batch, dim, memory, dtype, seed
):
    case = broyden_case(batch, dim, memory, dtype, seed, history_dtype=torch.bfloat16)
    check_against_float64(kernels, case)


@pytest.mark.parametrize("dim", [4097, 20_001])
@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
@pytest.mark.parametrize("memory", [1, 12])
def test_kernel_with_a_bfloat16_history_is_as_exact_as_the_reference_on_long_rows(
    kernels_anywhere, dim, dtype, memory
):
    case = broyden_case(4, dim, memory, dtype, dim + memory, history_dtype=torch.bfloat16)
    check_against_float64(kernels_anywhere, case)


@pytest.mark.parametrize("dim", [4097, 20_001])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("memory", [1, 12])
def test_kernel_is_as_exact_as_the_reference_on_long_rows(kernels_anywhere, dim, dtype, memory):
    check_against_float64(kernels_anywhere, broyden_case(4, dim, memory, dtype, dim + memory))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("batch", [0, 1, 40])
def test_kernel_is_as_exact_as_the_reference_on_any_batch(kernels_anywhere, batch, dtype):
    check_against_float64(kernels_anywhere, broyden_case(batch, 33, 5, dtype, 1))


@given(st.integers(1, 6), st.integers(0, 40), st.integers(1, 9), st.integers(0, 999))
def test_frozen_rows_are_untouched_bit_for_bit(kernels, batch, dim, memory, seed):
    case = kernels.of(broyden_case(batch, dim, memory, torch.float32, seed))
    for step in (case.op, case.reference):
        check_frozen_rows_untouched(case, case.run(step))


@pytest.mark.parametrize("damping", [1.0, 0.6])
@pytest.mark.parametrize("memory", [4, 30])
def test_iterates_are_those_of_the_dense_inverse(damping, memory):
    """Good Broyden with an explicit inverse, H_0 = -I, that is reset when the memory is full."""
    A, b = affine(9, 0.9, seed=2)

    def g(x):
        return A @ x + b - x

    x = torch.zeros(9, dtype=A.dtype)
    iterates, inverse, count = [x], -torch.eye(9, dtype=A.dtype), 0
    for _ in range(12):
        if count == memory:
            inverse, count = -torch.eye(9, dtype=A.dtype), 0
        step = -damping * (inverse @ g(x))
        change = g(x + step) - g(x)
        image = inverse @ change
        inverse = inverse + torch.outer(step - image, step @ inverse) / (step @ image)
        x, count = x + step, count + 1
        iterates.append(x)

    f = Counted(lambda z: z @ A.T + b)
    solver = deqcore.Broyden(memory=memory, damping=damping, max_steps=13, rtol=0.0, atol=0.0)
    with torch.no_grad():
        deqcore.fixed_point(f, torch.zeros(1, 9, dtype=A.dtype), solver=solver)
    scale = max(z.abs().max() for z in iterates)
    for mine, dense in zip(f.seen, iterates, strict=False):
        assert (mine[0] - dense).abs().max() <= 1e-9 * scale


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_singular_update_restarts_the_row(kernels, dtype):
    """s . q = |s|^2 for the newest step means an inverse that does not exist."""
    case = kernels.of(broyden_case(1, 6, 5, dtype, seed=1))
    step = torch.zeros(6, dtype=dtype)
    step[0] = 2.0
    g = torch.arange(6).to(dtype)
    g[0] = 2.0  # step . g = |step|^2: with a damping of 1 the update divides by zero
    counters = torch.tensor([[3, 1, 3, 0, 0, 0, 0, 0]], dtype=torch.int32)
    case.tensors.update(
        x=torch.zeros(1, 6, dtype=dtype),
        f=g[None],
        damping=torch.ones(1, dtype=torch.float64),
        status=torch.full((1,), ACTIVE, dtype=torch.int8),
        counters=counters,
        residuals=torch.full((1, 3), 1e3, dtype=torch.float64),
    )
    case.tensors["s_ring"][0, 0] = step
    for run in (case.op, case.reference):
        after = case.run(run)
        torch.testing.assert_close(after["x_next"], g[None])  # a plain step
        assert after["counters"][0, HISTORY] == 1
        assert after["counters"][0, MIXED] == 0
        assert torch.equal(after["s_ring"][0, 0], g)


def test_zero_step_in_the_history_is_harmless(kernels):
    case = kernels.of(broyden_case(1, 6, 5, torch.float64, seed=1))
    case.tensors.update(
        status=torch.full((1,), ACTIVE, dtype=torch.int8),
        counters=torch.tensor([[3, 1, 3, 0, 0, 0, 0, 0]], dtype=torch.int32),
        residuals=torch.full((1, 3), 1e3, dtype=torch.float64),
        x=torch.randn(1, 6, generator=generator(1), dtype=torch.float64),
        f=torch.randn(1, 6, generator=generator(2), dtype=torch.float64),
    )
    case.tensors["s_ring"][0, 0] = 0.0
    for run in (case.op, case.reference):
        assert case.run(run)["x_next"].isfinite().all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("batch", "dim", "memory"), [(4, 7, 3), (1, 1, 1), (0, 3, 2), (3, 0, 2)])
def test_opcheck_passes(kernels, dtype, batch, dim, memory):
    check_opcheck(kernels.of(broyden_case(batch, dim, memory, dtype, 1)))


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_opcheck_passes_with_a_bfloat16_history(kernels, dtype):
    check_opcheck(kernels.of(broyden_case(4, 7, 3, dtype, 1, history_dtype=torch.bfloat16)))


def test_a_tensor_that_requires_grad_is_refused_in_grad_mode():
    check_refuses_autograd(broyden_case(3, 5, 2, torch.float32, 1))
