"""Backbones by name."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from lion_models.backbones.adapter import FrozenBackbone
from lion_models.backbones.efficientnet_lite import EFFICIENTNET_LITE0, load_efficientnet_lite0
from lion_models.backbones.huggingface import load_huggingface
from lion_models.backbones.timm_models import load_timm
from lion_models.backbones.tiny_vit import TINY_VIT, load_tiny_vit, load_vit_file
from lion_models.backbones.torchvision_models import load_torchvision
from lion_models.backbones.vit_s14_focus import VIT_S14_FOCUS, load_vit_s14_focus
from lion_models.errors import UserError, choose

__all__ = ["load_backbone"]

# Name -> what loads it and the options it takes.
_NAMED: dict[str, tuple[Callable[..., FrozenBackbone], tuple[str, ...]]] = {
    TINY_VIT: (load_tiny_vit, ("readout",)),
    VIT_S14_FOCUS: (load_vit_s14_focus, ("image_size", "readout", "weights")),
    EFFICIENTNET_LITE0: (load_efficientnet_lite0, ("image_size", "weights")),
}

# Prefix -> what loads any of a library's networks.
_LIBRARIES: dict[str, Callable[..., FrozenBackbone]] = {
    "timm": load_timm,
    "torchvision": load_torchvision,
    "hf": load_huggingface,
}
_OPTIONS = ("image_size", "readout", "weights")


def load_backbone(
    name: str,
    *,
    image_size: int | None = None,
    readout: int | None = None,
    weights: str | None = None,
) -> FrozenBackbone:
    """A frozen backbone by name or file.

    Options may be a part of the name, `vit-s14-focus,image_size=112,readout=10`; the backbone's
    own name holds them in any case, so that a checkpoint finds the same backbone again.

    Args:
        name: `tiny-vit`, `vit-s14-focus`, `efficientnet-lite0`, `timm:NAME`, `torchvision:NAME`,
            `hf:NAME` or `hf:FOLDER`, or the path of a safetensors file written by
            `lion_models.pretrain`.
        image_size: height and width of the input in pixels; None means what it was trained with.
        readout: transformers: the block whose output is read, 1 being the first; the blocks behind
            it are left out. None means the last.
        weights: a file to read the weights from, instead of the usual place. timm and torchvision:
            also `random`, for an untrained network.

    Raises:
        UserError: unknown name or option, a package that is missing, weights that are missing or
            damaged.
    """
    given = {"image_size": image_size, "readout": readout, "weights": weights}
    base, options = _parse(name)
    options |= {key: value for key, value in given.items() if value is not None}
    full = ",".join([base, *(f"{key}={value}" for key, value in sorted(options.items()))])
    if base.endswith(".safetensors"):
        return _call(load_vit_file, ("readout",), base, options, full, Path(base).expanduser())
    library, colon, model_name = base.partition(":")
    if colon and library in _LIBRARIES and model_name not in ("", "NAME"):
        return _call(_LIBRARIES[library], _OPTIONS, base, options, full, model_name)
    known = [*_NAMED, *(f"{library}:NAME" for library in _LIBRARIES)]
    choose("--backbone", base, known)
    if base not in _NAMED:
        raise UserError(f"--backbone: {base}: put the name of a network for NAME")
    load, allowed = _NAMED[base]
    return _call(load, allowed, base, options, full)


def _parse(name: str) -> tuple[str, dict[str, Any]]:
    if Path(name).suffix == ".safetensors" and Path(name).expanduser().is_file():
        return name, {}  # a path may have commas in it
    base, *parts = name.split(",")
    options: dict[str, Any] = {}
    for part in parts:
        key, equals, text = part.partition("=")
        choose("--backbone: option", key, _OPTIONS)
        if not equals or not text or (key != "weights" and not text.isdigit()):
            kind = "a path" if key == "weights" else "a whole number"
            raise UserError(f"--backbone: {key}: expected {key}={kind}, got '{part}'")
        options[key] = text if key == "weights" else int(text)
    return base, options


def _call(
    load: Callable[..., FrozenBackbone],
    allowed: tuple[str, ...],
    base: str,
    options: dict[str, Any],
    *arguments: object,
) -> FrozenBackbone:
    for key in options:
        if key not in allowed:
            takes = f"takes {', '.join(allowed)}" if allowed else "takes no option"
            raise UserError(f"--backbone {base}: {takes}, not {key}")
    return load(*arguments, **options)
