"""Frozen backbones: the embedded tiny ViT, files of our ViT, and adapters for other networks."""

from lion_models.backbones.frozen import FrozenBackbone, fingerprint
from lion_models.backbones.registry import load_backbone
from lion_models.backbones.tiny_vit import TINY_VIT, read_vit, tiny_vit_path
from lion_models.backbones.vit import freeze_vit

__all__ = [
    "TINY_VIT",
    "FrozenBackbone",
    "fingerprint",
    "freeze_vit",
    "load_backbone",
    "read_vit",
    "tiny_vit_path",
]
