"""The options that say through which frozen network a run looks at images."""

from __future__ import annotations

from dataclasses import dataclass

from lion_models.backbones.blocks import checkpoint_blocks
from lion_models.backbones.efficientnet_lite import EFFICIENTNET_LITE0
from lion_models.backbones.frozen import FrozenBackbone
from lion_models.backbones.normalisation import NORMALISATIONS, with_normalisation
from lion_models.backbones.tiny_vit import TINY_VIT
from lion_models.backbones.vit_s14_focus import VIT_S14_FOCUS
from lion_models.base.options import Need, Options, option

__all__ = ["BackboneConfig"]

_BACKWARD = Need(
    lambda run: run.method.goes_back,
    "saves memory of the backward pass through the frozen blocks, and there is none with {method}; "
    "leave it out",
)


@dataclass(frozen=True)
class BackboneConfig(Options):
    """The frozen network, and how it is used."""

    backbone: str = option(
        "tiny-vit",
        "tiny-vit, vit-s14-focus, efficientnet-lite0, timm:NAME, torchvision:NAME, hf:NAME, or a "
        "file of tools/pretrain_tiny_vit.py; options: "
        "NAME,image_size=112,readout=11,weights=FILE. 'auto' (train, compare): tiny-vit or, where "
        "pictures are large or in colour, one that is on this machine.",
        names=(TINY_VIT, VIT_S14_FOCUS, EFFICIENTNET_LITE0),
    )
    normalisation: str = option(
        "backbone", "Of pixels: the backbone's own, or another.", choices=NORMALISATIONS
    )
    checkpoint_backbone: bool = option(
        False, "Recompute the frozen blocks: less memory, slower.", needs=(_BACKWARD,)
    )

    def view(self, backbone: FrozenBackbone) -> FrozenBackbone:
        """The backbone with these options, its weights shared.

        Raises:
            UserError: blocks to compute again where it has none.
        """
        backbone = with_normalisation(backbone, self.normalisation)
        return checkpoint_blocks(backbone) if self.checkpoint_backbone else backbone
