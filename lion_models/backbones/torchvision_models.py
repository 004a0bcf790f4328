"""Networks of torchvision: `torchvision:resnet50`, `torchvision:vit_b_16`, `torchvision:swin_t`."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from lion_models.backbones.blocks import with_modules
from lion_models.backbones.files import load_weights, not_fetched, read_state
from lion_models.backbones.frozen import FrozenBackbone, Normalisation, normalise
from lion_models.backbones.tiny_vit import check_readout
from lion_models.backbones.vit import resize_positions
from lion_models.base.errors import UserError, did_you_mean
from lion_models.base.optional import require

__all__ = ["freeze_torchvision", "load_torchvision"]

HEADS = ("fc", "classifier", "heads", "head")


def load_torchvision(
    name: str,
    model_name: str,
    *,
    image_size: int | None = None,
    readout: int | None = None,
    weights: str | None = None,
) -> FrozenBackbone:
    """Any classifier of torchvision, frozen, with what enters its last linear layer as feature.

    Vision transformers are tuned on their tokens (with blocks for deep prompts), Swin on the
    tokens that enter its first stage, every other network on its normalised image.

    Args:
        name: what the backbone will be called.
        model_name: torchvision's.
        image_size: None means the pretrained weights'.
        readout: vision transformers: the block that is read; None means the last.
        weights: a state dict in torchvision's names; `random` for an untrained network; None
            fetches torchvision's default weights, or takes them from torch's cache.

    Raises:
        UserError: torchvision is missing, does not know the name, or has no weights for it here.
    """
    full = f"torchvision:{model_name}"
    models = require("torchvision.models", f"`backbone` {full}", "torchvision")
    known = models.list_models(module=models)
    if model_name not in known:
        hint = did_you_mean(model_name, known, "torchvision:")
        raise UserError(f"`backbone`: torchvision has no classifier '{model_name}'{hint}")
    default = models.get_model_weights(model_name).DEFAULT
    preset = default.transforms()
    size = preset.crop_size[0] if image_size is None else image_size
    vit = model_name.startswith("vit_")
    network = models.get_model(model_name, weights=None, **({"image_size": size} if vit else {}))
    if weights != "random":
        state = _state(default, full, weights)
        if vit:
            positions = resize_positions(state["encoder.pos_embedding"], size // network.patch_size)
            state["encoder.pos_embedding"] = positions
        load_weights(network, state, full, [f"{head}." for head in HEADS])
    if readout is not None:
        if not vit:
            raise UserError(f"`backbone` {full}: readout: only vision transformers have one")
        layers = network.encoder.layers
        network.encoder.layers = layers[: check_readout(readout, len(layers))]
    return freeze_torchvision(
        network,
        name,
        image_size=size,
        normalisation=(tuple(preset.mean), tuple(preset.std)),
        source=str(default) if weights is None else weights,
    )


def freeze_torchvision(
    network: Any,
    name: str,
    *,
    image_size: int,
    normalisation: Normalisation,
    source: str = "unknown",
) -> FrozenBackbone:
    """A classifier that torchvision has made, frozen; its last linear layer is left out.

    Args:
        network: of `torchvision.models`; not changed, its weights are shared.
        name: what the backbone will be called.
        image_size: of the input in pixels.
        normalisation: mean and deviation of the weights.
        source: where the weights came from.
    """
    models = require("torchvision.models", f"`backbone` {name}", "torchvision")
    network, width = _without_head(network)
    common: dict[str, Any] = {
        "name": name,
        "channels": 3,
        "image_size": image_size,
        "feature_dim": width,
        "normalisation": normalisation,
        "licence": "see the weights' page",
        "source": source,
    }
    if isinstance(network, models.VisionTransformer):
        return _vit(network, common)
    if isinstance(network, models.SwinTransformer):
        return _swin(network, common)
    return FrozenBackbone(
        network,
        embed=lambda images: normalise(images, normalisation),
        encode=network.forward,
        token_dim=3,
        space="pixel",
        **common,
    )


def _state(default: Any, full: str, weights: str | None) -> dict[str, Tensor]:
    if weights is not None:
        return read_state(Path(weights).expanduser())
    try:
        return default.get_state_dict(progress=False, check_hash=True)
    except Exception as error:  # of urllib, of the disk, of torch.load
        raise not_fetched(
            full, error, f"fetch {default.url} elsewhere and add ',weights=FILE' to the name"
        ) from error


def _without_head(network: nn.Module) -> tuple[Any, int]:
    """The network with an identity in place of its last linear layer, and what enters that."""
    head = next(name for name in HEADS if hasattr(network, name))
    linears = [name for name, part in network.named_modules() if isinstance(part, nn.Linear)]
    last = next(name for name in reversed(linears) if name.split(".")[0] == head)
    linear = cast(nn.Linear, network.get_submodule(last))
    return with_modules(network, {last: nn.Identity()}), linear.in_features


def _vit(network: Any, common: dict[str, Any]) -> FrozenBackbone:
    encoder = network.encoder

    def embed(images: Tensor) -> Tensor:  # (B, 3, S, S) -> (B, 1 + N, D)
        patches = network._process_input(normalise(images, common["normalisation"]))
        cls_token = network.class_token.expand(len(images), -1, -1)
        return torch.cat([cls_token, patches], dim=1) + encoder.pos_embedding

    def pool(tokens: Tensor) -> Tensor:
        return network.heads(encoder.ln(tokens[:, 0]))

    return FrozenBackbone(
        network,
        embed=embed,
        encode=lambda tokens: pool(encoder.layers(tokens)),
        token_dim=network.hidden_dim,
        blocks=list(encoder.layers),
        pool=pool,
        **common,
    )


def _swin(network: Any, common: dict[str, Any]) -> FrozenBackbone:
    patch_embed, stages = network.features[0], network.features[1:]

    def embed(images: Tensor) -> Tensor:  # (B, 3, S, S) -> (B, H W, D)
        return patch_embed(normalise(images, common["normalisation"])).flatten(1, 2)

    def encode(tokens: Tensor) -> Tensor:
        side = round(tokens.shape[1] ** 0.5)
        last = network.norm(stages(tokens.unflatten(1, (side, side))))
        return network.flatten(network.avgpool(network.permute(last)))

    dim = patch_embed[0].out_channels
    return FrozenBackbone(network, embed=embed, encode=encode, token_dim=dim, **common)
