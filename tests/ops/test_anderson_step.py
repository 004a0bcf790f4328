"""anderson_step: the kernel against its oracle, and the oracle against torch.linalg."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from deqcore import _kernels
from deqcore.ops._rows import ACTIVE, BEST_STEP, COUNTERS, HISTORY, MIXED, STEPS, Rows
from tests.support.kernels import check_against_float64
from tests.support.problems import equal, generator
from tests.support.step_cases import StepCase, anderson_case, ring_steps
from tests.support.step_checks import (
    check_frozen_rows_untouched,
    check_opcheck,
    check_refuses_autograd,
)

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
MEMORIES = st.one_of(st.integers(1, 12), st.sampled_from([16, 33, 64]))
DIMS = st.one_of(st.integers(0, 70), st.sampled_from([127, 128, 129, 300, 511, 513]))
OPTIONS = st.fixed_dictionaries(
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


@settings(max_examples=4 * settings().max_examples)
@given(st.integers(0, 9), DIMS, MEMORIES, st.sampled_from(DTYPES), st.integers(0, 10_000), OPTIONS)
def test_kernel_is_as_exact_as_the_reference(kernels, batch, dim, memory, dtype, seed, options):
    check_against_float64(kernels, anderson_case(batch, dim, memory, dtype, seed, **options))


@pytest.mark.parametrize("dim", [4097, 20_001])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("memory", [1, 12])
def test_kernel_is_as_exact_as_the_reference_on_long_rows(kernels_anywhere, dim, dtype, memory):
    check_against_float64(kernels_anywhere, anderson_case(4, dim, memory, dtype, dim + memory))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("batch", [0, 1, 40])
def test_kernel_is_as_exact_as_the_reference_on_any_batch(kernels_anywhere, batch, dtype):
    check_against_float64(kernels_anywhere, anderson_case(batch, 33, 5, dtype, 1))


@given(st.integers(1, 6), st.integers(0, 40), st.integers(1, 9), st.integers(0, 999))
def test_frozen_rows_are_untouched_bit_for_bit(kernels, batch, dim, memory, seed):
    case = kernels.of(anderson_case(batch, dim, memory, torch.float32, seed))
    for step in (case.op, case.reference):
        check_frozen_rows_untouched(case, case.run(step))


def integer_history(memory: int, dim: int, vectors: torch.Tensor, dtype: torch.dtype) -> StepCase:
    """A full ring whose residuals are small integers: dependent columns are exactly so."""
    case = anderson_case(1, dim, memory, dtype, seed=1)
    counters = torch.zeros(1, COUNTERS, dtype=torch.int32)
    counters[0, STEPS] = counters[0, BEST_STEP] = counters[0, HISTORY] = memory - 1
    counters[0, MIXED] = 2
    rows = Rows(
        torch.full((1,), ACTIVE, dtype=torch.int8),
        counters,
        torch.full((1, 3), 1e3, dtype=torch.float64),
        torch.ones(1, dtype=torch.int32),
    )
    g_ring = torch.full((1, memory, dim), float("nan"), dtype=case.tensors["x"].dtype)
    g_ring[0, : memory - 1] = vectors[1:].to(g_ring.dtype)
    h_ring = torch.randn(1, memory, dim, generator=generator(5)).to(g_ring.dtype)
    case.tensors.update(
        x=torch.zeros(1, dim, dtype=g_ring.dtype),
        f=vectors[:1].to(dtype),
        damping=torch.ones(1, dtype=torch.float64),
        g_ring=g_ring,
        h_ring=h_ring,
        gram=g_ring.double() @ g_ring.double().mT,
        best=torch.empty(1, 0, dtype=g_ring.dtype),
        **rows._asdict(),
    )
    case.options.update(ridge=0.0)
    return case


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("kind", ["all equal", "all zero", "pairs equal", "more than dim"])
def test_singular_history_is_solved_without_ridge(kernels, kind, dtype):
    memory, dim = 6, 40
    g = generator(3)
    vectors = torch.randint(-8, 9, (memory, dim), generator=g).double()
    if kind == "all equal":
        vectors[:] = vectors[:1].clone()
    elif kind == "all zero":
        vectors[1:] = 0
    elif kind == "pairs equal":
        vectors[3:] = vectors[:3].clone()
    else:
        vectors = vectors[:, :1].expand(memory, dim) * torch.ones(dim)
    case = kernels.of(integer_history(memory, dim, vectors, dtype))
    by_reference, by_op = case.run(case.reference), case.run(case.op)
    for result in (by_reference, by_op):
        assert result["x_next"].isfinite().all()
        assert result["status"] == ACTIVE
        assert 1 <= result["counters"][0, MIXED] <= memory
    assert torch.equal(by_op["counters"], by_reference["counters"])
    torch.testing.assert_close(by_op["x_next"], by_reference["x_next"])


@pytest.mark.parametrize("max_weight", [1.5, 3.0, 1e4])
def test_weights_above_the_cap_leave_the_last_two_iterates_or_a_plain_step(kernels, max_weight):
    """Three residuals in a plane: exact with weights of about 100, or -0.7 and 1.7 of two."""
    a, b = torch.eye(40, dtype=torch.float64)[:2]
    vectors = torch.stack([2 * a + 5 * b, a + 2 * b, a + 1.99 * b])
    case = kernels.of(integer_history(3, 40, vectors, torch.float64))
    case.options.update(max_weight=max_weight)
    expected_terms = {1.5: 1, 3.0: 2, 1e4: 3}[max_weight]
    for step in (case.op, case.reference):
        assert case.run(step)["counters"][0, MIXED] == expected_terms


@given(st.integers(2, 9), st.integers(20, 60), st.integers(0, 999))
def test_mixing_weights_solve_the_least_squares_problem(kernels, memory, dim, seed):
    """Against the normal equations of torch.linalg, for each row that mixes."""
    case = kernels.of(
        anderson_case(6, dim, memory, torch.float64, seed, ridge=0.0, safeguard=float("inf"))
    )
    after = case.run(case.op)
    held = ring_steps(after["counters"], memory)
    for row in range(6):
        history = int(after["counters"][row, HISTORY])
        if after["status"][row] != ACTIVE or history == 0:
            continue
        newest = held[row].argsort(descending=True)[:history]
        g, h = after["g_ring"][row, newest], after["h_ring"][row, newest]
        alpha = torch.ones(1, dtype=g.dtype)
        if history > 1:
            differences = (g[:-1] - g[1:]).T
            gamma = torch.linalg.lstsq(differences, g[:1].T).solution[:, 0]
            zero = gamma.new_zeros(1)
            alpha = torch.cat([1 + zero, gamma]) - torch.cat([gamma, zero])
        torch.testing.assert_close(after["x_next"][row], alpha @ h, rtol=1e-8, atol=1e-8)
        assert int(after["counters"][row, MIXED]) == history


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("batch", "dim", "memory"), [(4, 7, 3), (1, 1, 1), (0, 3, 2), (3, 0, 2)])
def test_opcheck_passes(kernels, dtype, batch, dim, memory):
    check_opcheck(kernels.of(anderson_case(batch, dim, memory, dtype, 1)))


def test_a_tensor_that_requires_grad_is_refused_in_grad_mode():
    check_refuses_autograd(anderson_case(3, 5, 2, torch.float32, 1))


def test_inactive_slots_are_never_read(kernels):
    """Only the slots that a row uses are finite in these cases, so a read of another shows."""
    for seed in range(30):
        case = kernels.of(anderson_case(5, 6, 7, torch.float64, seed))
        going_on = case.run(case.op)
        rows = (going_on["status"] == ACTIVE) & case.tensors["f"].isfinite().all(1)
        assert going_on["x_next"][rows].isfinite().all()


def test_op_and_reference_agree_bit_for_bit_without_kernels():
    if _kernels.CPU_KERNELS:
        pytest.skip("the op is the kernel here")
    case = anderson_case(5, 33, 4, torch.float32, 1)
    op, reference = case.run(case.op), case.run(case.reference)
    assert all(equal(op[name], reference[name]) for name in op)
