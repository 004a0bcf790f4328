"""Frozen backbones: the embedded tiny ViT, files of our ViT, and adapters for other networks."""

from __future__ import annotations

import json
from importlib import resources
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import nn

from lion_models.backbones.adapter import FrozenBackbone, fingerprint
from lion_models.backbones.vit import VisionTransformer, ViTConfig
from lion_models.errors import UserError, choose

__all__ = [
    "TINY_VIT",
    "FrozenBackbone",
    "fingerprint",
    "freeze_vit",
    "load_backbone",
    "read_vit",
    "tiny_vit_path",
]

TINY_VIT = "tiny-vit"


def tiny_vit_path() -> Path:
    """The embedded weights: our ViT pretrained on Fashion-MNIST by `lion_models.pretrain`."""
    return Path(str(resources.files("lion_models") / "weights/tiny_vit_fashion_mnist.safetensors"))


def read_vit(path: Path) -> tuple[VisionTransformer, dict[str, Any]]:
    """Load a ViT with its head from a safetensors file of `lion_models.pretrain`.

    Returns:
        The network, and the file's metadata with its JSON decoded (`config`, `classes`,
        `training`).

    Raises:
        UserError: no such file, damaged, or not written by `lion_models.pretrain`.
    """
    if not path.is_file():
        raise UserError(
            f"--backbone: {path} does not exist; expected a safetensors file written "
            "by 'python -m lion_models.pretrain'"
        )
    try:
        with safe_open(path, "pt") as file:
            metadata = {key: json.loads(value) for key, value in (file.metadata() or {}).items()}
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        model = VisionTransformer(ViTConfig(**metadata["config"]))
        model.load_state_dict(state)
    except (SafetensorError, OSError) as error:
        raise UserError(
            f"--backbone: {path} is cut off or not a safetensors file ({error}); "
            "copy or train it again"
        ) from error
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise UserError(
            f"--backbone: {path} is not a ViT of lion_models ({error}); expected a "
            "file written by 'python -m lion_models.pretrain'"
        ) from error
    return model, metadata


def freeze_vit(model: VisionTransformer, name: str) -> FrozenBackbone:
    """Take the head off a ViT and freeze the rest."""
    config = model.config
    model.head = nn.Identity()
    return FrozenBackbone(
        model,
        embed=model.embed,
        encode=model.encode,
        name=name,
        channels=config.channels,
        image_size=config.image_size,
        token_dim=config.dim,
        feature_dim=config.dim,
        blocks=list(model.blocks),
        pool=model.pool,
        normalisation=(config.pixel_mean, config.pixel_std),
    )


def load_backbone(name: str) -> FrozenBackbone:
    """A frozen backbone by name or file.

    Args:
        name: `tiny-vit`, or the path of a safetensors file written by `lion_models.pretrain`.
    """
    if name.endswith(".safetensors"):
        return freeze_vit(read_vit(Path(name).expanduser())[0], name)
    choose("--backbone", name, [TINY_VIT])
    return freeze_vit(read_vit(tiny_vit_path())[0], name)
