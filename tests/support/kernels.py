"""The compiled kernels that a test of an op runs: the CPU's, a GPU's, or the emulated ones."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import pytest
import torch

from deqcore import _kernels
from tests.support.step_cases import StepCase
from tests.support.step_checks import check_kernel_against_float64, require_kernels
from tools import emulated_ops
from tools.emulation import CompilerMissingError


@dataclass(frozen=True)
class Kernels:
    """Where their tensors are, and the namespace of their ops."""

    device: torch.device
    ops: Any

    def of(self, case: StepCase) -> StepCase:
        """The case with its op among these."""
        return dataclasses.replace(case, op=getattr(self.ops, case.op.__name__))


def named_kernels(name: str) -> Kernels:
    """``cpu``, ``cuda``, or ``emulated``: the CUDA bindings on tensors on the CPU."""
    if name != "emulated":
        return Kernels(torch.device(name), torch.ops.deqcore)
    if _kernels.KERNELS_MODE == "reference":
        pytest.skip("the pure-PyTorch references run")
    try:
        return Kernels(torch.device("cpu"), emulated_ops.load())
    except CompilerMissingError as reason:
        pytest.skip(str(reason))


def check_against_float64(kernels: Kernels, case: StepCase) -> None:
    """Each result of the case's op among these kernels."""
    require_kernels(kernels.device)
    check_kernel_against_float64(kernels.of(case), kernels.device)
