"""Networks of timm, torchvision and Hugging Face against their own forward passes."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from lion_models.backbones import FrozenBackbone, load_backbone
from lion_models.backbones.huggingface import load_huggingface
from lion_models.backbones.vit import resize_positions
from lion_models.base.errors import UserError
from lion_models.methods.lion import Lion
from lion_models.methods.vpt import VPTDeep
from tests.support.libraries import package


def check(backbone: FrozenBackbone, expected: Any, space: str, blocks: int) -> None:
    """The feature, the spaces' shapes, and that both methods train around it.

    Args:
        backbone: what is checked.
        expected: normalised images (B, 3, S, S) to the network's own pooled feature.
        space: what it must be.
        blocks: how many.
    """
    size = backbone.image_size
    images = torch.rand(2, 3, size, size)
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in backbone.normalisation)
    with torch.no_grad():
        tokens = backbone.embed(images)
        feature = backbone.encode(tokens)
        reference = expected((images - mean) / std)
    torch.testing.assert_close(feature, reference, rtol=1e-4, atol=1e-5)
    assert feature.shape == (2, backbone.feature_dim)
    assert feature.std() > 0
    assert (backbone.space, len(backbone.blocks)) == (space, blocks)
    assert not backbone.module.training
    width = tokens.shape[1 if space == "pixel" else 2]
    assert (width, tokens.dim()) == (backbone.token_dim, 4 if space == "pixel" else 3)
    methods = [Lion(backbone, 3, hidden=2)]
    if blocks:
        methods.append(VPTDeep(backbone, 3, prompts=2))
        with torch.no_grad():
            for block in backbone.blocks:
                tokens = block(tokens)
            torch.testing.assert_close(backbone.pool(tokens), feature)
    for method in methods:
        method.head.weight.data.normal_()
        method(images).sum().backward()
        trained = [p for p in method.parameters() if p.requires_grad]
        assert all(p.grad is not None and p.grad.isfinite().all() for p in trained)
        assert not any(p.grad is not None for p in backbone.parameters())


@pytest.mark.parametrize(
    ("model", "size", "space", "blocks"),
    [
        ("vit_tiny_patch16_224", 32, "token", 12),
        ("deit_tiny_distilled_patch16_224", 32, "token", 12),
        ("swin_tiny_patch4_window7_224", 56, "token", 0),
        ("resnet18", 32, "pixel", 0),
        ("mobilenetv3_small_050", 32, "pixel", 0),
    ],
)
def test_timm_feature_is_its_own(model: str, size: int, space: str, blocks: int):
    package("timm")
    backbone = load_backbone(f"timm:{model},weights=random", image_size=size)
    network: Any = backbone.module

    def expected(pixels: torch.Tensor) -> torch.Tensor:
        return network.forward_head(network.forward_features(pixels), pre_logits=True)

    check(backbone, expected, space, blocks)


def test_timm_weights_file_with_a_head_is_loaded_and_readout_cuts(tmp_path: Path):
    timm = package("timm")
    torch.manual_seed(1)
    original = timm.create_model("vit_tiny_patch16_224", img_size=32).eval()
    torch.save(original.state_dict(), tmp_path / "vit.pth")
    name = f"timm:vit_tiny_patch16_224,image_size=32,weights={tmp_path}/vit.pth"
    backbone, images = load_backbone(name), torch.rand(2, 3, 32, 32)
    with torch.no_grad():
        expected = original.forward_features(images * 2 - 1)[:, 0]
        torch.testing.assert_close(backbone(images), expected)
        early = load_backbone(name, readout=3)
        tokens = original.blocks[:3](original._pos_embed(original.patch_embed(images * 2 - 1)))
        torch.testing.assert_close(early(images), original.norm(tokens)[:, 0])
    assert early.name.endswith("readout=3,weights=" + str(tmp_path / "vit.pth"))
    with pytest.raises(UserError, match="the weights are another network's"):
        load_backbone(f"timm:resnet18,weights={tmp_path}/vit.pth")


@pytest.mark.parametrize(
    ("model", "size", "space", "blocks"),
    [
        ("vit_b_16", 32, "token", 12),
        ("swin_t", 64, "token", 0),
        ("resnet18", 64, "pixel", 0),
        ("convnext_tiny", 64, "pixel", 0),
    ],
)
def test_torchvision_feature_is_what_enters_its_head(
    model: str, size: int, space: str, blocks: int
):
    package("torchvision")
    backbone = load_backbone(f"torchvision:{model},weights=random", image_size=size)
    check(backbone, backbone.module, space, blocks)


def test_torchvision_weights_file_is_loaded_with_resized_positions(tmp_path: Path):
    package("torchvision")
    from torchvision.models import get_model

    torch.manual_seed(1)
    original = get_model("vit_b_16", image_size=64).eval()
    torch.nn.init.normal_(original.encoder.pos_embedding)
    torch.save(original.state_dict(), tmp_path / "vit.pth")
    backbone = load_backbone(
        "torchvision:vit_b_16", image_size=32, weights=str(tmp_path / "vit.pth")
    )
    resized = resize_positions(original.encoder.pos_embedding, 2)
    assert torch.equal(backbone.module.encoder.pos_embedding, resized)
    for name, value in original.encoder.layers[7].state_dict().items():
        assert torch.equal(backbone.module.encoder.layers[7].state_dict()[name], value), name


def save_huggingface(folder: Path, kind: str) -> Path:
    """A small random model as `save_pretrained` writes it, with its preprocessor's settings."""
    transformers = package("transformers")
    torch.manual_seed(1)
    small = {"hidden_size": 24, "num_hidden_layers": 3, "num_attention_heads": 2}
    kinds = {
        "vit": transformers.ViTConfig,
        "deit": transformers.DeiTConfig,
        "beit": transformers.BeitConfig,
        "dinov2": transformers.Dinov2Config,
        "dinov2_with_registers": transformers.Dinov2WithRegistersConfig,
    }
    if kind.startswith("dinov2"):
        config = kinds[kind](**small, image_size=42, patch_size=14)
    elif kind in kinds:
        config = kinds[kind](**small, intermediate_size=48, image_size=32, patch_size=8)
    else:
        config = transformers.ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1])
    transformers.AutoModel.from_config(config).save_pretrained(folder)
    settings = {"image_mean": [0.4, 0.5, 0.6], "image_std": [0.2, 0.3, 0.4]}
    settings |= {"size": {"height": 28, "width": 28} if kind.startswith("dinov2") else 32}
    (folder / "preprocessor_config.json").write_text(json.dumps(settings))
    return folder


@pytest.mark.parametrize(
    ("kind", "size", "space", "blocks"),
    [
        ("vit", 32, "token", 3),
        ("deit", 32, "token", 3),
        ("dinov2", 28, "token", 3),
        ("dinov2_with_registers", 28, "token", 3),
        ("beit", 32, "pixel", 0),
        ("resnet", 32, "pixel", 0),
    ],
)
def test_huggingface_feature_is_its_own(
    kind: str, size: int, space: str, blocks: int, tmp_path: Path
):
    transformers = package("transformers")
    folder = save_huggingface(tmp_path / kind, kind)
    backbone = load_backbone(f"hf:{folder}")
    assert backbone.image_size == size
    original = transformers.AutoModel.from_pretrained(folder).eval()

    def expected(pixels: torch.Tensor) -> torch.Tensor:
        output = original(pixel_values=pixels)
        if space == "pixel":
            return output.pooler_output.flatten(1)
        return output.last_hidden_state[:, 0]

    check(backbone, expected, space, blocks)


def test_huggingface_vit_takes_other_sizes_and_an_earlier_block(tmp_path: Path):
    transformers = package("transformers")
    folder = save_huggingface(tmp_path / "vit", "vit")
    backbone = load_backbone(f"hf:{folder}", image_size=48, readout=2)
    original = transformers.AutoModel.from_pretrained(folder).eval()
    images = torch.rand(2, 3, 48, 48)
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in backbone.normalisation)
    with torch.no_grad():
        output = original((images - mean) / std, interpolate_pos_encoding=True,
                          output_hidden_states=True)  # fmt: skip
        expected = original.layernorm(output.hidden_states[2])[:, 0]
        torch.testing.assert_close(backbone(images), expected, rtol=1e-4, atol=1e-5)


def test_huggingface_folder_without_settings_says_what_is_needed(tmp_path: Path):
    folder = save_huggingface(tmp_path / "vit", "vit")
    (folder / "preprocessor_config.json").unlink()
    with pytest.raises(UserError, match=r"could not be fetched .* use 'hf:FOLDER'"):
        load_huggingface("x", str(folder))


@pytest.mark.parametrize(
    ("name", "module", "extra"),
    [
        ("timm:resnet50", "timm", "timm"),
        ("torchvision:resnet50", "torchvision", "torchvision"),
        ("hf:google/vit-base-patch16-224", "transformers", "hf"),
    ],
)
def test_missing_library_names_the_extra(
    name: str, module: str, extra: str, monkeypatch: pytest.MonkeyPatch
):
    for loaded in [key for key in sys.modules if key.partition(".")[0] == module]:
        monkeypatch.delitem(sys.modules, loaded)
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(UserError, match=rf"needs the package '{module}'.*'deqcore\[{extra}\]'"):
        load_backbone(name)


def test_library_whose_own_dependency_is_missing_is_told_apart(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    for loaded in [key for key in sys.modules if key.partition(".")[0] == "timm"]:
        monkeypatch.delitem(sys.modules, loaded)
    (tmp_path / "timm.py").write_text("import absent_dependency")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(UserError, match=r"does not import .*absent_dependency"):
        load_backbone("timm:resnet50")


class FakeTimm(ModuleType):
    """As much of timm as is used before a network exists."""

    models = ModuleType("timm.models")

    @staticmethod
    def is_model(name: str) -> bool:
        return name == "resnet50"

    @staticmethod
    def list_models() -> list[str]:
        return ["resnet50"]

    @staticmethod
    def create_model(name: str, **options: object) -> None:
        raise ConnectionError("no route to host")


def test_unreachable_hub_says_how_to_bring_the_weights(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "timm", FakeTimm("timm"))
    with pytest.raises(UserError, match=r"no route to host\); fetch them .*',weights=FILE'"):
        load_backbone("timm:resnet50")


def test_misspelt_network_of_a_library_is_suggested(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "timm", FakeTimm("timm"))
    with pytest.raises(UserError, match="did you mean 'timm:resnet50'"):
        load_backbone("timm:resnet5")
    with pytest.raises(UserError, match="timm:NAME: put the name of a network"):
        load_backbone("timm:NAME")
