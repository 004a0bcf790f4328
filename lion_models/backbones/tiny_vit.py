"""The embedded tiny ViT, and any file that `tools/pretrain_tiny_vit.py` has written."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from importlib import resources
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from lion_models.backbones.frozen import FrozenBackbone
from lion_models.backbones.vit import VisionTransformer, ViTConfig, freeze_vit
from lion_models.base.errors import UserError
from lion_models.base.files import write_bytes

__all__ = [
    "TINY_VIT",
    "load_tiny_vit",
    "load_vit_file",
    "read_vit",
    "save_vit",
    "tiny_vit_path",
]

TINY_VIT = "tiny-vit"


def tiny_vit_path() -> Path:
    """The embedded weights: our ViT pretrained on Fashion-MNIST by `tools/pretrain_tiny_vit.py`."""
    folder = resources.files("lion_models.backbones")
    return Path(str(folder / "weights/tiny_vit_fashion_mnist.safetensors"))


def read_vit(path: Path) -> tuple[VisionTransformer, dict[str, Any]]:
    """Load a ViT with its head from a safetensors file of `tools/pretrain_tiny_vit.py`.

    Returns:
        The network, and the file's metadata with its JSON decoded (`config`, `classes`,
        `training`).

    Raises:
        UserError: no such file, damaged, or not written by `tools/pretrain_tiny_vit.py`.
    """
    if not path.is_file():
        raise UserError(
            f"`backbone`: {path} does not exist; expected a safetensors file written "
            "by 'python tools/pretrain_tiny_vit.py'"
        )
    try:
        with safe_open(path, "pt") as file:
            metadata = {key: json.loads(value) for key, value in (file.metadata() or {}).items()}
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (it is no dict)
        model = VisionTransformer(ViTConfig(**metadata["config"]))
        model.load_state_dict(state)
    except (SafetensorError, OSError) as error:
        raise UserError(
            f"`backbone`: {path} is cut off or not a safetensors file ({error}); "
            "copy or train it again"
        ) from error
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise UserError(
            f"`backbone`: {path} is not a ViT of lion_models ({error}); expected a "
            "file written by 'python tools/pretrain_tiny_vit.py'"
        ) from error
    return model, metadata


def save_vit(
    model: VisionTransformer, path: Path, training: dict[str, Any], classes: Sequence[str]
) -> None:
    """Write a safetensors file that `read_vit` reads.

    Args:
        model: with its head.
        path: of the file.
        training: how it was trained; any JSON.
        classes: what the head tells apart.
    """
    metadata = {
        "config": json.dumps(model.config.to_dict()),
        "classes": json.dumps(list(classes)),
        "training": json.dumps(training),
    }
    write_bytes(path, save(model.state_dict(), metadata))


def load_tiny_vit(name: str = TINY_VIT, *, readout: int | None = None) -> FrozenBackbone:
    """The embedded backbone; `readout` is the block whose output is read, 1 to 4, None the last."""
    model = _cut(read_vit(tiny_vit_path())[0], readout)
    source = "trained on Fashion-MNIST by tools/pretrain_tiny_vit.py"
    return freeze_vit(model, name, "Apache-2.0", source)


def load_vit_file(name: str, path: Path, *, readout: int | None = None) -> FrozenBackbone:
    """A file of `tools/pretrain_tiny_vit.py`; `readout` as in `load_tiny_vit`."""
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
        raise UserError(f"`backbone`: readout: expected 1 to {depth}, got {readout}")
    return readout
