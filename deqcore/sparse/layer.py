"""``MaskedLinear``: a linear layer of which only the kept weights exist."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize, prune

from deqcore.sparse.functional import Backend, masked_linear
from deqcore.sparse.pattern import SparsityPattern


class MaskedLinear(nn.Module):
    """y = x W^T + bias, where W is zero outside a pattern and only its kept entries are stored.

    It is computed, trained and saved with the kept entries alone. A state dict has ``values``,
    ``bias`` and ``pattern`` (one bit for each entry of the weight), all plain tensors, so that
    safetensors can store it; one of another pattern is refused.

    Args:
        pattern: which entries of the [out_features, in_features] weight are kept.
        bias: whether there is one.
        backend: ``"auto"``, ``"sparse"`` or ``"dense"``; see ``deqcore.masked_linear``.
        device, dtype: of the parameters; the pattern moves along.

    Attributes:
        values: parameter [kept], the entries in row order.
        bias: parameter [out_features], or None.
        pattern: the SparsityPattern, on the device of the values.
    """

    values: nn.Parameter
    bias: nn.Parameter | None
    pattern: SparsityPattern

    def __init__(
        self,
        pattern: SparsityPattern,
        bias: bool = True,
        *,
        backend: Backend = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if not isinstance(pattern, SparsityPattern):
            raise TypeError(
                f"pattern: expected a SparsityPattern, got {type(pattern).__name__}; build one "
                "with SparsityPattern.from_mask(mask)"
            )
        if backend not in ("auto", "sparse", "dense"):
            raise ValueError(f"backend: expected 'auto', 'sparse' or 'dense', got {backend!r}")
        if device is not None:
            pattern = pattern.to(device)
        self.out_features, self.in_features = pattern.shape
        self.pattern = pattern
        self.backend: Backend = backend
        self.values = nn.Parameter(torch.empty(pattern.kept, device=pattern.device, dtype=dtype))
        empty = torch.empty(self.out_features, device=pattern.device, dtype=dtype)
        self.register_parameter("bias", nn.Parameter(empty) if bias else None)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the entries as nn.Linear draws those of a dense weight."""
        bound = 1 / math.sqrt(self.in_features) if self.in_features else 0.0
        for parameter in (self.values, self.bias):
            if parameter is not None:
                nn.init.uniform_(parameter, -bound, bound)

    @classmethod
    def from_linear(
        cls, linear: nn.Linear, mask: Tensor | SparsityPattern, *, backend: Backend = "auto"
    ) -> MaskedLinear:
        """The layer that computes what ``linear`` would with the weights outside ``mask`` at zero.

        Args:
            linear: its parameters are copied; dtype, device and requires_grad are kept. One that
                ``torch.nn.utils.prune`` masks is copied as its next call would use it, and needs
                no ``prune.remove``: ``from_linear(linear, linear.weight_mask.bool())``.
            mask: bool tensor of the weight's shape, true where a weight is kept, or a pattern.
            backend: see ``deqcore.masked_linear``.

        Raises:
            TypeError: linear is not an nn.Linear, or mask is not a bool tensor.
            ValueError: a mask of another shape, a linear that is parametrized or whose weight
                another hook computes (weight_norm), one with hooks, which would be lost, or one
                that computes something else than nn.Linear does (a subclass with a forward of its
                own, such as LoRA's or fake quantisation's).
        """
        if not isinstance(linear, nn.Linear):
            raise TypeError(f"linear: expected an nn.Linear, got {type(linear).__name__}")
        refuse_other_forward(linear, "linear")
        if parametrize.is_parametrized(linear):
            raise ValueError(
                "linear: its parameters are computed by parametrizations, which kept weights "
                "would lose; call torch.nn.utils.parametrize.remove_parametrizations first"
            )
        refresh_pruned(linear)
        for name in ("weight", "bias"):
            if name not in linear._parameters and f"{name}_mask" not in linear._buffers:
                raise ValueError(
                    f"linear: expected {name} to be a parameter, got a tensor that a hook computes "
                    "at each call; call torch.nn.utils.remove_weight_norm or "
                    "torch.nn.utils.remove_spectral_norm first"
                )
        refuse_hooks(linear)
        weight = linear.weight
        if tuple(mask.shape) != tuple(weight.shape):
            raise ValueError(
                f"mask: expected the weight's shape {tuple(weight.shape)} (out_features, "
                f"in_features), got {tuple(mask.shape)}; is it transposed?"
            )
        pattern = mask if isinstance(mask, SparsityPattern) else SparsityPattern.from_mask(mask)
        pattern = pattern.to(weight.device)
        has_bias = linear.bias is not None
        layer = cls(pattern, has_bias, backend=backend, device=weight.device, dtype=weight.dtype)
        with torch.no_grad():
            layer.values.copy_(pattern.from_dense(weight))
            layer.values.requires_grad_(is_trained(linear, "weight"))
            if layer.bias is not None:
                layer.bias.copy_(linear.bias)
                layer.bias.requires_grad_(is_trained(linear, "bias"))
        return layer.train(linear.training)

    def to_linear(self) -> nn.Linear:
        """The nn.Linear that computes the same, with zeros where nothing was kept."""
        kind = {"device": self.values.device, "dtype": self.values.dtype}
        linear = nn.Linear(self.in_features, self.out_features, self.bias is not None, **kind)
        with torch.no_grad():
            linear.weight.copy_(self.pattern.to_dense(self.values))
            linear.weight.requires_grad_(self.values.requires_grad)
            if self.bias is not None:
                linear.bias.copy_(self.bias)
                linear.bias.requires_grad_(self.bias.requires_grad)
        return linear.train(self.training)

    @property
    def weight(self) -> Tensor:
        """The dense weight, [out_features, in_features], computed anew; gradients reach the values.

        Writing to it changes nothing. Write to ``values``, the kept entries in row order:
        ``layer.values.copy_(layer.pattern.from_dense(weight))`` under ``torch.no_grad()``.
        """
        dense = self.pattern.to_dense(self.values)
        # Of a full pattern that is a view of the values.
        return dense.clone() if self.pattern.kept == dense.numel() else dense

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "weight":
            raise AttributeError(
                "MaskedLinear.weight: expected no assignment, as this layer stores its kept "
                "entries alone: set them with layer.values.copy_(layer.pattern.from_dense(weight)) "
                "under torch.no_grad(), or make a layer of other entries with "
                "MaskedLinear.from_linear(linear, mask)"
            )
        super().__setattr__(name, value)

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in_features] -> [..., out_features]."""
        return masked_linear(x, self.values, self.pattern, self.bias, backend=self.backend)

    def extra_repr(self) -> str:
        """Sizes, sparsity, structure, backend."""
        structure = self.pattern.structure
        kind = "" if structure is None else f", structure={structure!r}"
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"bias={self.bias is not None}, sparsity={self.pattern.sparsity:.1%} "
            f"({self.pattern.kept} kept){kind}, backend={self.backend!r}"
        )

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> MaskedLinear:
        # The pattern is no buffer, or to_empty() would leave indices that point anywhere.
        super()._apply(fn, recurse)
        self.pattern = self.pattern.to(self.values.device)
        return self

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[prefix + "pattern"] = self.pattern.to_packed()

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        key = prefix + "pattern"
        problem = self._problem(state_dict, prefix)
        if problem is not None:
            error_msgs.append(problem)
            names = [*(name for name, _ in self.named_parameters()), "pattern"]
            missing_keys += [prefix + name for name in names if prefix + name not in state_dict]
            return
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )
        if key not in state_dict:
            missing_keys.append(key)
        elif key in unexpected_keys:
            unexpected_keys.remove(key)
        # Loaded with assign=True, the values are where those of the state dict are.
        self.pattern = self.pattern.to(self.values.device)

    def _problem(self, state_dict: dict[str, Any], prefix: str) -> str | None:
        """Why nothing of a state dict can be loaded, in words; a bias alone can."""
        key = prefix + "pattern"
        if key in state_dict:
            difference = self._difference(state_dict[key])
            return difference and (
                f"{key}: {difference}; build the layers with the patterns of the state dict: "
                "deqcore.restore_pruned(model, state_dict)"
            )
        if prefix + "weight" in state_dict:
            return (
                f"{prefix}weight is dense, and this layer keeps only some weights; load it "
                "into the dense layer, then prune that (deqcore.prune_layer)"
            )
        if prefix + "values" in state_dict:
            return (
                f"{prefix}values came without {key}, which says which weights they are, so they "
                "were not loaded; save the layer's whole state_dict()"
            )
        return None

    def _difference(self, packed: Tensor) -> str | None:
        """How the pattern of a state dict differs from this layer's, in words."""
        try:
            other = SparsityPattern.from_packed(packed)
        except ValueError as error:
            return str(error)
        if other == self.pattern:
            return None
        ours, theirs = self.pattern, other
        detail = ""
        if ours.shape == theirs.shape:
            detail = f", and they differ in {ours.difference(theirs)} entries"
        return (
            f"expected the pattern of this layer ({ours.kept} of {ours.shape[0]} x "
            f"{ours.shape[1]} kept), got another ({theirs.kept} of {theirs.shape[0]} x "
            f"{theirs.shape[1]} kept){detail}"
        )


def refresh_pruned(linear: nn.Module) -> None:
    """Have ``torch.nn.utils.prune`` compute what it would at the next call.

    It leaves as weight the product of the last call, which load_state_dict, a step of an optimizer
    and .to() do not change.
    """
    for hook in linear._forward_pre_hooks.values():
        if isinstance(hook, prune.BasePruningMethod):
            hook(linear, ())


def refuse_other_forward(layer: nn.Module, name: str) -> None:
    """Raise if a layer computes something else than its class does here, which would be lost.

    Args:
        layer: an nn.Linear or a MaskedLinear, of a subclass perhaps.
        name: of the layer, for the message.
    """
    base = nn.Linear if isinstance(layer, nn.Linear) else MaskedLinear
    kind = f"{type(layer).__module__}.{type(layer).__qualname__}"
    found = next(
        (
            method
            for method in ("forward", "__call__", "_call_impl")
            if method in vars(layer) or getattr(type(layer), method) is not getattr(base, method)
        ),
        None,
    )
    if found is not None:
        where = "the module itself" if found in vars(layer) else "its class"
        raise ValueError(
            f"{name}: expected the forward of {base.__name__}, but {where} ({kind}) has a "
            f"{found} of its own, whose work the pruned layer would leave out; merge what it adds "
            "into the weight first (merge_and_unload of PEFT, say), prune the linears inside it, "
            "or leave it dense by giving scores of the other linears by name"
        )
    for each, tensor in layer.named_parameters(recurse=False):
        if isinstance(tensor, nn.UninitializedParameter):
            raise ValueError(
                f"{name}: {each} has no shape yet; run a batch through the layer first"
            )
        if type(tensor) is not nn.Parameter:
            raise ValueError(
                f"{name}: expected {each} to be a plain nn.Parameter, got a "
                f"{type(tensor).__qualname__}, which computes products in its own way; turn it "
                "into a plain tensor first (dequantize(), or full_tensor() of a DTensor)"
            )


def is_trained(linear: nn.Module, name: str) -> bool:
    """Whether weight or bias has gradients, or what ``torch.nn.utils.prune`` computes it from."""
    source: Tensor = getattr(linear, f"{name}_orig", getattr(linear, name))
    return source.requires_grad


def refuse_hooks(module: nn.Module) -> None:
    """Raise if something that takes the module's place would lose hooks of its user."""
    hooks = [
        *module._forward_pre_hooks.values(),
        *module._forward_hooks.values(),
        *module._backward_pre_hooks.values(),
        *module._backward_hooks.values(),
    ]
    own = [hook for hook in hooks if not isinstance(hook, prune.BasePruningMethod)]
    if own:
        names = ", ".join(getattr(hook, "__name__", type(hook).__name__) for hook in own)
        raise ValueError(
            f"linear: has hooks ({names}), which the pruned layer that takes its place would lose; "
            "remove them (handle.remove()), prune, then register them with the new layer"
        )
