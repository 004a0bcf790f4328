"""`lion explain` finds what decides, `lion list` what there is; a signal says how to go on."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
import torch
from PIL import Image

from lion_models.backbones import FrozenBackbone
from lion_models.cli.list import age
from lion_models.cli.progress import ProgressBars
from lion_models.methods.linear import LinearProbe
from lion_models.run.explain import saliency
from tests.support.command import Lion


@pytest.mark.drawn
def test_a_picture_of_the_gradient_is_written(lion: Lion, trained: Path, tmp_path: Path):
    Image.effect_noise((30, 20), 60).save(tmp_path / "photo.png")
    out = tmp_path / "why.png"
    done = lion("explain", trained, tmp_path / "photo.png", "--output", out)
    assert done.code == 0, done.err
    assert "probability" in done.out
    assert Image.open(out).size[0] > 500
    other = lion("explain", trained, tmp_path / "photo.png", "--output", out, "--class", "light")
    assert other.out.startswith("light, probability")
    wrong = lion("explain", trained, tmp_path / "photo.png", "--class", "ligth")
    assert "did you mean 'light'?" in wrong.err
    same = lion("explain", trained, tmp_path / "photo.png", "--output", tmp_path / "photo.png")
    assert "is the picture itself" in same.err


def test_saliency_lies_where_the_answer_does(frozen: FrozenBackbone):
    """A backbone that sees one corner alone."""

    def embed(images: torch.Tensor) -> torch.Tensor:
        corner = images[:, :, 6:, 6:].flatten(1)
        return corner[:, None, :].repeat(1, 1, 1)

    frozen.embed = embed
    frozen.encode = lambda tokens: tokens[:, 0]
    frozen.feature_dim = 36
    model = LinearProbe(frozen, 2).eval()
    with torch.no_grad():
        model.head.weight.normal_()
    strength = saliency(model, torch.rand(1, 12, 12), 1)
    assert strength.shape == (12, 12)
    assert strength.max() == 1
    assert strength[:5, :5].max() == 0
    assert strength[7:, 7:].min() > 0


def test_runs_are_listed_newest_first_with_their_figures(
    lion: Lion, trained: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("COLUMNS", "120")
    other = trained.parent / "not-a-run"
    other.mkdir()
    (other / "config.json").write_text('{"someone": "else"}')
    (trained.parent / "study/one").mkdir(parents=True)
    (trained.parent / "study/one/config.json").write_text((trained / "config.json").read_text())
    done = lion("list", "--runs", trained.parent)
    assert done.code == 0, done.err
    assert "finished" in done.out
    assert "0 of 3 epochs" in done.out
    assert "lion" in done.out
    assert "not-a-run" not in done.out
    assert "does not exist" in lion("list", "--runs", trained / "none").err
    assert age(30) == "30 seconds"
    assert age(7200) == "2 hours"


def test_a_terminated_run_says_how_to_go_on(
    lion: Lion, image_folder: Path, backbone_file: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
):  # fmt: skip
    monkeypatch.setattr(ProgressBars, "update", lambda *given: os.kill(os.getpid(), signal.SIGTERM))
    before = signal.getsignal(signal.SIGTERM)
    done = lion("train", "--data", image_folder, "--backbone", backbone_file, "--shots", 4,
                "--validation-shots", 3, "--epochs", 3, "--method", "linear",
                "--runs", tmp_path, "--name", "ended")  # fmt: skip
    assert done.code == 143
    assert "train with --resume" in done.err
    assert signal.getsignal(signal.SIGTERM) is before
    monkeypatch.undo()
    again = lion("train", "--resume", "--runs", tmp_path, "--name", "ended")
    assert again.code == 0, again.err


@pytest.mark.parametrize(
    ("device", "message"),
    [
        ("cuda:x", "expected cpu, cuda, cuda:1 or mps"),
        ("cpu:1", "expected cpu, cuda, cuda:1 or mps"),
        ("cuda:99", "--device cuda:99: this"),
    ],
)
def test_devices_are_named_and_checked(lion: Lion, device: str, message: str, tmp_path: Path):
    done = lion("train", "--data", "digits", "--device", device, "--runs", tmp_path)
    assert done.code == 2
    assert message in done.err
