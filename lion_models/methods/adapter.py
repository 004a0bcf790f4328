"""Bottleneck adapters inside the blocks (Houlsby et al., ICML 2019, arXiv 1902.00751)."""

from __future__ import annotations

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor, nn

from lion_models.backbones import FrozenBackbone
from lion_models.backbones.blocks import transformer_parts, with_modules
from lion_models.base.errors import choose
from lion_models.base.options import option
from lion_models.methods.base import TunedClassifier
from lion_models.methods.blocks import through, timm_linear
from lion_models.methods.registry import MethodConfig, register

__all__ = ["AdapterConfig", "Adapters", "Bottleneck"]

PLACES = ("both", "mlp")


class Bottleneck(nn.Module):
    """x -> x + up(gelu(down(x))), the identity at the start.

    Args:
        dim: D, width of x.
        hidden: h; 2 D h + h + D parameters.
    """

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.down = nn.Linear(dim, hidden)
        self.up = nn.Linear(hidden, dim)
        # The paper starts near the identity; zero makes it the identity, and trains as well
        # because `down` is not zero.
        nn.init.zeros_(self.up.weight)
        nn.init.zeros_(self.up.bias)

    def forward(self, x: Tensor) -> Tensor:  # (..., D) -> (..., D)
        return x + self.up(F.gelu(self.down(x)))


class Adapters(TunedClassifier):
    """Adapters behind the projection of attention and MLP, before the residual sum.

    `both` is the paper's placement (behind attention and MLP); `mlp` leaves out the one behind
    attention, as Pfeiffer et al. (EACL 2021) do. The norms stay frozen here; the paper trains them.

    Args:
        backbone: frozen; its blocks need timm's `attn.proj` and `mlp.fc2`.
        classes: outputs of the head.
        hidden: h; depth * places * (2 D h + h + D) parameters beside the head.
        place: `both` or `mlp`.

    Raises:
        UserError: a backbone without such blocks.
    """

    method = "adapter"

    def __init__(
        self, backbone: FrozenBackbone, classes: int, hidden: int = 2, place: str = "both"
    ) -> None:
        super().__init__(backbone, classes)
        choose("adapter_place", place, PLACES)
        blocks, self._pool = transformer_parts(
            backbone, "`method` adapter", "use lion, linear, full or vpt-pad"
        )
        paths = ("attn.proj", "mlp.fc2") if place == "both" else ("mlp.fc2",)
        self.adapters = nn.ModuleList()
        twins = []
        for block in blocks:
            replacements: dict[str, nn.Module] = {}
            for path in paths:
                linear = timm_linear(block, path, "adapter", backbone.name)
                adapter = Bottleneck(linear.out_features, hidden)
                self.adapters.append(adapter)
                replacements[path] = nn.Sequential(linear, adapter)
            twins.append(with_modules(block, replacements))
        self._blocks = tuple(twins)

    def tuned(self, fixed: Tensor) -> Tensor:  # (B, T, D) -> (B, classes)
        return self.head(self._pool(through(self._blocks, fixed)))


@register("adapter", Adapters, colour="#009E73")
@dataclass(frozen=True)
class AdapterConfig(MethodConfig):
    """Where the adapters sit, and how wide they are."""

    adapter_hidden: int = option(2, "Bottleneck width.", low=1)
    adapter_place: str = option("both", "Behind attention and MLP, or the MLP.", choices=PLACES)
