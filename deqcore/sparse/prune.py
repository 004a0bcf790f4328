"""Prune the linear layers of a module: what is dropped is neither stored nor multiplied."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from deqcore.sparse.functional import Backend
from deqcore.sparse.layer import MaskedLinear, is_trained, refresh_pruned, refuse_hooks
from deqcore.sparse.pattern import SparsityPattern, Structure

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
    made with the kept weights alone. A linear used in several places is pruned once, and linears
    that share a weight go on sharing it, if the scores keep the same entries. Weights that
    ``torch.nn.utils.prune`` masks are pruned as masked, without ``prune.remove``; by magnitude what
    is masked goes first.

    Args:
        layer: changed in place, except where it is an nn.Linear itself.
        scores: a function of an nn.Linear (default: :func:`magnitude`), which prunes all of them;
            or tensors of the weights' shapes by the linears' names (``""`` for the layer itself),
            which prune those named and leave the others dense. Higher is kept. A linear that has
            several names needs one of them.
        sparsity: share of each weight to drop.
        structure: None, 16, 32 or 64 (whole blocks), or ``"2:4"``.
        backend: of the new layers; see :func:`deqcore.masked_linear`.

    Returns:
        ``layer``, or the MaskedLinear made of it.

    Raises:
        ValueError: nothing to prune, a name that is no nn.Linear, scores that do not fit, a linear
            that :meth:`MaskedLinear.from_linear` refuses (parametrized, with hooks), or a parameter
            that something in ``layer`` shares which stays dense (an embedding, say).
    """
    linears = _linears(layer)
    if isinstance(scores, Mapping):
        unknown = sorted(set(scores) - set(linears))
        if unknown:
            raise ValueError(
                f"scores: no nn.Linear named {', '.join(map(repr, unknown))}; there are "
                f"{', '.join(map(repr, linears)) or 'none'}"
            )
        chosen = {linears[name]: score for name, score in scores.items()}
        linears = {name: linear for name, linear in linears.items() if linear in chosen}
    if not linears:
        raise ValueError("layer: has no nn.Linear to prune")

    pruned: dict[nn.Module, MaskedLinear] = {}
    for name, linear in linears.items():
        if linear not in pruned:
            refresh_pruned(linear)  # the scores are those of the weight that will be copied
            score = chosen[linear] if isinstance(scores, Mapping) else scores(linear)
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
        ValueError: a pattern of the state dict belongs to no linear of the layer, or parameters
            are shared that the state dict keeps apart (see :func:`prune_layer`), or a linear to
            replace has hooks, which would be lost.
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
            refuse_hooks(old)
            refresh_pruned(old)
            kept = "weight" if isinstance(old, nn.Linear) else "values"
            parameter = getattr(old, kept)
            new = MaskedLinear(
                SparsityPattern.from_packed(state_dict[key]).to(parameter.device),
                old.bias is not None,
                backend=backend,
                dtype=parameter.dtype,
            )
            new.values.requires_grad_(is_trained(old, kept))
            if new.bias is not None:
                new.bias.requires_grad_(is_trained(old, "bias"))
            made[old] = new.train(old.training)
        replacements[name] = made[old]
    layer = _replace(layer, replacements)
    layer.load_state_dict(state_dict)
    return layer


def _linears(layer: nn.Module) -> dict[str, nn.Linear]:
    modules = layer.named_modules(remove_duplicate=False)
    return {name: module for name, module in modules if isinstance(module, nn.Linear)}


def _replace(layer: nn.Module, replacements: Mapping[str, MaskedLinear]) -> nn.Module:
    _share(layer, replacements)
    for name, new in replacements.items():
        parent, _, child = name.rpartition(".")
        if not name:
            return new
        setattr(layer.get_submodule(parent), child, new)
    return layer


def _share(layer: nn.Module, replacements: Mapping[str, MaskedLinear]) -> None:
    """Let the new layers share what the old ones share; raise where they cannot."""
    names_of: dict[Tensor, list[str]] = {}
    for name, parameter in layer.named_parameters(remove_duplicate=False):
        names_of.setdefault(parameter, []).append(name)
    for names in names_of.values():
        pruned = [name for name in names if name.rpartition(".")[0] in replacements]
        if not pruned:
            continue
        dense = [name for name in names if name not in pruned]
        module, _, attribute = pruned[0].rpartition(".")
        if dense:
            raise ValueError(
                f"layer: {pruned[0]} is also {dense[0]}, which stays dense, so that pruning would "
                f"untie them; leave {module!r} dense too (scores of the other linears by name), or "
                f"{_how_to_untie(pruned[0])}"
            )
        first = replacements[module]
        for name in pruned[1:]:
            if not _masked_alike(layer, pruned[0], name):
                raise ValueError(
                    f"layer: {pruned[0]} and {name} are one parameter under different masks of "
                    f"torch.nn.utils.prune; {_how_to_untie(name)}"
                )
            other = replacements[name.rpartition(".")[0]]
            if attribute in ("bias", "bias_orig"):
                other.bias = first.bias
                continue
            if other.pattern != first.pattern:
                raise ValueError(
                    f"layer: {pruned[0]} and {name} are one parameter, but were given different "
                    f"entries to keep; give both the same, or {_how_to_untie(name)}"
                )
            other.values = first.values


def _masked_alike(layer: nn.Module, *names: str) -> bool:
    """Whether ``torch.nn.utils.prune`` masks two parameters of one value alike, or not at all."""
    masks: list[Tensor | None] = []
    for name in names:
        module, _, attribute = name.rpartition(".")
        mask = f"{attribute.removesuffix('_orig')}_mask"
        masks.append(getattr(layer.get_submodule(module), mask, None))
    first, second = masks
    return first is second or (
        first is not None and second is not None and torch.equal(first, second)
    )


def _how_to_untie(name: str) -> str:
    module, _, attribute = name.rpartition(".")
    return (
        f"untie them first: m = layer.get_submodule({module!r}); "
        f"m.{attribute} = nn.Parameter(m.{attribute}.detach().clone())"
    )
