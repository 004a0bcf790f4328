"""What is asserted about a step of either solver."""

from __future__ import annotations

import os

import pytest
import torch
from torch import Tensor

from deqcore import _kernels
from deqcore.ops._rows import ACTIVE, HISTORY
from tests.support.problems import equal, generator
from tests.support.step_cases import StepCase

# A kernel's error may be twice that of the reference in the same dtype, and this many units in the
# last place of the row's largest number on top (its sums are taken in another order).
FLOOR_ULPS = 16


def require_kernels(device: torch.device) -> None:
    if not (_kernels.CUDA_KERNELS if device.type == "cuda" else _kernels.CPU_KERNELS):
        if device.type == "cuda" and os.environ.get("REQUIRE_CUDA") == "1":
            pytest.fail(f"REQUIRE_CUDA=1, but there are no CUDA kernels: {_kernels.missing}")
        pytest.skip(f"no {device.type} kernels: {_kernels.missing}")


def check_kernel_against_float64(case: StepCase, device: torch.device) -> None:
    """Every result of the op, against the reference in float64 and in the state's own dtype."""
    kernel = {n: t.cpu() for n, t in case.to(device).run(case.op).items()}
    same = case.run(case.reference)
    exact = case.in_float64().run(case.reference)
    for name in ("status", "counters", "remaining"):
        assert torch.equal(kernel[name], same[name]), f"{name}: {kernel[name]} and {same[name]}"
    others = [same] if case.tensors["x"].dtype != torch.float64 else _reordered(case)
    check_frozen_rows_untouched(case, kernel)

    going_on = kernel["status"] == ACTIVE
    active = case.tensors["status"] == ACTIVE
    _compare("residuals", kernel, others, exact, active)
    # Weights are differences of numbers near one, in float64: each slot's is as exact as that.
    slots = exact["h_ring" if "h_ring" in exact else "s_ring"].double().flatten(1)
    if slots.shape[1]:
        slots = slots.where(slots.isfinite(), 0).abs().amax(1, keepdim=True)
    slack = (FLOOR_ULPS * torch.finfo(torch.float64).eps * slots).sum(1)
    _compare("x_next", kernel, others, exact, active, slack)
    for ring in ("g_ring", "h_ring"):
        if ring in kernel:
            _compare(ring, kernel, others, exact, active)
    if "s_ring" in kernel:
        _compare("s_ring", kernel, others, exact, going_on)
        if kernel["s_ring"].dtype != kernel["x_next"].dtype:
            stored = going_on & (kernel["counters"][:, HISTORY] > 0)  # a retreat stores nothing
            _check_rounded_step(case, kernel, exact, stored, slack)
        _compare("best", kernel, others, exact, going_on)
    elif kernel["best"].shape[1]:
        _compare("best", kernel, others, exact, active)
    used = case.used_gram(kernel)
    gram = [torch.where(used, result["gram"], 0.0) for result in (kernel, exact, *others)]
    kernel_gram, exact_gram, *other_grams = [{"gram": g} for g in gram]
    _compare("gram", kernel_gram, other_grams, exact_gram, going_on)
    if kernel["z_next"].shape[1]:
        assert equal(kernel["z_next"], kernel["x_next"].to(kernel["z_next"].dtype))


def _check_rounded_step(
    case: StepCase,
    kernel: dict[str, Tensor],
    exact: dict[str, Tensor],
    rows: Tensor,
    slack: Tensor,  # [B]
) -> None:
    """The step taken is the step stored, and that is the exact one but for a single rounding.

    Other than that, its error is bounded as if nothing had been rounded.
    """

    def newest(result: dict[str, Tensor]) -> Tensor:  # [rows, D]
        ring, slot = result["s_ring"][rows], result["counters"][rows, HISTORY].long() - 1
        return ring.gather(1, slot[:, None, None].expand(-1, 1, ring.shape[2])).squeeze(1)

    got, truth = newest(kernel), newest(exact)
    assert equal(kernel["x_next"][rows], case.tensors["x"][rows] + got.float())
    if not truth.numel():
        return
    unrounded = case.with_tensors(s_ring=case.tensors["s_ring"].float()).run(case.reference)
    worst = _error(newest(unrounded), truth)
    floor = FLOOR_ULPS * torch.finfo(torch.float32).eps * truth.abs().amax(1).clamp_min(1e-3)
    bound = 2 * worst + floor + slack[rows]
    half_ulp = torch.finfo(got.dtype).eps / 2 * truth.abs()
    error = (got.double() - truth).abs()
    assert (error <= half_ulp + 2 * bound[:, None]).all(), (error - half_ulp).amax()


def check_frozen_rows_untouched(case: StepCase, after: dict[str, Tensor]) -> None:
    frozen = case.tensors["status"] != ACTIVE
    for name, before in case.tensors.items():
        if name not in ("damping", "remaining", "x_next", "z_next"):
            assert equal(after[name][frozen], before[frozen]), name
    x = case.tensors["x"][frozen]
    assert equal(after["x_next"][frozen], x)
    if after["z_next"].shape[1]:
        assert equal(after["z_next"][frozen], x.to(after["z_next"].dtype))


def _reordered(case: StepCase) -> list[dict[str, Tensor]]:
    """A float64 reference has no better oracle: other roundings of its sums show its error.

    The sums of this step are taken in another order; those of earlier steps, in the Gram matrix,
    move by one unit in the last place, which the small solve may amplify.
    """
    results = []
    dim = case.tensors["x"].shape[1]
    eps = torch.finfo(torch.float64).eps
    for seed in range(4):
        order = torch.randperm(dim, generator=generator(seed))
        inverse = order.argsort()
        permuted = case.with_columns(order)
        gram = permuted.tensors["gram"]
        signs = torch.randint(0, 2, gram.shape, generator=generator(seed)) * 2 - 1
        signs = signs.tril() + signs.tril(-1).mT
        permuted = permuted.with_tensors(gram=gram * (1 + eps * signs))
        result = _moved_back(permuted.run(case.reference), inverse)
        results.append(result)
    return results


def _moved_back(result: dict[str, Tensor], inverse: Tensor) -> dict[str, Tensor]:
    wide = {"g_ring", "h_ring", "s_ring", "best", "x_next"}
    return {
        n: t[..., inverse] if n in wide and t.shape[-1] == len(inverse) else t
        for n, t in result.items()
    }


def _compare(
    name: str,
    kernel: dict[str, Tensor],
    references: list[dict[str, Tensor]],
    exact: dict[str, Tensor],
    rows: Tensor,
    slack: Tensor | None = None,  # [B]
) -> None:
    truth = exact[name][rows].double().flatten(1)
    got = kernel[name][rows].flatten(1)
    if not truth.numel():
        return
    assert torch.equal(got.isnan(), truth.isnan()), f"{name}: NaN elsewhere"
    eps = torch.finfo(got.dtype).eps
    largest = truth.where(truth.isfinite(), 0).abs().amax(1)
    bound = FLOOR_ULPS * eps * largest.clamp_min(1e-3)
    if slack is not None:
        bound = bound + slack[rows]
    worst = torch.zeros_like(bound)
    for reference in references:
        worst = torch.maximum(worst, _error(reference[name][rows].flatten(1), truth))
    error = _error(got, truth)
    assert (error <= 2 * worst + bound).all(), (
        f"{name}: error {error.tolist()}, reference {worst.tolist()}, floor {bound.tolist()}"
    )


def _error(got: Tensor, truth: Tensor) -> Tensor:
    difference = (got.double() - truth).abs()
    same = (got.double() == truth) | truth.isnan()
    return difference.where(~same, 0).amax(1)


def check_opcheck(case: StepCase) -> None:
    torch.library.opcheck(case.op.default, case.args)


def check_refuses_autograd(case: StepCase) -> None:
    """A tensor that requires grad, in grad mode, whichever it is; and none of them without."""
    for name in ("x", "f"):
        tensors = {n: t.clone() for n, t in case.tensors.items()}
        tensors[name].requires_grad_()
        args = (*tensors.values(), case.numbers)
        with pytest.raises(RuntimeError, match="has no derivative"):
            case.op(*args)
        with torch.no_grad():
            case.op(*args)
        assert not tensors["x_next"].isnan().all()
