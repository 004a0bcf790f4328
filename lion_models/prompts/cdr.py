"""Robust training: critical weights learn, the others are driven to zero.

The paper trains robustly by the lottery hypothesis [paper]. The rule here is CDR (Xia et al.,
"Robust early-learning", ICLR 2021) [derived]; how it goes with momentum and Adam, with weights at
zero, and when the critical set is chosen, is ours [ours].
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lion_models.base.options import Options, option

__all__ = ["CDR", "THRESHOLDS", "RobustOptimizer"]

THRESHOLDS = ("layer", "global")


@dataclass(frozen=True)
class CDR(Options):
    """Which weights are critical, and what happens to the others.

    A weight's score is |gradient * weight|; the share 1 - tau with the highest scores is critical.
    With learning rate lr, a critical weight moves by 1 - tau times the base optimizer's own step
    and by -lr * decay * sgn(w); any other weight by -lr * decay * sgn(w) alone, and not past zero.

    Args:
        tau: share of the weights that is not critical, 0 <= tau < 1.
        decay: pull towards zero, in weight per unit of learning rate.
        ramp: steps over which tau rises linearly from 0; 0 means that it is constant.
        fix_after: None chooses the critical set anew at every step. A number of steps n fixes it
            for good by the sum of the scores of the first n steps, of which the first n - 1 are
            ordinary steps of the base optimizer.
        threshold: `layer` takes the share 1 - tau of each tensor, `global` of all together.
        floor: a weight smaller than this share of its tensor's root mean square is scored as if it
            were that large: a weight at zero would otherwise score zero for ever. 0 is the rule
            as published. A tensor of zeros is scored by |gradient|, unless this is 0.

    Raises:
        UserError: a value out of its range.
    """

    tau: float = option(0.5, low=0, below=1, expected="a share from 0 to below 1")
    decay: float = option(1e-3, low=0)
    ramp: int = option(0, low=0)
    fix_after: int | None = option(None, low=1)
    threshold: str = option("layer", choices=THRESHOLDS)
    floor: float = option(0.01, low=0, below=1, expected="a share from 0 to below 1")

    def tau_at(self, step: int) -> float:
        """Tau in a step; 1 is the first."""
        return self.tau if step > self.ramp else self.tau * step / (self.ramp + 1)

    def scores(self, weight: Tensor, gradient: Tensor) -> Tensor:
        """|gradient * weight| with the floor; the shape of both."""
        size = weight.abs()
        if self.floor:
            rms = weight.square().mean().sqrt()
            size = torch.where(rms > 0, size.clamp_min(self.floor * rms), torch.ones_like(size))
        return gradient.abs() * size

    def critical(self, scores: Sequence[Tensor], tau: float) -> list[Tensor]:
        """True where a weight is critical; of equal scores the first in order is.

        Args:
            scores: of each tensor.
            tau: share that is not critical; at least one weight is, of each tensor or of all.
        """
        if self.threshold == "layer":
            return [_highest(score.flatten(), tau).view_as(score) for score in scores]
        chosen = _highest(torch.cat([score.flatten() for score in scores]), tau)
        parts = chosen.split([score.numel() for score in scores])
        return [part.view_as(score) for part, score in zip(parts, scores, strict=True)]


class RobustOptimizer(torch.optim.Optimizer):
    """Any optimizer, with the CDR rule on some of its parameters.

    The base optimizer sees every gradient, so that its moments stay those of the whole tensor, and
    its step is then taken back where a weight is not critical. Masking the gradient instead would
    not stop a weight: momentum and Adam's moments go on moving it. Nor would scaling the gradient
    by 1 - tau do anything under Adam, whose step does not depend on the gradient's scale; the step
    itself is scaled, which for SGD with a constant tau is the rule to the letter. Moments masked
    as well would let a weight that turns critical again jump: Adam's second moment decays slower
    than its first grows, by up to (1 - beta1) / sqrt(1 - beta2), about 3.

    Args:
        base: made already; its groups are used as they are.
        parameters: on which the rule acts, each in a group of the base without weight decay (the
            rule has its own). The others are left to the base.
        rule: tau, decay and choice of the critical set.

    Attributes:
        base: the optimizer underneath.
        steps: steps taken.
        fixed: the critical set of each parameter once it is fixed, else empty.

    Raises:
        ValueError: no parameter, one that the base does not have, or one with weight decay.
    """

    def __init__(
        self, base: torch.optim.Optimizer, parameters: Iterable[nn.Parameter], rule: CDR
    ) -> None:
        super().__init__(base.param_groups, base.defaults)
        self.base = base
        self.rule = rule
        self.steps = 0
        self.fixed: list[Tensor] = []
        self._scoped = list(parameters)
        self._sums: list[Tensor] = []
        self._check()
        self._share()

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step of the base optimizer, corrected by the rule."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        active = [p for p in self._scoped if p.grad is not None]
        if len(active) not in (0, len(self._scoped)):
            raise RuntimeError(
                f"{len(self._scoped) - len(active)} of {len(self._scoped)} parameters under the "
                "rule have no gradient; leave out those that the loss does not depend on"
            )
        if not active:
            self.base.step()
            return loss
        self.steps += 1
        critical = self._choose()
        if critical is None:
            self.base.step()
            return loss
        before = [p.clone() for p in self._scoped]
        self.base.step()
        keep = 1 - self.rule.tau_at(self.steps)
        rates = {id(p): group["lr"] for group in self.param_groups for p in group["params"]}
        for p, old, mask in zip(self._scoped, before, critical, strict=True):
            pull = rates[id(p)] * self.rule.decay
            moved = old + keep * (p - old) - pull * old.sign()
            # A step past zero would only swing from side to side.
            faded = old.sign() * (old.abs() - pull).clamp_min(0)
            p.copy_(torch.where(mask, moved, faded))
        return loss

    def critical_of(self, parameter: Tensor) -> Tensor | None:
        """The fixed critical set of a parameter, a bool tensor of its shape; None without one."""
        for each, mask in zip(self._scoped, self.fixed, strict=False):
            if each is parameter:
                return mask
        return None

    def state_dict(self) -> dict[str, Any]:
        """The base's state, and the rule's: enough to go on bit for bit."""
        robust = {"steps": self.steps, "sums": self._sums, "fixed": self.fixed}
        return {"base": self.base.state_dict(), "robust": robust}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """The inverse of `state_dict`.

        Raises:
            ValueError: the state of an optimizer without the rule, or of other parameters.
        """
        if set(state_dict) != {"base", "robust"}:
            raise ValueError(
                "state_dict: not of a RobustOptimizer; was the run begun without robust training?"
            )
        self.base.load_state_dict(state_dict["base"])
        robust = state_dict["robust"]
        for name in ("sums", "fixed"):
            shapes = [each.shape for each in robust[name]]
            if shapes and shapes != [p.shape for p in self._scoped]:
                raise ValueError(f"state_dict: {name} of shapes {shapes} fit other parameters")
        self.steps = robust["steps"]
        self._sums, self.fixed = (
            [each.to(p.device) for each, p in zip(robust[name], self._scoped, strict=False)]
            for name in ("sums", "fixed")
        )
        self._share()

    def _choose(self) -> list[Tensor] | None:
        """The critical set of this step; None while a set to be fixed gathers its scores."""
        if self.fixed:
            return self.fixed
        scores = [self.rule.scores(p, p.grad) for p in self._scoped if p.grad is not None]
        if self.rule.fix_after is None:
            return self.rule.critical(scores, self.rule.tau_at(self.steps))
        if not self._sums:
            self._sums = [torch.zeros_like(score) for score in scores]
        for total, score in zip(self._sums, scores, strict=True):
            total += score
        if self.steps < self.rule.fix_after:
            return None
        self.fixed = self.rule.critical(self._sums, self.rule.tau)
        self._sums = []
        return self.fixed

    def _check(self) -> None:
        if not self._scoped:
            raise ValueError("parameters: none; robust training needs weights to act on")
        groups = {id(p): group for group in self.param_groups for p in group["params"]}
        for p in self._scoped:
            if id(p) not in groups:
                raise ValueError(
                    f"parameters: one of shape {tuple(p.shape)} is not in the base optimizer"
                )
            decay = groups[id(p)].get("weight_decay", 0.0)
            if decay:
                raise ValueError(
                    f"parameters: one of shape {tuple(p.shape)} has weight decay {decay} in the "
                    "base optimizer; put it in a group with weight_decay=0, as the rule has its own"
                )

    def _share(self) -> None:
        # One set of groups and one state: what a schedule or a loss scale changes here, the base
        # uses. The base replaces both when it loads a state.
        self.param_groups = self.base.param_groups
        self.state = self.base.state


def _highest(scores: Tensor, tau: float) -> Tensor:
    """True at the round((1 - tau) n) highest of n scores, one at least; (n,)."""
    count = max(1, round((1 - tau) * scores.numel()))
    order = scores.argsort(descending=True, stable=True)
    mask = torch.zeros(scores.numel(), dtype=torch.bool, device=scores.device)
    mask[order[:count]] = True
    return mask
