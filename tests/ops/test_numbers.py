"""The numbers of a step op: one order, said by a NamedTuple, in Python and in C++."""

from __future__ import annotations

import pytest
import torch
from torch._subclasses import FakeTensor, FakeTensorMode

from deqcore import Anderson, Broyden, Picard, _kernels
from deqcore.ops._library import number_names, pack_numbers, unpack_numbers
from deqcore.ops._rows import Limits
from deqcore.ops.anderson_step import AndersonNumbers
from deqcore.ops.broyden_step import BroydenNumbers

LIMITS = Limits(rtol=1e-3, atol=1e-7, patience=11, max_steps=2**31 - 1)


@pytest.mark.parametrize(
    "numbers",
    [
        LIMITS,
        BroydenNumbers(LIMITS, memory=30),
        AndersonNumbers(LIMITS, 1e-8, 2, 0, safeguard=float("inf"), max_weight=1e4),
    ],
    ids=lambda numbers: type(numbers).__name__,
)
def test_numbers_come_back_from_their_tensor(numbers):
    options = pack_numbers(numbers)
    assert options.dtype == torch.float64
    assert len(options) == len(number_names(type(numbers)))
    again = unpack_numbers(type(numbers), options)
    assert again == numbers
    assert type(again) is type(numbers)
    assert isinstance(unpack_numbers(Limits, options).patience, int)


def test_numbers_that_are_shared_are_tensors_anywhere():
    numbers = LIMITS._replace(rtol=0.123)
    with FakeTensorMode():
        assert isinstance(pack_numbers(numbers), FakeTensor)
    with torch.inference_mode():
        options = pack_numbers(numbers)
    assert type(options) is torch.Tensor
    assert not options.is_inference()
    assert pack_numbers(numbers) is options


def test_names_are_those_of_all_fields_in_order():
    assert number_names(BroydenNumbers) == ["rtol", "atol", "patience", "max_steps", "memory"]


@pytest.mark.parametrize(
    ("solver", "kind"),
    [(Picard(), AndersonNumbers), (Anderson(), AndersonNumbers), (Broyden(), BroydenNumbers)],
    ids=str,
)
def test_a_solver_gives_the_numbers_of_its_op(solver, kind):
    numbers = solver.numbers(LIMITS)
    assert isinstance(numbers, kind)
    assert numbers.limits == LIMITS
    for name in set(kind._fields) - {"limits", "restart"}:
        expected = getattr(solver, name, None)
        assert expected is None or getattr(numbers, name) == expected


def test_limits_larger_than_a_kernel_counts_mean_as_many_as_it_counts():
    x = torch.zeros(2, 3)
    context = Anderson(max_steps=2**40, start=2**40).context(x, x.dtype, ())
    assert context.limits.max_steps == context.numbers.start == 2**31 - 1


@pytest.mark.skipif(not _kernels.CPU_KERNELS, reason="no kernels here")
@pytest.mark.parametrize(
    ("op", "kind"), [("anderson_step", AndersonNumbers), ("broyden_step", BroydenNumbers)]
)
def test_the_kernels_read_the_numbers_in_the_same_order(op, kind):
    assert _kernels.loaded["cpu"]["numbers"][op] == number_names(kind)
