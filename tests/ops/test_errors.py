"""Each message of the kernels' bindings, whole: one that stops at its first number is a defect.

tests/build runs this file once more with libstdc++ linked into the extension.
"""

from __future__ import annotations

import pytest
import torch

from tests.support import op_errors
from tests.support.masked_cases import arguments, make
from tests.support.step_checks import require_kernels

EVERYWHERE = [*op_errors.steps(), *op_errors.products(), *op_errors.dense_weights()]


@pytest.mark.parametrize("refusal", EVERYWHERE, ids=str)
def test_what_an_op_cannot_take_is_refused_with_the_reason(kernels_anywhere, refusal) -> None:
    require_kernels(kernels_anywhere.device)
    args = refusal.args_on(kernels_anywhere.device)
    with torch.no_grad(), pytest.raises(RuntimeError, match=refusal.pattern):
        getattr(kernels_anywhere.ops, refusal.op)(*args)


@pytest.mark.parametrize("refusal", op_errors.on_the_cpu_alone(), ids=str)
def test_what_only_the_cpu_can_know_is_refused_with_the_reason(refusal) -> None:
    require_kernels(torch.device("cpu"))
    with torch.no_grad(), pytest.raises(RuntimeError, match=refusal.pattern):
        getattr(torch.ops.deqcore, refusal.op)(*refusal.args)


def test_what_fails_in_torch_is_said_in_its_own_words(kernels) -> None:
    """x, without strides of zero, would have more bytes than an address can name."""
    require_kernels(kernels.device)
    op, (x, *others) = arguments("forward", make(16, 32, 5, 0.5))
    known = tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 13)
    said = "allocate 18014398509481984 bytes" if known else "the reason is on standard error"
    with pytest.raises(RuntimeError, match=said):
        getattr(kernels.ops, op)(x[:1].expand(2**46, 32), *others)
