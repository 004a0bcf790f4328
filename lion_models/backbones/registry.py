"""Backbones by name."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from lion_models.backbones.efficientnet_lite import (
    EFFICIENTNET_LITE0,
    EFFICIENTNET_WEIGHTS,
    load_efficientnet_lite0,
)
from lion_models.backbones.frozen import FrozenBackbone
from lion_models.backbones.huggingface import load_huggingface
from lion_models.backbones.timm_models import load_timm
from lion_models.backbones.tiny_vit import TINY_VIT, load_tiny_vit, load_vit_file
from lion_models.backbones.torchvision_models import load_torchvision
from lion_models.backbones.vit_s14_focus import (
    VIT_S14_FOCUS,
    VIT_S14_WEIGHTS,
    load_vit_s14_focus,
)
from lion_models.base.errors import UserError, choose, did_you_mean

__all__ = ["PACKAGED", "load_backbone"]

# Those whose weights `lion backbone prepare` fetches.
PACKAGED = {each.backbone: each for each in (EFFICIENTNET_WEIGHTS, VIT_S14_WEIGHTS)}

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
_LIBRARY_OPTIONS = ("image_size", "readout", "weights")


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
            `tools/pretrain_tiny_vit.py`.
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
    base, parts = _split(name)
    load, allowed, arguments = _loader(base)
    options = dict(_option(base, part, allowed) for part in parts)
    for key, value in given.items():
        if value is not None:
            options[_taken(base, key, allowed)] = value
    full = ",".join([base, *(f"{key}={value}" for key, value in sorted(options.items()))])
    return load(full, *arguments, **options)


def _split(name: str) -> tuple[str, list[str]]:
    if Path(name).suffix == ".safetensors" and Path(name).expanduser().is_file():
        return name, []  # a path may have commas in it
    base, *parts = name.split(",")
    return base, parts


def _loader(
    base: str,
) -> tuple[Callable[..., FrozenBackbone], tuple[str, ...], tuple[str | Path, ...]]:
    """What loads a backbone, the options it takes, and its arguments after the full name."""
    if base.endswith(".safetensors"):
        return load_vit_file, ("readout",), (Path(base).expanduser(),)
    library, colon, model_name = base.partition(":")
    if colon and library in _LIBRARIES and model_name not in ("", "NAME"):
        return _LIBRARIES[library], _LIBRARY_OPTIONS, (model_name,)
    known = [*_NAMED, *(f"{library}:NAME" for library in _LIBRARIES)]
    choose("backbone", base, known)
    if base not in _NAMED:
        raise UserError(f"`backbone`: {base}: put the name of a network for NAME")
    return *_NAMED[base], ()


def _option(base: str, part: str, allowed: Sequence[str]) -> tuple[str, str | int]:
    key, equals, text = part.partition("=")
    _taken(base, key, allowed)
    if not equals or not text or (key != "weights" and not text.isdigit()):
        kind = "a path" if key == "weights" else "a whole number"
        raise UserError(f"`backbone`: {key}: expected {key}={kind}, got '{part}'")
    return key, text if key == "weights" else int(text)


def _taken(base: str, key: str, allowed: Sequence[str]) -> str:
    if key in allowed:
        return key
    hint = did_you_mean(key, allowed)
    raise UserError(f"`backbone` {base}: takes {', '.join(allowed)}, not {key}{hint}")
