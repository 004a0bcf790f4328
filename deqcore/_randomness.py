"""Whether f draws random numbers, which nothing that it returns says."""

from __future__ import annotations

from typing import Any

import torch


class Draws:
    """Those from torch's default generator, from now on."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._before = self._state()

    def were_made(self) -> bool:
        now = self._state()
        if isinstance(now, torch.Tensor):
            return not torch.equal(now, self._before)
        return bool(now != self._before)

    def _state(self) -> Any:
        if self.device.type == "cuda":
            return torch.cuda.default_generators[self.device.index].get_offset()  # on the host
        return torch.default_generator.get_state()
