"""The vision transformer, its frozen form, and the embedded weights."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from lion_models.backbones import (
    FrozenBackbone,
    fingerprint,
    freeze_vit,
    load_backbone,
    read_vit,
    tiny_vit_path,
)
from lion_models.backbones.vit import VisionTransformer, ViTConfig
from lion_models.base.errors import UserError
from lion_models.data import open_source, split_rows
from tests.support.small import SMALL, small_vit

# timm.create_model("vit_tiny_patch16_224").state_dict(), without the block's number.
TIMM_NAMES = {
    "cls_token",
    "pos_embed",
    "patch_embed.proj.weight",
    "patch_embed.proj.bias",
    "norm.weight",
    "norm.bias",
    "head.weight",
    "head.bias",
}
TIMM_BLOCK_NAMES = {
    "norm1.weight",
    "norm1.bias",
    "attn.qkv.weight",
    "attn.qkv.bias",
    "attn.proj.weight",
    "attn.proj.bias",
    "norm2.weight",
    "norm2.bias",
    "mlp.fc1.weight",
    "mlp.fc1.bias",
    "mlp.fc2.weight",
    "mlp.fc2.bias",
}


def test_state_dict_names_are_those_of_timm():
    blocks = {f"blocks.{n}.{name}" for n in range(SMALL.depth) for name in TIMM_BLOCK_NAMES}
    assert set(small_vit().state_dict()) == TIMM_NAMES | blocks


def test_shapes_are_those_of_timm():
    state = VisionTransformer(ViTConfig(224, 16, 3, 192, 12, 3, 4.0, 1000)).state_dict()
    assert state["cls_token"].shape == (1, 1, 192)
    assert state["pos_embed"].shape == (1, 197, 192)
    assert state["patch_embed.proj.weight"].shape == (192, 3, 16, 16)
    assert state["blocks.11.attn.qkv.weight"].shape == (576, 192)
    assert state["blocks.11.mlp.fc1.weight"].shape == (768, 192)
    assert sum(value.numel() for value in state.values()) == 5_717_416  # timm's count


def test_forward_equals_a_block_written_out_in_plain_operations():
    model, images = small_vit().double(), torch.rand(2, 1, 12, 12, dtype=torch.float64)
    tokens = model.embed(images)
    for block in model.blocks:
        width = SMALL.dim // SMALL.heads
        normed = torch.nn.functional.layer_norm(
            tokens, (SMALL.dim,), block.norm1.weight, block.norm1.bias, 1e-6
        )
        query, key, value = block.attn.qkv(normed).chunk(3, dim=-1)
        heads = []
        for head in range(SMALL.heads):
            part = slice(head * width, (head + 1) * width)
            weights = query[..., part] @ key[..., part].transpose(1, 2) / width**0.5
            heads.append(weights.softmax(-1) @ value[..., part])
        tokens = tokens + block.attn.proj(torch.cat(heads, -1))
        hidden = block.mlp.fc1(block.norm2(tokens))
        gelu = hidden * 0.5 * (1 + torch.erf(hidden / 2**0.5))
        tokens = tokens + block.mlp.fc2(gelu)
    expected = model.head(model.norm(tokens)[:, 0])
    torch.testing.assert_close(model(images), expected, rtol=1e-10, atol=1e-12)


def test_wrong_image_size_is_named():
    with pytest.raises(ValueError, match=r"expected \(batch, 1, 12, 12\), got \(2, 1, 28, 28\)"):
        small_vit().embed(torch.zeros(2, 1, 28, 28))


@pytest.mark.parametrize(
    ("options", "message"),
    [({"patch_size": 5}, "5 does not divide image_size"), ({"heads": 5}, "5 does not divide dim")],
)
def test_impossible_shape_is_named(options: dict[str, int], message: str):
    with pytest.raises(ValueError, match=message):
        ViTConfig(**options)


def test_frozen_backbone_stays_in_eval_mode_without_gradients(backbone: FrozenBackbone):
    backbone.train()
    assert not any(module.training for module in backbone.modules())
    assert not any(parameter.requires_grad for parameter in backbone.parameters())


def test_any_module_becomes_a_backbone_through_two_functions():
    network = torch.nn.Sequential(torch.nn.Conv2d(3, 5, 4, stride=4), torch.nn.Flatten(2))
    adapted = FrozenBackbone(
        network,
        embed=lambda images: network(images).transpose(1, 2),
        encode=lambda tokens: tokens.mean(1),
        name="conv",
        channels=3,
        image_size=8,
        token_dim=5,
        feature_dim=5,
    )
    assert adapted(torch.rand(2, 3, 8, 8)).shape == (2, 5)


def pixel_backbone(**changes: object) -> FrozenBackbone:
    network = torch.nn.Sequential(torch.nn.Conv2d(3, 5, 4, stride=4), torch.nn.Flatten(2))
    options: dict = {
        "embed": lambda images: (images - 0.5) / 0.25,
        "encode": lambda pixels: network(pixels).mean(2),
        "name": "conv",
        "channels": 3,
        "image_size": 8,
        "token_dim": 3,
        "feature_dim": 5,
        "space": "pixel",
    }
    return FrozenBackbone(network, **options | changes)


def test_network_without_tokens_is_tuned_on_its_normalised_image():
    backbone, images = pixel_backbone(), torch.rand(2, 3, 8, 8)
    pixels = backbone.embed(images)
    assert pixels.shape == images.shape
    torch.testing.assert_close(backbone.encode(pixels), backbone(images))
    assert backbone(images).shape == (2, 5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"space": "voxel"}, "expected one of token, pixel, got 'voxel'"),
        ({"token_dim": 5}, "expected token_dim = channels = 3 and no blocks, got token_dim 5"),
        ({"blocks": [torch.nn.Identity()]}, "3 and 1 blocks; use space 'token'"),
    ],
)
def test_space_that_does_not_fit_is_named(changes: dict[str, object], message: str):
    with pytest.raises(ValueError, match=message):
        pixel_backbone(**changes)


def test_fingerprint_changes_with_one_bit_and_not_with_order():
    state = small_vit().state_dict()
    assert fingerprint(state) == fingerprint(dict(reversed(state.items())))
    state["norm.bias"] = state["norm.bias"].clone()
    state["norm.bias"][0] = torch.nextafter(state["norm.bias"][0], torch.tensor(9.0))
    assert fingerprint(state) != fingerprint(small_vit().state_dict())


def test_file_round_trip(backbone_file: Path):
    model, metadata = read_vit(backbone_file)
    assert model.config == SMALL
    assert metadata["training"] == {"data": "none"}
    assert load_backbone(str(backbone_file)).fingerprint == freeze_vit(model, "x").fingerprint


def test_misspelt_backbone_is_suggested():
    with pytest.raises(UserError, match="did you mean 'tiny-vit'"):
        load_backbone("tiny_vit")


def test_missing_backbone_file_is_named(tmp_path: Path):
    with pytest.raises(UserError, match=r"none\.safetensors does not exist"):
        load_backbone(str(tmp_path / "none.safetensors"))


def test_backbone_file_cut_in_half_is_named(backbone_file: Path, tmp_path: Path):
    half = tmp_path / "half.safetensors"
    half.write_bytes(backbone_file.read_bytes()[: backbone_file.stat().st_size // 2])
    with pytest.raises(UserError, match="cut off or not a safetensors file"):
        load_backbone(str(half))


def test_embedded_weights_are_small_and_carry_their_figures():
    assert tiny_vit_path().stat().st_size <= 2_000_000
    model, metadata = read_vit(tiny_vit_path())
    assert 250_000 <= sum(p.numel() for p in model.parameters()) <= 350_000
    assert metadata["training"]["test_accuracy"] >= 0.80
    log = tiny_vit_path().with_suffix(".log").read_text().splitlines()
    assert json.loads(log[-1]) == metadata["training"]


@pytest.mark.parametrize(("data", "bar"), [("digits", 0.90), ("mnist5k", 0.77)])
def test_ridge_regression_on_embedded_features_beats_pixels(data: str, bar: float):
    """20 images a class; measured on what neither trains nor tests."""
    backbone = load_backbone("tiny-vit")
    source = open_source(data, backbone.channels, backbone.image_size)
    split = split_rows(source.labels, source.classes, seed=0, shots=20)
    rest = torch.ones(len(source), dtype=torch.bool)
    rest[torch.cat([split.train, split.test])] = False
    images = source.load(torch.arange(len(source))).float() / 255
    with torch.no_grad():
        features = torch.cat([backbone(batch) for batch in images.split(500)])

    def accuracy(points: torch.Tensor) -> float:
        points = (points - points[split.train].mean(0)).double()
        targets = torch.eye(10, dtype=torch.float64)[source.labels] - 0.1
        known = points[split.train]
        ridge = 0.1 * known.square().sum(1).mean() * torch.eye(known.shape[1])
        weights = torch.linalg.solve(known.T @ known + ridge, known.T @ targets[split.train])
        hits = (points[rest] @ weights).argmax(1) == source.labels[rest]
        return hits.double().mean().item()

    score = accuracy(features)
    assert score > bar
    assert score > accuracy(images.flatten(1)) + 0.01
