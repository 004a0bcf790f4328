"""Mixed precision of the training step."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from lion_models.base.errors import UserError, choose
from lion_models.run.training import AMP

__all__ = ["Precision"]


class Precision:
    """Autocast for the forward pass, and the loss scale that fp16 needs.

    Args:
        kind: `none`, `bf16` or `fp16`.
        device: type of the device to train on.
        state: of an interrupted run's scaler, to continue it.

    Raises:
        UserError: fp16 on a CPU, whose kernels would compute it in float32 or not at all.
    """

    def __init__(self, kind: str, device: str, state: dict[str, Any] | None = None) -> None:
        choose("amp", kind, AMP)
        if kind == "fp16" and device != "cuda":
            raise UserError(f"`amp` fp16: needs `device` cuda, got {device}; use `amp` bf16")
        self._dtype = {"none": None, "bf16": torch.bfloat16, "fp16": torch.float16}[kind]
        self._device = device
        self._scaler = torch.amp.GradScaler(device, enabled=kind == "fp16")
        if state:
            self._scaler.load_state_dict(state)

    def autocast(self) -> AbstractContextManager[Any]:
        if self._dtype is None:
            return nullcontext()
        return torch.autocast(self._device, dtype=self._dtype)

    def backward(self, loss: Tensor) -> None:
        self._scaler.scale(loss).backward()

    def unscale(self, optimizer: torch.optim.Optimizer) -> None:
        """Gradients to their true size, before they are bounded."""
        self._scaler.unscale_(optimizer)

    def step(self, optimizer: torch.optim.Optimizer) -> None:
        """Step, unless fp16 overflowed; then the scale is lowered instead."""
        self._scaler.step(optimizer)
        self._scaler.update()

    def state(self) -> dict[str, Any]:
        return self._scaler.state_dict()
