"""Networks of Hugging Face's transformers: `hf:facebook/dinov2-small`, or `hf:FOLDER`."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lion_models.backbones.files import not_fetched
from lion_models.backbones.frozen import FrozenBackbone, Normalisation, normalise
from lion_models.backbones.tiny_vit import check_readout
from lion_models.base.errors import UserError
from lion_models.base.optional import require

__all__ = ["freeze_huggingface", "load_huggingface"]

# Class token first, blocks that need nothing but tokens, one norm behind them.
PLAIN_TRANSFORMERS = ("vit", "deit", "dinov2", "dinov2_with_registers")


def load_huggingface(
    name: str,
    model_name: str,
    *,
    image_size: int | None = None,
    readout: int | None = None,
    weights: str | None = None,
) -> FrozenBackbone:
    """Any image model that `AutoModel` loads, frozen.

    ViT, DeiT and DINOv2 are tuned on their tokens (with blocks for deep prompts), and their
    feature is the class token after the last norm. Every other network is tuned on its normalised
    image, and its feature is the model's pooled output, or the mean of its last tokens.

    Args:
        name: what the backbone will be called.
        model_name: the hub's name, or a folder that `save_pretrained` wrote, with
            preprocessor_config.json in it.
        image_size: None means the preprocessor's.
        readout: transformers: the block that is read; None means the last.
        weights: such a folder, instead of the hub.

    Raises:
        UserError: transformers is missing, or neither the hub nor a folder gives the model.
    """
    full = f"hf:{model_name}"
    what = f"`backbone` {full}"
    transformers = require("transformers", what, "hf")
    origin = str(Path(model_name if weights is None else weights).expanduser())
    try:
        mixin = require("transformers.image_processing_base", what, "hf").ImageProcessingMixin
        settings: dict[str, Any] = mixin.get_image_processor_dict(origin)[0]
        network = transformers.AutoModel.from_pretrained(origin)
    except (OSError, ValueError) as error:
        if isinstance(error, UserError):
            raise
        raise not_fetched(
            full,
            error,
            "download the whole folder elsewhere (config.json, preprocessor_config.json, "
            "model.safetensors) and use 'hf:FOLDER'",
        ) from error
    if readout is not None:
        holder, attribute = _layers(network)
        if holder is None:
            raise UserError(f"`backbone` {full}: readout: only vision transformers have one")
        layers = getattr(holder, attribute)
        setattr(holder, attribute, layers[: check_readout(readout, len(layers))])
    return freeze_huggingface(
        network,
        name,
        image_size=_preset_size(settings, network.config) if image_size is None else image_size,
        normalisation=(
            tuple(settings.get("image_mean") or (0.5,) * 3),
            tuple(settings.get("image_std") or (0.5,) * 3),
        ),
        source=f"Hugging Face: {origin}",
    )


def freeze_huggingface(
    network: Any,
    name: str,
    *,
    image_size: int | None = None,
    normalisation: Normalisation,
    source: str = "unknown",
) -> FrozenBackbone:
    """An image model that transformers has made, frozen; see `load_huggingface` for what is tuned.

    Args:
        network: as `AutoModel` gives it, without a head.
        name: what the backbone will be called.
        image_size: of the input in pixels; None means that of its configuration.
        normalisation: `image_mean` and `image_std` of its preprocessor.
        source: where the weights came from.
    """
    common: dict[str, Any] = {
        "name": name,
        "channels": 3,
        "image_size": _preset_size({}, network.config) if image_size is None else image_size,
        "normalisation": normalisation,
        "licence": "see the model's page",
        "source": source,
    }
    holder, attribute = _layers(network)
    if holder is None:
        return _pixels(network, common)
    return _vit(network, list(getattr(holder, attribute)), common)


def _preset_size(settings: dict[str, Any], config: Any) -> int:
    for key in ("crop_size", "size"):
        value = settings.get(key)
        if key == "crop_size" and settings.get("do_center_crop") is False:
            continue
        if isinstance(value, int):
            return value
        if isinstance(value, dict) and "height" in value:
            return int(value["height"])
    size = getattr(config, "image_size", 224)
    return int(size if isinstance(size, int) else size[0])


def _layers(network: Any) -> tuple[Any, str]:
    """The module that holds the blocks and under what name; (None, "") if this is no plain ViT."""
    if network.config.model_type not in PLAIN_TRANSFORMERS:
        return None, ""
    if hasattr(network, "layers"):  # where transformers 5 has put them for some
        return network, "layers"
    return network.encoder, "layer"


class _Block(nn.Module):
    """A layer as a function of its tokens alone; older transformers return a tuple."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, tokens: Tensor) -> Tensor:  # (B, T, D) -> (B, T, D)
        output = self.layer(tokens)
        return output[0] if isinstance(output, tuple) else output


def _vit(network: Any, layers: list[nn.Module], common: dict[str, Any]) -> FrozenBackbone:
    network = copy.copy(network)
    # A layer trained for another purpose, which nothing here reads.
    network._modules = {key: each for key, each in network._modules.items() if key != "pooler"}
    blocks = [_Block(layer) for layer in layers]
    options: dict[str, Any] = {}
    # DINOv2's embeddings resize their positions by themselves.
    resizes = not network.config.model_type.startswith("dinov2")
    if resizes and common["image_size"] != network.config.image_size:
        options["interpolate_pos_encoding"] = True

    def embed(images: Tensor) -> Tensor:  # (B, 3, S, S) -> (B, prefix + N, D)
        tokens = network.embeddings(normalise(images, common["normalisation"]), **options)
        return tokens[0] if isinstance(tokens, tuple) else tokens

    def pool(tokens: Tensor) -> Tensor:
        return network.layernorm(tokens[:, 0])

    def encode(tokens: Tensor) -> Tensor:
        for block in blocks:
            tokens = block(tokens)
        return pool(tokens)

    dim = network.config.hidden_size
    return FrozenBackbone(
        network,
        embed=embed,
        encode=encode,
        token_dim=dim,
        feature_dim=dim,
        blocks=blocks,
        pool=pool,
        **common,
    )


def _pixels(network: Any, common: dict[str, Any]) -> FrozenBackbone:
    def encode(pixels: Tensor) -> Tensor:  # (B, 3, S, S) -> (B, F)
        output = network(pixel_values=pixels)
        pooled = getattr(output, "pooler_output", None)
        if pooled is not None:
            return pooled.flatten(1)
        last = output.last_hidden_state  # (B, T, F) or (B, F, H, W)
        return last.mean(1) if last.dim() == 3 else last.mean((2, 3))

    def embed(images: Tensor) -> Tensor:
        return normalise(images, common["normalisation"])

    network.eval()
    with torch.no_grad():
        blank = torch.zeros(1, 3, common["image_size"], common["image_size"])
        width = encode(blank).shape[1]
    return FrozenBackbone(
        network, embed=embed, encode=encode, token_dim=3, feature_dim=width, space="pixel", **common
    )
