"""The optimizer of a run, robust training included."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn

import deqcore
from lion_models.methods.base import TunedClassifier
from lion_models.methods.lion import Lion
from lion_models.prompts.cdr import CDR, RobustOptimizer
from lion_models.run.config import RunConfig

__all__ = ["make_optimizer"]


def make_optimizer(model: TunedClassifier, config: RunConfig, steps: int) -> torch.optim.Optimizer:
    """An optimizer for all that a model trains.

    Vectors and scalars have no weight decay, the kept values of a pruned matrix have that of the
    matrix, and weights under robust training have that rule's own decay instead.

    Args:
        model: pruned already or not; robust training is for dense weights.
        config: optimizer, rates, and robust training.
        steps: optimizer steps in an epoch.
    """
    lr, weight_decay, _ = config.recipe
    masked = [m for m in model.modules() if isinstance(m, deqcore.MaskedLinear)]
    robust = [] if masked or config.robust == "none" else _robust_parameters(model, config)
    under_rule = {id(p) for p in robust}
    matrices = {id(m.values) for m in masked}
    trained = [p for p in model.parameters() if p.requires_grad and id(p) not in under_rule]
    decayed = [p for p in trained if p.dim() >= 2 or id(p) in matrices]
    in_decayed = {id(p) for p in decayed}
    groups: list[dict[str, Any]] = [
        {"params": decayed},
        {"params": [p for p in trained if id(p) not in in_decayed], "weight_decay": 0.0},
    ]
    if robust:
        groups.append({"params": robust, "weight_decay": 0.0})
    base: torch.optim.Optimizer
    if config.optimizer == "sgd":
        base = torch.optim.SGD(groups, lr=lr, momentum=0.9, weight_decay=weight_decay)
    else:
        base = torch.optim.AdamW(groups, lr=lr, weight_decay=weight_decay)
    if not robust:
        return base
    warm_up = max(1, math.ceil(config.epochs / 10)) * steps
    rule = CDR(
        tau=config.tau,
        decay=config.robust_decay,
        ramp=config.robust_ramp * steps,
        fix_after=warm_up if config.robust_set == "fixed" else None,
        threshold=config.robust_scope,
    )
    return RobustOptimizer(base, robust, rule)


def _robust_parameters(model: TunedClassifier, config: RunConfig) -> list[nn.Parameter]:
    if config.robust_on == "all":
        return [p for p in model.parameters() if p.requires_grad and p.dim() >= 2]
    if not isinstance(model, Lion):
        return []
    return [p for prompt in model.prompts.values() for p in prompt.matrices]
