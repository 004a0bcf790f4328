"""A small random backbone, an image folder, and a way to call the command line."""

from __future__ import annotations

import io
import shutil
from pathlib import Path

import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image

from lion_models.backbones import FrozenBackbone, freeze_vit, load_backbone
from lion_models.backbones.tiny_vit import save_vit
from lion_models.data import Task, make_task, open_source
from lion_models.run import RunConfig
from tests.support.command import CLASSES, Lion, call
from tests.support.small import small_vit


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is read from or written to the user's cache."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.getbasetemp() / "cache"))
    monkeypatch.delenv("LION_DATA", raising=False)


def _blank() -> bytes:
    content = io.BytesIO()
    Image.new("L", (8, 8), 255).save(content, "PNG")
    return content.getvalue()


@pytest.fixture(autouse=True)
def blank_pictures(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pictures are laid out and then blank, but where a test or its file is marked `drawn`.

    To draw a run's takes longer than all else that a test does of it.
    """
    if request.node.get_closest_marker("drawn") is None:
        blank = _blank()
        monkeypatch.setattr(Figure, "savefig", lambda _, file, **how: file.write(blank))


@pytest.fixture
def backbone() -> FrozenBackbone:
    return freeze_vit(small_vit(), "small")


@pytest.fixture(scope="session")
def backbone_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("backbone") / "small.safetensors"
    save_vit(small_vit(), path, {"data": "none"}, CLASSES)
    return path


@pytest.fixture(scope="session")
def image_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three classes of grey noise around three means, 12 images each, in different formats."""
    folder = tmp_path_factory.mktemp("images")
    generator = torch.Generator().manual_seed(0)
    for name, mean in zip(CLASSES, (60, 190, 125), strict=True):
        (folder / name).mkdir()
        for index in range(12):
            noise = torch.randint(-20, 20, (16, 16), generator=generator) + mean
            image = Image.fromarray(noise.to(torch.uint8).numpy())
            suffix = ("png", "jpg", "bmp")[index % 3]
            image.convert(("L", "RGB")[index % 2]).save(folder / name / f"{index}.{suffix}")
    return folder


@pytest.fixture
def lion() -> Lion:
    """Call the `lion` command: `lion("train", "--data", path)`."""
    return call


@pytest.fixture(scope="session")
def finished_run(
    image_folder: Path, backbone_file: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    runs = tmp_path_factory.mktemp("runs")
    done = call("train", "--data", image_folder, "--backbone", backbone_file, "--shots", 4,
                "--validation-shots", 3, "--epochs", 3, "--hidden", 4, "--lr", 0.02,
                "--runs", runs, "--name", "finished")  # fmt: skip
    assert done.code == 0, done.err
    return runs / "finished"


@pytest.fixture
def trained(finished_run: Path, tmp_path: Path) -> Path:
    """The folder of a finished short LION run, which the test may damage."""
    return Path(shutil.copytree(finished_run, tmp_path / "runs" / "finished"))


@pytest.fixture
def frozen(backbone_file: Path) -> FrozenBackbone:
    return load_backbone(str(backbone_file))


@pytest.fixture
def task(config: RunConfig) -> Task:
    """The images that the test's own `config` names."""
    return make_task(open_source(config.data.data, 1, 12), config.training.seed, 4, 3)


@pytest.fixture
def config(image_folder: Path, backbone_file: Path) -> RunConfig:
    return RunConfig.of(
        data=str(image_folder),
        backbone=str(backbone_file),
        shots=4,
        validation_shots=3,
        epochs=3,
        batch=7,
        hidden=4,
        lr=0.02,
    )
