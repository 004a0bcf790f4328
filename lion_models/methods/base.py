"""What every method is: a frozen part whose output can be cached, and a tuned part."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor, nn

import deqcore
from lion_models.backbones import FrozenBackbone
from lion_models.base.errors import UserError
from lion_models.prompts.solved import SolvedModule

__all__ = [
    "ParameterCount",
    "Recipe",
    "TunedClassifier",
    "count_parameters",
    "load_trained",
    "trained_state",
]


class Recipe(NamedTuple):
    """What a method chooses for itself on validation data."""

    lr: float = 0.03
    weight_decay: float = 0.01
    augment: str = "none"


class TunedClassifier(nn.Module, ABC):
    """Images to logits through a frozen backbone and whatever a method trains.

    Args:
        backbone: frozen; shared by reference, never copied or changed.
        classes: number of outputs of the linear head, 1 or more.

    Attributes:
        method: the name that it is registered under; empty for a class of one's own.
        recipe: of a class that does not go by its method's.
        replaced: number of the backbone's parameters that a method computes with copies of.
    """

    method: str = ""
    recipe: ClassVar[Recipe | None] = None
    replaced: int = 0

    def __init__(self, backbone: FrozenBackbone, classes: int) -> None:
        super().__init__()
        if classes < 1:
            raise UserError(f"classes: expected 1 or more, got {classes}")
        self.backbone = backbone
        self.head = nn.Linear(backbone.feature_dim, classes)
        nn.init.trunc_normal_(self.head.weight, std=0.02)
        nn.init.zeros_(self.head.bias)

    @torch.no_grad()
    def frozen(self, images: Tensor) -> Tensor:
        """The part before anything trained: images (B, C, S, S) in [0, 1] -> tokens (B, T, D).

        The trainer caches it; a method that trains nothing inside the backbone overrides it to
        give the backbone's feature.
        """
        return self.backbone.embed(images)

    @abstractmethod
    def tuned(self, fixed: Tensor) -> Tensor:
        """The rest: output of `frozen` -> logits (B, classes)."""

    @property
    def implicit_layers(self) -> Mapping[str, SolvedModule]:
        """The method's implicit layers by their names in figures and pictures."""
        return {}

    def residual_traces(self, fixed: Tensor) -> dict[str, Tensor]:
        """Residual per step, (B, n), of each implicit layer that solves, for one batch.

        Args:
            fixed: output of `frozen`.
        """
        return {}

    def forward(self, images: Tensor) -> Tensor:  # (B, C, S, S) in [0, 1] -> (B, classes)
        if not images.is_floating_point():
            raise UserError(
                f"expected float pixels in [0, 1], got {images.dtype}; divide by 255, as in "
                "images.float() / 255"
            )
        return self.tuned(self.frozen(images))


@dataclass(frozen=True)
class ParameterCount:
    """Numbers of scalars.

    Attributes:
        trained: everything that training changes, the head included, pruned weights as well.
        kept: those that pruning leaves; the same without it.
        nonzero: those of the kept that are not zero.
        head: the linear head's share of the trained and of the kept.
        head_nonzero: the linear head's share of the non-zero.
        frozen: the backbone's, without those that trained copies replace.
    """

    trained: int
    kept: int
    nonzero: int
    head: int
    head_nonzero: int
    frozen: int

    @property
    def without_head(self) -> int:
        """Trained without the head."""
        return self.trained - self.head

    @property
    def kept_without_head(self) -> int:
        return self.kept - self.head

    @property
    def nonzero_without_head(self) -> int:
        return self.nonzero - self.head_nonzero

    def to_dict(self) -> dict[str, int]:
        """All of them, those without the head included."""
        return asdict(self) | {
            "without_head": self.without_head,
            "kept_without_head": self.kept_without_head,
            "nonzero_without_head": self.nonzero_without_head,
        }


def count_parameters(model: TunedClassifier) -> ParameterCount:
    """Count trained (dense), kept, non-zero, head and frozen parameters."""
    own = [p for p in model.parameters() if p.requires_grad]
    kept = sum(p.numel() for p in own)
    patterns = [m.pattern for m in model.modules() if isinstance(m, deqcore.MaskedLinear)]
    dropped = sum(math.prod(pattern.shape) - pattern.kept for pattern in patterns)
    head = list(model.head.parameters())
    backbone = sum(p.numel() for p in model.backbone.parameters())
    return ParameterCount(
        trained=kept + dropped,
        kept=kept,
        nonzero=sum(int(p.count_nonzero()) for p in own),
        head=sum(p.numel() for p in head),
        head_nonzero=sum(int(p.count_nonzero()) for p in head),
        frozen=backbone - model.replaced,
    )


def trained_state(model: TunedClassifier) -> dict[str, Tensor]:
    """Detached copies of the trained parameters alone, by name, and patterns of pruned layers."""
    state = {
        name: parameter.detach().clone()
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    }
    patterns = {
        f"{name}.pattern": module.pattern.to_packed()
        for name, module in model.named_modules()
        if isinstance(module, deqcore.MaskedLinear) and f"{name}.values" in state
    }
    return state | patterns


def load_trained(model: TunedClassifier, state: Mapping[str, Tensor]) -> None:
    """Put a trained state into a model, whose layers are pruned as the state's are.

    Args:
        model: built like the one that the state is of; pruned or not.
        state: from `trained_state`.

    Raises:
        ValueError, RuntimeError, AttributeError: the state is of another model.
    """
    for key in state:
        name, _, last = key.rpartition(".")
        if last != "pattern":
            continue
        own = {part: state[f"{name}.{part}"] for part in ("values", "bias", "pattern")
               if f"{name}.{part}" in state}  # fmt: skip
        parent, _, child = name.rpartition(".")
        layer = deqcore.restore_pruned(model.get_submodule(name), own)
        setattr(model.get_submodule(parent), child, layer)
    model.load_state_dict(state, strict=False)
