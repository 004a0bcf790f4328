"""An exponential moving average of the trained weights."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.optim.swa_utils import get_ema_multi_avg_fn

from deqcore import MaskedLinear
from lion_models.methods.base import TunedClassifier, trained_state

__all__ = ["Average"]


class Average:
    """Follows the trained weights: average = d * average + (1 - d) * weights after every step.

    d is min(decay, (1 + steps) / (10 + steps)), so that a run of a few hundred steps is not
    dominated by its initial weights (the rule of TensorFlow's ExponentialMovingAverage).

    Args:
        decay: such as 0.999; None keeps no average.
        weights: of an interrupted run's average, to continue it.
    """

    def __init__(self, decay: float | None, weights: dict[str, Tensor] | None = None) -> None:
        self._decay = decay
        self.weights = {name: value.clone() for name, value in (weights or {}).items()}

    @torch.no_grad()
    def update(self, model: TunedClassifier, steps: int) -> None:
        """Take in the model's weights after step number `steps` (0 is the first)."""
        if self._decay is None:
            return
        own = {name: p for name, p in model.named_parameters() if p.requires_grad}
        if not self.weights:  # the first step
            self.weights = trained_state(model)
            return
        decay = min(self._decay, (1 + steps) / (10 + steps))
        averages = [self.weights[name].to(own[name].device) for name in own]
        get_ema_multi_avg_fn(decay)(averages, [p.detach() for p in own.values()], steps)
        self.weights |= dict(zip(own, averages, strict=True))  # beside what is not averaged

    def prune(self, model: TunedClassifier) -> None:
        """Keep the averages of what pruning has left of a model.

        Args:
            model: pruned since the last update.
        """
        if self._decay is None:
            return
        dense, self.weights = self.weights, trained_state(model)
        self.weights |= {name: dense[name] for name in self.weights if name in dense}
        for path, module in model.named_modules():
            if isinstance(module, MaskedLinear) and f"{path}.weight" in dense:
                self.weights[f"{path}.values"] = module.pattern.from_dense(dense[f"{path}.weight"])

    @contextmanager
    def applied(self, model: TunedClassifier) -> Iterator[None]:
        """Give the model the averaged weights for the length of the block."""
        if not self.weights:
            yield
            return
        current = trained_state(model)
        # Into the layers that there are: the optimizer holds their parameters.
        model.load_state_dict(self.weights, strict=False)
        try:
            yield
        finally:
            model.load_state_dict(current, strict=False)
