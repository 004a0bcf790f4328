"""Networks that the caller has loaded: of timm, torchvision or transformers, as they are."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from lion_models.backbones.frozen import FrozenBackbone, Normalisation
from lion_models.backbones.huggingface import freeze_huggingface
from lion_models.backbones.normalisation import NORMALISATIONS, named_normalisation
from lion_models.backbones.timm_models import freeze_timm
from lion_models.backbones.torchvision_models import freeze_torchvision
from lion_models.base.errors import UserError, choose

__all__ = ["GIVEN", "freeze_network", "given_image_size"]

GIVEN = "given:"  # begins the names of such networks, which no name loads again

_ImageSize = int | None
_SIZE = 224  # of torchvision's networks that take any


def freeze_network(
    network: nn.Module,
    *,
    image_size: int | None = None,
    normalisation: str | Normalisation | None = None,
) -> FrozenBackbone:
    """A network that the caller has made or loaded, as a frozen backbone.

    It shares its weights with the backbone: they are frozen, and it is in eval mode. Its own head
    is left out and left as it is.

    Args:
        network: of timm or of torchvision.models, or a model of transformers, with or without a
            head.
        image_size: height and width of the input in pixels; None means the network's own, and 224
            for networks of torchvision that take any.
        normalisation: `imagenet`, `half` (mean and deviation 0.5) or (mean, deviation), a number
            or one for each channel. None and `backbone` mean the weights' own; transformers keeps
            that in the image processor, so it has to be given for a model of it.

    Raises:
        UserError: something else, a normalisation that is not known, or a network that does not
            take such images.
    """
    freeze = _library(network)
    name = f"{GIVEN}{type(network).__name__}"
    if image_size is not None:
        name += f",image_size={image_size}"
    if isinstance(normalisation, str):
        choose("normalisation", normalisation, NORMALISATIONS)
        own = normalisation == "backbone"
        normalisation = None if own else named_normalisation(normalisation, channels=3)
    backbone = freeze(network, name, image_size, normalisation)
    _try(backbone)
    return backbone


def given_image_size(name: str) -> int | None:
    """The size that a backbone was given with, by its name."""
    _, _, size = name.partition(",image_size=")
    return int(size) if size else None


_Freeze = Callable[[Any, str, _ImageSize, Normalisation | None], FrozenBackbone]


def _library(model: nn.Module) -> _Freeze:
    """What makes a backbone of a network, by the package of its class or of those below it."""
    roots = [kind.__module__.partition(".")[0] for kind in type(model).__mro__]
    found = next((root for root in roots if root in _LIBRARIES), None)
    if found is None:
        raise UserError(
            f"backbone: expected a name, a FrozenBackbone, or a network of timm, torchvision or "
            f"transformers, got {type(model).__module__}.{type(model).__name__}; say where its "
            "tokens are with FrozenBackbone(network, embed=..., encode=...), as in "
            "examples/adapt_backbone.py"
        )
    return _LIBRARIES[found]


def _timm(
    model: Any, name: str, size: _ImageSize, normalisation: Normalisation | None
) -> FrozenBackbone:
    return freeze_timm(
        model, name, image_size=size, normalisation=normalisation, source="given: timm"
    )


def _torchvision(
    model: Any, name: str, size: _ImageSize, normalisation: Normalisation | None
) -> FrozenBackbone:
    # All of torchvision's classifiers were trained with ImageNet's mean and deviation.
    return freeze_torchvision(
        model,
        name,
        image_size=getattr(model, "image_size", _SIZE) if size is None else size,
        normalisation=normalisation or named_normalisation("imagenet", channels=3),
        source="given: torchvision",
    )


def _transformers(
    model: Any, name: str, size: _ImageSize, normalisation: Normalisation | None
) -> FrozenBackbone:
    if normalisation is None:
        raise UserError(
            f"normalisation: a model of transformers ({type(model).__name__}) does not know it; "
            "give its image processor's, (processor.image_mean, processor.image_std), or "
            "'imagenet' or 'half'"
        )
    network = model.base_model  # the model itself where there is no head
    return freeze_huggingface(
        network, name, image_size=size, normalisation=normalisation, source="given: transformers"
    )


_LIBRARIES: dict[str, _Freeze] = {
    "timm": _timm,
    "torchvision": _torchvision,
    "transformers": _transformers,
}


@torch.no_grad()
def _try(backbone: FrozenBackbone) -> None:
    """Make sure that a network takes what we believe it does."""
    like = next(backbone.parameters())
    side, channels = backbone.image_size, backbone.channels
    blank = torch.zeros(1, channels, side, side, device=like.device, dtype=like.dtype)
    expected = (1, backbone.feature_dim)
    try:
        found = tuple(backbone(blank).shape)
    except (RuntimeError, ValueError, AssertionError) as error:
        raise UserError(
            f"backbone: {backbone.name} does not take images {tuple(blank.shape)} ({error}); give "
            "its `image_size`, or make a FrozenBackbone of it yourself"
        ) from error
    if found != expected:
        raise UserError(
            f"backbone: {backbone.name}: expected a feature {expected} of one image, got {found}; "
            "make a FrozenBackbone of it yourself, as in examples/adapt_backbone.py"
        )
