"""Prune the linear layers of a module: what is dropped is neither stored nor multiplied."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from deqcore.sparse.functional import Backend
from deqcore.sparse.layer import (
    MaskedLinear,
    is_trained,
    refresh_pruned,
    refuse_hooks,
    refuse_other_forward,
)
from deqcore.sparse.pattern import SparsityPattern, Structure

Prunable = nn.Linear | MaskedLinear
Scores = Callable[[Any], Tensor] | Mapping[str, Tensor]


def magnitude(linear: Prunable) -> Tensor:
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
    """Replace each linear in ``layer`` by a MaskedLinear that keeps its best-scored weights.

    In an implicit layer each step of the solve, and each product of its backward solve, is then
    made with the kept weights alone. A linear used in several places is pruned once, and linears
    that share a weight go on sharing it, if the scores keep the same entries. Weights that
    ``torch.nn.utils.prune`` masks are pruned as masked, without ``prune.remove``; by magnitude what
    is masked goes first.

    What is pruned already is pruned further, among the weights that it has kept: iterative
    magnitude pruning (Frankle and Carbin, ICLR 2019, arXiv 1803.03635, strategy 1) is to train,
    prune to a higher ``sparsity``, ``rewind_pruned``, and so on. Optimizers hold the parameters
    of the layers before; make new ones.

    Args:
        layer: changed in place, except where it is a linear itself.
        scores: a function of an nn.Linear or, where that is pruned already, a MaskedLinear
            (default: ``magnitude``), which prunes all of them; or tensors of the weights'
            shapes by the linears' names (``""`` for the layer itself), which prune those named and
            leave the others as they are. Higher is kept. Scores of weights that an earlier pruning
            dropped are not read. A linear that has several names needs one of them.
        sparsity: share of each whole weight that is dropped afterwards, by this pruning and those
            before.
        structure: None, 16, 32 or 64 (whole blocks), or ``"2:4"``. Of a layer that is pruned to
            blocks already, None means its own blocks.
        backend: of the new layers; see ``deqcore.masked_linear``.

    Returns:
        ``layer``, or the MaskedLinear made of it.

    Raises:
        ValueError: nothing to prune, a name that is no linear, scores that do not fit, a layer that
            is sparser than ``sparsity`` already, one that ``MaskedLinear.from_linear`` refuses
            (parametrized, with hooks, a subclass with a forward of its own), or a parameter that
            something in ``layer`` shares which stays dense (an embedding, say). Nothing is changed
            then.
    """
    linears = _linears(layer)
    if isinstance(scores, Mapping):
        unknown = sorted(set(scores) - set(linears))
        if unknown:
            raise ValueError(
                f"scores: no linear named {', '.join(map(repr, unknown))}; there are "
                f"{', '.join(map(repr, linears)) or 'none'}"
            )
        chosen = {linears[name]: score for name, score in scores.items()}
        linears = {name: linear for name, linear in linears.items() if linear in chosen}
    if not linears:
        raise ValueError("layer: has no nn.Linear to prune")

    pruned: dict[nn.Module, MaskedLinear] = {}
    for name, linear in linears.items():
        if linear in pruned:
            continue
        refuse_other_forward(linear, f"layer: {name!r}" if name else "layer")
        refresh_pruned(linear)  # the scores are those of the weight that will be copied
        score = chosen[linear] if isinstance(scores, Mapping) else scores(linear)
        if score.shape != linear.weight.shape:
            raise ValueError(
                f"scores of {name!r}: expected the weight's shape "
                f"{tuple(linear.weight.shape)}, got {tuple(score.shape)}"
            )
        if isinstance(linear, MaskedLinear):
            pattern = _narrower(name, linear.pattern, score, sparsity, structure)
            pruned[linear] = _narrowed(linear, pattern, backend)
        else:
            pattern = SparsityPattern.from_scores(score, sparsity, structure=structure)
            pruned[linear] = MaskedLinear.from_linear(linear, pattern, backend=backend)
    return _replace(layer, {name: pruned[linear] for name, linear in linears.items()})


def _narrower(
    name: str, pattern: SparsityPattern, scores: Tensor, sparsity: float, structure: Structure
) -> SparsityPattern:
    """The best-scored part of a pattern."""
    if structure is None and isinstance(pattern.structure, int):
        structure = pattern.structure
    mask = pattern.mask().to(scores.device)
    scores = scores.detach().double().masked_fill(~mask, -torch.inf)
    found = SparsityPattern.from_scores(scores, sparsity, structure=structure)
    if found.kept > pattern.kept and structure != "2:4":
        raise ValueError(
            f"sparsity: expected {pattern.sparsity:g} or more for {name!r}, which is pruned to "
            f"{pattern.sparsity:.1%} already, got {sparsity:g}; what was dropped is not stored: "
            "prune the dense layer instead, or give scores of the other linears by name"
        )
    return SparsityPattern.from_mask(found.mask().to(mask.device) & mask, structure=structure)


def _narrowed(old: MaskedLinear, pattern: SparsityPattern, backend: Backend) -> MaskedLinear:
    """A layer that keeps less of another one."""
    refuse_hooks(old)
    values, bias = old.values, old.bias
    new = MaskedLinear(
        pattern, bias is not None, backend=backend, device=values.device, dtype=values.dtype
    )
    with torch.no_grad():
        new.values.copy_(new.pattern.from_dense(old.weight))
        new.values.requires_grad_(values.requires_grad)
        if new.bias is not None and bias is not None:
            new.bias.copy_(bias)
            new.bias.requires_grad_(bias.requires_grad)
    return new.train(old.training)


@torch.no_grad()
def rewind_pruned(layer: nn.Module, state_dict: Mapping[str, Any]) -> nn.Module:
    """Give what ``layer`` has kept the values of an earlier state, and load the rest of it.

    The step of the lottery-ticket protocol that follows a pruning: the kept weights return to what
    they were at the start (Frankle and Carbin, ICLR 2019), or early in training (Frankle et al.,
    ICML 2020, arXiv 1912.05671).

    Args:
        layer: pruned by ``prune_layer``; changed in place. Patterns stay as they are.
        state_dict: of the same layer, when it was dense or had kept at least as much.

    Returns:
        ``layer``.

    Raises:
        ValueError: the state has no such weight, one of another shape, or lacks kept entries.
        RuntimeError: from ``load_state_dict``, of the other parameters.
    """
    state = dict(state_dict)
    modules = layer.named_modules(remove_duplicate=False)
    for name, module in modules:
        if isinstance(module, MaskedLinear):
            prefix = f"{name}." if name else ""
            weight = _dense_of(state, prefix, module.pattern)
            state[f"{prefix}values"] = module.pattern.from_dense(weight.to(module.values.device))
            state[f"{prefix}pattern"] = module.pattern.to_packed()
    layer.load_state_dict(state)
    return layer


def _dense_of(state: dict[str, Any], prefix: str, pattern: SparsityPattern) -> Tensor:
    """Take a linear's weight out of a state dict, dense, with all that a pattern keeps."""
    if f"{prefix}weight" in state:
        weight: Tensor = state.pop(f"{prefix}weight")
    elif f"{prefix}values" in state and f"{prefix}pattern" in state:
        earlier = SparsityPattern.from_packed(state[f"{prefix}pattern"])
        values = state[f"{prefix}values"]
        weight = earlier.to(values.device).to_dense(values)
        lost = int((pattern.mask().cpu() & ~earlier.mask()).sum()) if (
            earlier.shape == pattern.shape) else 0  # fmt: skip
        if lost:
            raise ValueError(
                f"state_dict: {prefix}values lacks {lost} of the {pattern.kept} entries that the "
                "layer keeps; rewind to a state from before the layer was pruned so far"
            )
    else:
        raise ValueError(
            f"state_dict: has neither {prefix}weight nor {prefix}values with {prefix}pattern; "
            "expected the state_dict() of the same layer, dense or pruned less"
        )
    if tuple(weight.shape) != pattern.shape:
        raise ValueError(
            f"state_dict: expected {prefix}weight of shape {pattern.shape}, got "
            f"{tuple(weight.shape)}; is it of another layer?"
        )
    return weight


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
            are shared that the state dict keeps apart (see ``prune_layer``), or a linear to
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
            refuse_other_forward(old, f"layer: {name!r}" if name else "layer")
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


def _linears(layer: nn.Module) -> dict[str, Prunable]:
    modules = layer.named_modules(remove_duplicate=False)
    return {name: module for name, module in modules if isinstance(module, Prunable)}


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
