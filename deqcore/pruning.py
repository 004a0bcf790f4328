"""Prune the linear layers of a module: what is dropped is neither stored nor multiplied."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from deqcore.masked import MaskedLinear
from deqcore.ops.masked_linear import Backend
from deqcore.sparsity import SparsityPattern, Structure

Scores = Callable[[nn.Linear], Tensor] | Mapping[str, Tensor]


def magnitude(linear: nn.Linear) -> Tensor:
    """|weight|: the smallest go first."""
    return linear.weight.detach().abs()


def prune_layer(
    layer: nn.Module,
    scores: Scores = magnitude,
    sparsity: float = 0.9,
    *,
    structure: Structure = None,
    backend: Backend = "auto",
) -> nn.Module:
    """Replace each nn.Linear in ``layer`` by a MaskedLinear that keeps its best-scored weights.

    In an implicit layer each step of the solve, and each product of its backward solve, is then
    made with the kept weights alone. A linear used in several places is pruned once.

    Args:
        layer: changed in place, except where it is an nn.Linear itself.
        scores: a function of an nn.Linear (default: :func:`magnitude`), which prunes all of them;
            or tensors of the weights' shapes by the linears' names (``""`` for the layer itself),
            which prune those named and leave the others dense. Higher is kept.
        sparsity: share of each weight to drop.
        structure: None, 16, 32 or 64 (whole blocks), or ``"2:4"``.
        backend: of the new layers; see :func:`deqcore.masked_linear`.

    Returns:
        ``layer``, or the MaskedLinear made of it.

    Raises:
        ValueError: nothing to prune, a name that is no nn.Linear, or scores that do not fit.
    """
    linears = _linears(layer)
    if isinstance(scores, Mapping):
        unknown = sorted(set(scores) - set(linears))
        if unknown:
            raise ValueError(
                f"scores: no nn.Linear named {', '.join(map(repr, unknown))}; there are "
                f"{', '.join(map(repr, linears)) or 'none'}"
            )
        linears = {name: linear for name, linear in linears.items() if name in scores}
    if not linears:
        raise ValueError("layer: has no nn.Linear to prune")

    pruned: dict[nn.Module, MaskedLinear] = {}
    for name, linear in linears.items():
        if linear not in pruned:
            score = scores[name] if isinstance(scores, Mapping) else scores(linear)
            if score.shape != linear.weight.shape:
                raise ValueError(
                    f"scores of {name!r}: expected the weight's shape "
                    f"{tuple(linear.weight.shape)}, got {tuple(score.shape)}"
                )
            pattern = SparsityPattern.from_scores(score, sparsity, structure=structure)
            pruned[linear] = MaskedLinear.from_linear(linear, pattern, backend=backend)
    return _replace(layer, {name: pruned[linear] for name, linear in linears.items()})


def restore_pruned(
    layer: nn.Module, state_dict: Mapping[str, Any], *, backend: Backend = "auto"
) -> nn.Module:
    """Give ``layer`` the patterns of a pruned layer's state dict, then load it, strictly.

    Args:
        layer: the dense layer, or one pruned to other patterns; changed in place.
        state_dict: of the pruned layer.
        backend: of the new layers.

    Returns:
        ``layer``, or the MaskedLinear made of it.

    Raises:
        ValueError: a pattern of the state dict belongs to no linear of the layer.
        RuntimeError: from ``load_state_dict``.
    """
    replacements: dict[str, MaskedLinear] = {}
    made: dict[nn.Module, MaskedLinear] = {}
    modules = dict(layer.named_modules(remove_duplicate=False))
    for key in state_dict:
        name, _, last = key.rpartition(".")
        if last != "pattern":
            continue
        old = modules.get(name)
        if not isinstance(old, nn.Linear | MaskedLinear):
            raise ValueError(
                f"state_dict: {key} belongs to a pruned linear, but {name!r} is "
                f"{'missing' if old is None else type(old).__name__}; build the same layer first"
            )
        if old not in made:
            parameter = old.weight if isinstance(old, nn.Linear) else old.values
            made[old] = MaskedLinear(
                SparsityPattern.from_packed(state_dict[key]).to(parameter.device),
                old.bias is not None,
                backend=backend,
                dtype=parameter.dtype,
            )
            made[old].train(old.training).requires_grad_(parameter.requires_grad)
        replacements[name] = made[old]
    layer = _replace(layer, replacements)
    layer.load_state_dict(state_dict)
    return layer


def _linears(layer: nn.Module) -> dict[str, nn.Linear]:
    modules = layer.named_modules(remove_duplicate=False)
    return {name: module for name, module in modules if isinstance(module, nn.Linear)}


@torch.no_grad()
def _replace(layer: nn.Module, replacements: Mapping[str, nn.Module]) -> nn.Module:
    for name, new in replacements.items():
        parent, _, child = name.rpartition(".")
        if not name:
            return new
        setattr(layer.get_submodule(parent), child, new)
    return layer
