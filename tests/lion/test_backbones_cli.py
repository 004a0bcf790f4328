"""What the command line says of backbones, and the demo on a real one."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from lion_models.backbones import FrozenBackbone, freeze_vit
from lion_models.cli import demo as cli
from lion_models.methods.linear import LinearProbe
from lion_models.run.trainer import freeze_images, score
from tests.support.command import Lion
from tests.support.small import small_vit


def test_info_names_a_backbones_size_fingerprint_licence_and_source(
    lion: Lion, backbone_file: Path
):
    backbone = freeze_vit(small_vit(), "small")
    shown = "".join(lion("info", "--backbone", backbone_file).out.split())
    count = sum(parameter.numel() for parameter in backbone.parameters())
    for part in (f"│{count}│", backbone.fingerprint[:24], "unknown", "12x12grey", "width8"):
        assert part in shown, part
    assert "Apache-2.0" in lion("info").out


def test_vit_demo_compares_three_methods_on_few_images(
    lion: Lion,
    backbone_file: Path,
    image_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
):
    assert cli.VIT_DEMO["backbone"].startswith("vit-s14-focus,")
    small = cli.VIT_DEMO | {"backbone": str(backbone_file), "shots": 3, "epochs": 1, "batch": 4}
    monkeypatch.setattr(cli, "VIT_DEMO", small)
    done = lion("demo", "--vit", "--data", image_folder, "--runs", tmp_path)
    assert done.code == 0, done.err
    result = json.loads((tmp_path / "demo-vit" / "compare.json").read_text())
    assert [row["method"] for row in result["summary"]] == ["linear", "vpt-deep", "lion"]
    assert (tmp_path / "demo-vit" / "compare.png").is_file()


@pytest.mark.parametrize(("size", "batch"), [(28, 500), (112, 334), (224, 83), (5000, 1)])
def test_large_images_are_encoded_a_few_at_a_time(size: int, batch: int):
    seen = []

    def encode(pixels: torch.Tensor) -> torch.Tensor:
        seen.append(len(pixels))
        return pixels.flatten(1).mean(1, keepdim=True)

    backbone = FrozenBackbone(
        torch.nn.Identity(),
        embed=lambda images: images[:, :, :1, :1],
        encode=encode,
        name="x",
        channels=1,
        image_size=size,
        token_dim=1,
        feature_dim=1,
        space="pixel",
    )
    assert backbone.evaluation_batch == batch
    if size != 224:
        return
    model, images = LinearProbe(backbone, 2), torch.zeros(100, 1, 2, 2, dtype=torch.uint8)
    features = freeze_images(model, images)
    assert seen == [83, 17]
    assert score(model, features, torch.zeros(100, dtype=torch.long))["loss"] > 0
