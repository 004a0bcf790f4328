"""The optimizer of a run, robust training included."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn

import deqcore
from lion_models.methods.base import TunedClassifier
from lion_models.methods.registry import Recipe
from lion_models.prompts.cdr import CDR, RobustOptimizer
from lion_models.prompts.config import RobustConfig
from lion_models.run.training import TrainingConfig

__all__ = ["make_optimizer"]


def make_optimizer(
    model: TunedClassifier,
    training: TrainingConfig,
    recipe: Recipe,
    steps: int,
    robust: RobustConfig | None = None,
) -> torch.optim.Optimizer:
    """An optimizer for all that a model trains.

    Vectors and scalars have no weight decay, the kept values of a pruned matrix have that of the
    matrix, and weights under robust training have that rule's own decay instead.

    Args:
        model: pruned already or not; robust training is for dense weights.
        training: its optimizer and epochs count.
        recipe: its rates count.
        steps: optimizer steps in an epoch.
        robust: None means that there is no robust training.
    """
    masked = [m for m in model.modules() if isinstance(m, deqcore.MaskedLinear)]
    ruled = [] if masked or robust is None else _robust_parameters(model, robust)
    under_rule = {id(p) for p in ruled}
    matrices = {id(m.values) for m in masked}
    trained = [p for p in model.parameters() if p.requires_grad and id(p) not in under_rule]
    decayed = [p for p in trained if p.dim() >= 2 or id(p) in matrices]
    in_decayed = {id(p) for p in decayed}
    groups: list[dict[str, Any]] = [
        {"params": decayed},
        {"params": [p for p in trained if id(p) not in in_decayed], "weight_decay": 0.0},
    ]
    if ruled:
        groups.append({"params": ruled, "weight_decay": 0.0})
    lr, weight_decay, _ = recipe
    base: torch.optim.Optimizer
    if training.optimizer == "sgd":
        base = torch.optim.SGD(groups, lr=lr, momentum=0.9, weight_decay=weight_decay)
    else:
        base = torch.optim.AdamW(groups, lr=lr, weight_decay=weight_decay)
    if robust is None or not ruled:
        return base
    warm_up = max(1, math.ceil(training.epochs / 10)) * steps
    rule = CDR(
        tau=robust.tau,
        decay=robust.robust_decay,
        ramp=robust.robust_ramp * steps,
        fix_after=warm_up if robust.robust_set == "fixed" else None,
        threshold=robust.robust_scope,
    )
    return RobustOptimizer(base, ruled, rule)


def _robust_parameters(model: TunedClassifier, robust: RobustConfig) -> list[nn.Parameter]:
    if robust.robust == "none":
        return []
    if robust.robust_on == "all":
        return [p for p in model.parameters() if p.requires_grad and p.dim() >= 2]
    return [p for prompt in model.implicit_layers.values() for p in prompt.matrices]
