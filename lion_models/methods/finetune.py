"""Fine-tuning of the whole backbone, or of its biases alone (BitFit)."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.func import functional_call

from lion_models.backbones import FrozenBackbone
from lion_models.base.errors import UserError, choose
from lion_models.methods.base import TunedClassifier
from lion_models.methods.registry import MethodConfig, Recipe, register

__all__ = ["BiasConfig", "FineTune", "FullConfig"]

PARTS = ("all", "bias")


class FineTune(TunedClassifier):
    """The backbone computed with trained copies of its weights (`all`) or biases (`bias`).

    `bias` is BitFit (Ben Zaken, Goldberg and Ravfogel, ACL 2022, arXiv 2106.10199): every bias of
    the network, those of its norms included. The frozen backbone itself keeps its weights: the
    copies take their place during a call only. It stays in eval mode, so that running statistics
    of batch norms stay as they are [ours]. Weights that the feature does not depend on are left
    out.

    Args:
        backbone: frozen.
        classes: outputs of the head.
        part: `all` or `bias`.

    Raises:
        UserError: there is no bias to train.
    """

    def __init__(self, backbone: FrozenBackbone, classes: int, part: str = "all") -> None:
        super().__init__(backbone, classes)
        choose("part", part, PARTS)
        self.method = "full" if part == "all" else "bias"
        chosen = {
            name: value
            for name, value in backbone.module.named_parameters()
            if part == "all" or name.rpartition(".")[2] == "bias"
        }
        used = _used(backbone, chosen)
        if not used:
            raise UserError(
                f"`method` {self.method}: '{backbone.name}' has no parameter of this kind; use "
                "another method"
            )
        self.weights = _tree(used)
        self.replaced = sum(value.numel() for value in used.values())

    @torch.no_grad()
    def frozen(self, images: Tensor) -> Tensor:
        """The images themselves: nothing in front of the trained part is fixed."""
        return images

    def tuned(self, fixed: Tensor) -> Tensor:  # (B, C, S, S) -> (B, classes)
        values: dict[str, Tensor] = {
            f"module.{name}": value for name, value in self.weights.named_parameters()
        }
        return self.head(functional_call(self.backbone, values, (fixed,)))


def _used(backbone: FrozenBackbone, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Those parameters that the feature depends on."""
    copies = {name: value.detach().clone().requires_grad_() for name, value in values.items()}
    if not copies:
        return {}
    device = next(iter(copies.values())).device
    size = backbone.image_size
    images = torch.zeros(1, backbone.channels, size, size, device=device)
    with torch.enable_grad():
        named = {f"module.{name}": value for name, value in copies.items()}
        feature = functional_call(backbone, named, (images,))
        slopes = torch.autograd.grad(feature.sum(), list(copies.values()), allow_unused=True)
    return {
        name: value
        for (name, value), slope in zip(values.items(), slopes, strict=True)
        if slope is not None
    }


def _tree(values: Mapping[str, Tensor]) -> nn.Module:
    """A module that holds trainable copies under the same dotted names."""
    root = nn.Module()
    for name, value in values.items():
        *path, last = name.split(".")
        node = root
        for part in path:
            if part not in node._modules:
                node.add_module(part, nn.Module())
            node = node.get_submodule(part)
        node.register_parameter(last, nn.Parameter(value.detach().clone()))
    return root


@register("full", FineTune, Recipe(lr=0.001), colour="#000000")
class FullConfig(MethodConfig):
    """There is nothing to choose."""

    tunes_copies = True


@register("bias", FineTune, Recipe(lr=0.01), colour="#F0E442")
class BiasConfig(MethodConfig):
    """There is nothing to choose."""

    tunes_copies = True

    def build(self, backbone: FrozenBackbone, classes: int) -> FineTune:
        return FineTune(backbone, classes, "bias")
