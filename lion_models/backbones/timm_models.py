"""Networks of timm: `timm:vit_base_patch16_224`, `timm:swin_tiny_patch4_window7_224`, ..."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor, nn

from lion_models.backbones.blocks import with_modules
from lion_models.backbones.files import load_weights, not_fetched, read_state
from lion_models.backbones.frozen import FrozenBackbone, Normalisation, normalise
from lion_models.backbones.tiny_vit import check_readout
from lion_models.base.errors import UserError, did_you_mean
from lion_models.base.optional import require

__all__ = ["freeze_timm", "load_timm"]


def load_timm(
    name: str,
    model_name: str,
    *,
    image_size: int | None = None,
    readout: int | None = None,
    weights: str | None = None,
) -> FrozenBackbone:
    """Any classifier of timm, frozen, with timm's own pooled feature.

    Vision transformers are tuned on their tokens (with blocks for deep prompts), Swin on the
    tokens that enter its first stage, every other network on its normalised image.

    Args:
        name: what the backbone will be called.
        model_name: timm's, with or without a tag.
        image_size: None means the pretrained weights'.
        readout: vision transformers: the block that is read; None means the last.
        weights: a state dict in timm's names; `random` for an untrained network; None fetches
            timm's from its hub, or its cache.

    Raises:
        UserError: timm is missing, does not know the name, or has no weights for it here.
    """
    full = f"timm:{model_name}"
    timm = require("timm", f"`backbone` {full}", "timm")
    if not timm.is_model(model_name):
        hint = did_you_mean(model_name, timm.list_models(), "timm:")
        raise UserError(f"`backbone`: timm has no model '{model_name}'{hint}")
    network = _create(timm, full, model_name, image_size, weights)
    if readout is not None:
        if not isinstance(network, timm.models.vision_transformer.VisionTransformer):
            raise UserError(f"`backbone` {full}: readout: only vision transformers have one")
        network.blocks = network.blocks[: check_readout(readout, len(network.blocks))]
    source = f"timm {timm.__version__}: {model_name}" if weights is None else str(weights)
    return freeze_timm(network, name, image_size=image_size, source=source)


def freeze_timm(
    network: Any,
    name: str,
    *,
    image_size: int | None = None,
    normalisation: Normalisation | None = None,
    source: str = "unknown",
) -> FrozenBackbone:
    """A network that timm has made, frozen; its head is left out, as with `num_classes=0`.

    Args:
        network: what `timm.create_model` returned; not changed, its weights are shared.
        name: what the backbone will be called.
        image_size: None means what the network was made for, or else the pretrained weights'.
        normalisation: None means the pretrained weights'.
        source: where the weights came from.
    """
    timm = require("timm", f"`backbone` {name}", "timm")
    settings = network.pretrained_cfg
    parts = dict(network.named_modules())
    network = with_modules(network, {h: nn.Identity() for h in _heads(network) if h in parts})
    if image_size is None:
        made_for = getattr(getattr(network, "patch_embed", None), "img_size", None)
        image_size = (made_for or settings["input_size"])[-1]
    if normalisation is None:
        normalisation = (tuple(settings["mean"]), tuple(settings["std"]))
    common: dict[str, Any] = {
        "name": name,
        "channels": 3,
        "image_size": image_size,
        "feature_dim": getattr(network, "head_hidden_size", None) or network.num_features,
        "normalisation": normalisation,
        "licence": settings.get("license") or "unknown",
        "source": source,
    }
    if isinstance(network, timm.models.vision_transformer.VisionTransformer):
        return _vit(network, common)
    if isinstance(network, timm.models.swin_transformer.SwinTransformer):
        return _swin(network, common)
    return FrozenBackbone(
        network,
        embed=lambda images: normalise(images, normalisation),
        encode=lambda x: network.forward_head(network.forward_features(x), pre_logits=True),
        token_dim=3,
        space="pixel",
        **common,
    )


def _create(
    timm: Any, full: str, model_name: str, image_size: int | None, weights: str | None
) -> Any:
    options: dict[str, Any] = {"pretrained": weights is None, "num_classes": 0}
    try:
        try:
            sized = options if image_size is None else options | {"img_size": image_size}
            network = timm.create_model(model_name, **sized)
        except TypeError:  # convolutional networks have no such argument and take any size
            network = timm.create_model(model_name, **options)
    except Exception as error:
        if weights is not None:
            raise
        raise not_fetched(
            full, error, "fetch them elsewhere and add ',weights=FILE' to the name"
        ) from error
    if weights not in (None, "random"):
        heads = [f"{part}." for part in _heads(network)]
        load_weights(network, read_state(Path(str(weights)).expanduser()), full, heads)
    return network


def _heads(network: Any) -> list[str]:
    """The paths of a network's last linear layers, one but for distilled ones."""
    head = network.pretrained_cfg["classifier"]
    return [head] if isinstance(head, str) else list(head)


def _vit(network: Any, common: dict[str, Any]) -> FrozenBackbone:
    def embed(images: Tensor) -> Tensor:  # (B, 3, S, S) -> (B, prefix + N, D)
        patches = network.patch_embed(normalise(images, common["normalisation"]))
        return network.norm_pre(network.patch_drop(network._pos_embed(patches)))

    def pool(tokens: Tensor) -> Tensor:
        return network.forward_head(network.norm(tokens), pre_logits=True)

    return FrozenBackbone(
        network,
        embed=embed,
        encode=lambda tokens: pool(network.blocks(tokens)),
        token_dim=network.embed_dim,
        blocks=list(network.blocks),
        pool=pool,
        **common,
    )


def _swin(network: Any, common: dict[str, Any]) -> FrozenBackbone:
    grid = network.patch_embed.grid_size

    def embed(images: Tensor) -> Tensor:  # (B, 3, S, S) -> (B, H W, D)
        return network.patch_embed(normalise(images, common["normalisation"])).flatten(1, 2)

    def encode(tokens: Tensor) -> Tensor:
        stages: nn.Module = network.layers
        last = network.norm(stages(tokens.unflatten(1, grid)))
        return network.forward_head(last, pre_logits=True)

    dim = network.patch_embed.proj.out_channels
    return FrozenBackbone(network, embed=embed, encode=encode, token_dim=dim, **common)
