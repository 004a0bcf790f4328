"""Whether f draws random numbers, which nothing that it returns says."""

from __future__ import annotations

from typing import Any

import torch


class Draws:
    """Looks at torch's default generator, late in a solve.

    By then what is drawn once in a solve has been drawn, and most solves are over.
    """

    def __init__(self, device: torch.device, patience: int, max_steps: int) -> None:
        self.device = device
        self.from_step = max(2, min(patience, max_steps))  # the evaluations that are watched
        self._before: Any = None

    def begin(self) -> None:
        """Before the first evaluation that is watched."""
        self._before = self._state()

    def were_made(self) -> bool:
        """Whether numbers have been drawn since :meth:`begin`; False without it."""
        if self._before is None:
            return False
        now = self._state()
        return not (torch.equal(now, self._before) if isinstance(now, torch.Tensor)
                    else now == self._before)  # fmt: skip

    def _state(self) -> Any:
        if self.device.type == "cuda":
            return torch.cuda.default_generators[self.device.index].get_offset()  # on the host
        return torch.default_generator.get_state()
