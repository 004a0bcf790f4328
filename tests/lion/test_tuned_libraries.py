"""`tune` around networks that the caller has loaded, and in the trainers of other libraries."""

from __future__ import annotations

import runpy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lion_models import LionConfig, TunedModel, VPTDeepConfig, load_backbone, tune
from lion_models.base.errors import UserError
from tests.lion.test_backbones_libraries import save_huggingface
from tests.support.libraries import package

EXAMPLES = Path(__file__).parents[2] / "examples"


def comes_back(model: TunedModel, network: nn.Module, folder: Path) -> None:
    """A model around a network is kept without it, and comes back with it alone."""
    size = model.backbone.image_size
    images = torch.rand(2, 3, size, size)
    with torch.no_grad():
        for parameter in model.trainable_parameters():
            parameter.normal_(std=0.1)
        expected = model.eval()(images)
    model.save_pretrained(folder)
    with pytest.raises(UserError, match=r"was tuned around a network that was given, 'given:"):
        TunedModel.from_pretrained(folder)
    with torch.no_grad():
        assert torch.equal(TunedModel.from_pretrained(folder, network)(images), expected)


def keys_and_modes(network: nn.Module) -> tuple[list[str], list[str]]:
    return list(network.state_dict()), [name for name, _ in network.named_modules()]


@pytest.mark.parametrize(
    ("model", "size", "options", "method"),
    [
        ("vit_tiny_patch16_224", None, {"img_size": 32}, VPTDeepConfig(prompts=2)),
        ("deit_tiny_distilled_patch16_224", None, {"img_size": 32}, "lora"),
        ("swin_tiny_patch4_window7_224", None, {"img_size": 56}, LionConfig(hidden=2)),
        ("resnet18", 32, {}, LionConfig(hidden=2)),
    ],
)
def test_network_of_timm_is_tuned_as_it_is(
    model: str, size: int | None, options: dict[str, Any], method: Any, tmp_path: Path
):
    timm = package("timm")
    network = timm.create_model(model, num_classes=7, **options)
    before = keys_and_modes(network)
    tuned = tune(network, method, 3, image_size=size)
    assert keys_and_modes(network) == before
    assert tuned.backbone.image_size == (size or options["img_size"])
    named = load_backbone(f"timm:{model},weights=random", image_size=tuned.backbone.image_size)
    assert tuned.backbone.normalisation == named.normalisation
    assert list(tuned.backbone.module.state_dict()) == list(named.module.state_dict())
    pixels = torch.rand(2, 3, tuned.backbone.image_size, tuned.backbone.image_size)
    mean, std = (torch.tensor(value).view(3, 1, 1) for value in tuned.backbone.normalisation)
    with torch.no_grad():
        own = network.forward_features((pixels - mean) / std)
        feature = network.forward_head(own, pre_logits=True)
        torch.testing.assert_close(tuned.backbone(pixels), feature)
    comes_back(tuned, network, tmp_path)


@pytest.mark.parametrize(
    ("model", "options", "size"),
    [("vit_b_16", {"image_size": 32}, None), ("swin_t", {}, 64), ("resnet18", {}, 64)],
)
def test_network_of_torchvision_is_tuned_as_it_is(
    model: str, options: dict[str, Any], size: int | None, tmp_path: Path
):
    package("torchvision")
    from torchvision.models import get_model

    network = get_model(model, weights=None, num_classes=7, **options).eval()
    before = keys_and_modes(network)
    tuned = tune(network, LionConfig(hidden=2), 3, image_size=size)
    assert keys_and_modes(network) == before
    side = size or options["image_size"]
    pixels = torch.rand(2, 3, side, side)
    assert network(pixels).shape == (2, 7)  # its own head is there
    comes_back(tuned, network, tmp_path)


@pytest.mark.parametrize("kind", ["vit", "dinov2", "resnet"])
@pytest.mark.parametrize("head", [False, True])
def test_model_of_transformers_is_tuned_as_it_is(kind: str, head: bool, tmp_path: Path):
    transformers = package("transformers")
    folder = save_huggingface(tmp_path / kind, kind)
    loader = transformers.AutoModelForImageClassification if head else transformers.AutoModel
    network = loader.from_pretrained(folder)
    before = keys_and_modes(network)
    with pytest.raises(UserError, match=r"does not know it; give its image processor's"):
        tune(network, "lion", 3)
    normalisation = ((0.4, 0.5, 0.6), (0.2, 0.3, 0.4))
    size = 28 if kind == "dinov2" else 32
    tuned = tune(network, LionConfig(hidden=2), 3, image_size=size, normalisation=normalisation)
    assert keys_and_modes(network) == before
    named = load_backbone(f"hf:{folder}")
    assert tuned.backbone.fingerprint == named.fingerprint
    assert tuned.backbone.space == named.space
    pixels = torch.rand(2, 3, size, size)
    with torch.no_grad():
        torch.testing.assert_close(tuned.backbone(pixels), named(pixels))
    comes_back(tuned, network, tmp_path / "saved")


def test_images_of_another_size_than_the_networks_are_named():
    timm = package("timm")
    network = timm.create_model("vit_tiny_patch16_224", img_size=32)
    with pytest.raises(UserError, match=r"does not take images \(1, 3, 48, 48\) .*`image_size`"):
        tune(network, "lion", 3, image_size=48)


def run_example(name: str, *packages: str) -> dict[str, Any]:
    for each in packages:
        package(each)
    return runpy.run_path(str(EXAMPLES / name))


def check_example(names: dict[str, Any]) -> None:
    """It has learned, and what it saved gives the same answers."""
    model, loaded = names["model"], names["loaded"]
    images: Tensor = names["validation_images"]
    with torch.no_grad():
        assert torch.equal(model.cpu().eval()(images), loaded(images))
    assert names["accuracy"] > 0.6  # chance is 0.1
    assert not any(module.training for module in model.backbone.modules())


def test_plain_loop_learns():
    check_example(run_example("tune_plain_loop.py"))


def test_trainer_of_hugging_face_learns():
    names = run_example("tune_hf_trainer.py", "transformers", "accelerate")
    check_example(names)
    assert names["checkpoint_bytes"] < 100_000  # the backbone has 1.2 MB


def test_lightning_learns():
    check_example(run_example("tune_lightning.py", "lightning"))
