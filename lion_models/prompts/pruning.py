"""Pruning of LION's layers: the weights that are not critical are removed for good [paper].

Which go is decided by size, within the critical set where robust training has fixed one [ours].
The layers' linears become `deqcore.MaskedLinear`, which stores, trains and multiplies the kept
weights alone. Convolutions (the space `pixel`) stay dense.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

import deqcore
from lion_models.base.errors import UserError
from lion_models.prompts.cdr import RobustOptimizer
from lion_models.prompts.solved import SolvedModule

__all__ = ["Pruning", "check_prunable", "prune_and_rebuild", "prune_model"]


class Pruning(NamedTuple):
    """What is pruned in training, and when.

    Attributes:
        sparsity: share of each matrix of the implicit layers that is dropped.
        epoch: after whose training that happens, and before its validation; 1 is the first. Later
            epochs train the kept weights, without robust training.
    """

    sparsity: float
    epoch: int


def check_prunable(model: nn.Module) -> None:
    """Make sure that there is something to prune.

    Raises:
        UserError: the model has no implicit layer on tokens or features.
    """
    if not _prunable(model):
        raise UserError(
            "`sparsity`: prunes the linear layers of LION's implicit layers, and this model has "
            "none (a layer on pixels is made of convolutions); use `sides` both or leave it out"
        )


def prune_model(
    model: nn.Module,
    sparsity: float,
    critical_of: Callable[[Tensor], Tensor | None] = lambda _: None,
) -> dict[str, deqcore.SparsityPattern]:
    """Replace the linears of the implicit layers by masked ones, in place.

    Args:
        model: not pruned yet.
        sparsity: share of each matrix that is dropped.
        critical_of: the fixed critical set of a weight, if it has one: critical weights are kept
            before others. Of a set the largest are kept.

    Returns:
        What is kept of each weight, by the weight's name before.
    """
    patterns: dict[str, deqcore.SparsityPattern] = {}
    for place, solved in _prunable(model).items():
        linears = _linears(solved)
        scores = {n: _scores(m.weight, critical_of(m.weight)) for n, m in linears.items()}
        deqcore.prune_layer(solved, scores, sparsity)
        for name in linears:
            masked = solved.get_submodule(name)
            assert isinstance(masked, deqcore.MaskedLinear)
            patterns[f"{place}.{name}.weight"] = masked.pattern
    return patterns


def prune_and_rebuild(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    sparsity: float,
    rebuild: Callable[[], torch.optim.Optimizer],
) -> torch.optim.Optimizer:
    """Prune a model in training; go on over the kept weights alone.

    Momentum and moments are carried over: as they are for parameters that stay, at the kept
    entries for those that were pruned. Robust training ends here: every weight that is left is one
    to learn.

    Args:
        model: with implicit layers.
        optimizer: its own, with state.
        sparsity: share of each matrix that is dropped.
        rebuild: makes an optimizer for the pruned model's parameters.

    Returns:
        The new optimizer.

    Raises:
        UserError: there is nothing to prune.
    """
    check_prunable(model)
    robust = optimizer if isinstance(optimizer, RobustOptimizer) else None
    states = {n: optimizer.state[p] for n, p in model.named_parameters() if p in optimizer.state}
    patterns = prune_model(model, sparsity, robust.critical_of if robust else lambda _: None)
    new = rebuild()
    for name, parameter in model.named_parameters():
        weight = f"{name.removesuffix('values')}weight"
        pattern = patterns.get(weight)
        old = states.get(name if pattern is None else weight)
        if old is not None:
            new.state[parameter] = {key: _kept(value, pattern) for key, value in old.items()}
    return new


def _prunable(model: nn.Module) -> dict[str, SolvedModule]:
    """The implicit layers with linears, by their place in the model."""
    layers = {n: m for n, m in model.named_modules() if isinstance(m, SolvedModule)}
    return {place: layer for place, layer in layers.items() if _linears(layer)}


def _linears(layer: SolvedModule) -> dict[str, nn.Linear]:
    return {n: m for n, m in layer.named_modules() if isinstance(m, nn.Linear)}


def _kept(value: object, pattern: deqcore.SparsityPattern | None) -> object:
    """An entry of an optimizer's state, at the kept weights."""
    if not isinstance(value, Tensor):
        return value
    if pattern is None or tuple(value.shape) != pattern.shape:
        return value.clone()
    return pattern.from_dense(value)


def _scores(weight: Tensor, critical: Tensor | None) -> Tensor:
    # A run that has diverged should end with its own figures, not in here.
    size = weight.detach().abs().nan_to_num()
    return size if critical is None else size + critical * (1 + size.max())
