"""The embedded tiny ViT, and any file that `lion_models.pretrain` has written."""

from __future__ import annotations

import json
from dataclasses import replace
from importlib import resources
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from lion_models.backbones.adapter import FrozenBackbone
from lion_models.backbones.vit import VisionTransformer, ViTConfig, freeze_vit
from lion_models.errors import UserError

__all__ = ["TINY_VIT", "load_tiny_vit", "load_vit_file", "read_vit", "tiny_vit_path"]

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


def load_tiny_vit(name: str = TINY_VIT, *, readout: int | None = None) -> FrozenBackbone:
    """The embedded backbone; `readout` is the block whose output is read, 1 to 4, None the last."""
    model = _cut(read_vit(tiny_vit_path())[0], readout)
    return freeze_vit(model, name, "Apache-2.0", "trained on Fashion-MNIST by lion_models.pretrain")


def load_vit_file(name: str, path: Path, *, readout: int | None = None) -> FrozenBackbone:
    """A file of `lion_models.pretrain`; `readout` as in `load_tiny_vit`."""
    return freeze_vit(_cut(read_vit(path)[0], readout), name, source=str(path))


def _cut(model: VisionTransformer, readout: int | None) -> VisionTransformer:
    depth = check_readout(readout, model.config.depth)
    model.blocks = model.blocks[:depth]
    model.config = replace(model.config, depth=depth)
    return model


def check_readout(readout: int | None, depth: int) -> int:
    """The number of blocks to keep.

    Raises:
        UserError: there is no such block.
    """
    if readout is None:
        return depth
    if not 1 <= readout <= depth:
        raise UserError(f"--backbone: readout: expected 1 to {depth}, got {readout}")
    return readout
