"""The generators that f may draw from: whether it did, and back to where they were."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch
from torch import Tensor


class RandomNumbers:
    """The states of torch's, Python's and NumPy's generators; a GPU's where ``tensor`` is."""

    def __init__(self, tensor: Tensor | None) -> None:
        index = tensor.device.index if tensor is not None and tensor.is_cuda else None
        self._gpu = None if index is None else torch.cuda.default_generators[index]
        self._before = self._states()

    def _states(self) -> tuple[Any, ...]:
        gpu = None if self._gpu is None else self._gpu.get_state()
        return gpu, torch.get_rng_state(), random.getstate(), np.random.get_state()

    def have_been_drawn(self) -> bool:
        """Whether any is in another state than at first."""
        now = self._states()
        gpu = self._gpu is not None and not torch.equal(now[0], self._before[0])
        numpy = any(not np.array_equal(a, b) for a, b in zip(now[3], self._before[3], strict=True))
        return gpu or numpy or not torch.equal(now[1], self._before[1]) or now[2] != self._before[2]

    def put_back(self) -> None:
        """Go back to the states at first."""
        if not self.have_been_drawn():
            return
        gpu, cpu, python, numpy = self._before
        if self._gpu is not None:
            self._gpu.set_state(gpu)
        torch.set_rng_state(cpu)
        random.setstate(python)
        np.random.set_state(numpy)
