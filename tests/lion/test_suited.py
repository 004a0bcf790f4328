"""A run says where its backbone does not see what its classes differ in."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest
import torch

from lion_models.backbones import FrozenBackbone
from lion_models.data import ArraySource, Source, open_source
from lion_models.run.suited import BackboneWarning, separated, warn_unsuited
from tests.support.command import Lion
from tests.support.pictures import apples


def said(source: Source, backbone: FrozenBackbone) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        warn_unsuited(source, torch.arange(len(source)), backbone)
    return [str(one.message) for one in caught]


def test_colour_that_a_grey_backbone_does_not_see_is_told(
    lion: Lion, backbone_file: Path, tmp_path: Path
):
    with pytest.warns(BackboneWarning) as caught:
        done = lion("train", "--data", apples(tmp_path / "apples"), "--backbone", backbone_file,
                    "--epochs", 1, "--method", "linear", "--runs", tmp_path / "runs")  # fmt: skip
    assert done.code == 0, done.err
    [text] = [str(one.message) for one in caught if one.category is BackboneWarning]
    assert "sees 12 x 12 grey pixels, and colour tells these classes apart" in text
    assert "a picture names 100% of 12" in text
    assert "'lion backbone prepare efficientnet-lite0' fetches it" in text


def test_large_pictures_before_a_small_backbone_are_told(frozen: FrozenBackbone, tmp_path: Path):
    source = open_source(str(apples(tmp_path, side=100)), 1, 12)
    [text] = said(source, frozen)
    assert "the pictures are large (shorter side 100 pixels)" in text


def test_brightness_and_grey_pictures_are_no_matter(
    frozen: FrozenBackbone, image_folder: Path, tmp_path: Path
):
    assert said(open_source(str(image_folder), 1, 12), frozen) == []
    generator = torch.Generator().manual_seed(0)
    noise = torch.randint(0, 256, (24, 3, 12, 12), dtype=torch.uint8, generator=generator)
    assert said(ArraySource("noise", ("a", "b"), torch.arange(24) % 2, noise), frozen) == []
    assert said(ArraySource("grey", ("a", "b"), torch.arange(24) % 2, noise[:, :1]), frozen) == []
    frozen.channels, frozen.image_size = 3, 224
    assert said(open_source(str(apples(tmp_path, side=900)), 3, 224), frozen) == []


def test_colours_of_one_grey_are_told_apart_by_colour(frozen: FrozenBackbone):
    colours = torch.tensor([[200, 60, 60], [60, 131, 60]])  # both are 102 in grey
    generator = torch.Generator().manual_seed(0)
    noise = torch.randint(-9, 10, (24, 3, 12, 12), generator=generator)
    labels = torch.arange(24) % 2
    images = (colours[labels][:, :, None, None] + noise).to(torch.uint8)
    [text] = said(ArraySource("apples", ("red", "green"), labels, images), frozen)
    assert "colour tells these classes apart" in text


def test_separation_is_that_of_images_left_out():
    labels = torch.arange(40) % 2
    features = torch.randn(40, 3, generator=torch.Generator().manual_seed(1))
    assert separated(features, labels) < 0.65
    middle = torch.tensor([[0.0], [1.0], [2.0]]).repeat(10, 1) + 0.1 * torch.randn(30, 1)
    assert separated(middle, torch.arange(30) % 3) == pytest.approx(1.0)


def test_looking_draws_no_random_number(frozen: FrozenBackbone, tmp_path: Path):
    source = open_source(str(apples(tmp_path, side=100)), 1, 12)
    before = torch.get_rng_state()
    with pytest.warns(BackboneWarning):
        warn_unsuited(source, torch.arange(len(source)), frozen)
    assert torch.equal(before, torch.get_rng_state())
