"""How pictures are fitted to the square, random crops, and other normalisations."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from PIL import Image

from lion_models.backbones import FrozenBackbone
from lion_models.backbones.normalisation import with_normalisation
from lion_models.base.errors import UserError
from lion_models.data import ArraySource, Geometry, decode_image, training_view
from lion_models.data.images import to_tensor
from lion_models.data.transforms import random_crop, random_flip, random_resized_crop
from lion_models.run import RunConfig
from tests.support.command import Lion


def stripes(width: int, height: int) -> Image.Image:
    """The grey level is the column's number."""
    row = torch.arange(width, dtype=torch.uint8).expand(height, width)
    return Image.fromarray(row.numpy().copy())


def test_fgvc_resizes_the_shorter_side_and_takes_the_middle():
    geometry = Geometry(1, 56, "fgvc")
    assert geometry.training_size == 64
    picture = stripes(128, 64)  # the shorter side is 64 already: nothing is resized
    evaluated, kept = to_tensor(picture, geometry), to_tensor(picture, geometry, training=True)
    assert evaluated[0, 0].tolist() == list(range(36, 92))
    assert kept[0, 0].tolist() == list(range(32, 96))
    larger = to_tensor(stripes(256, 128).rotate(90, expand=True), geometry)
    assert larger.shape == (1, 56, 56)


def test_a_long_thin_picture_needs_no_huge_copy():
    geometry = Geometry(3, 224, "fgvc")
    assert to_tensor(Image.new("L", (60_000, 2), 90), geometry).unique().tolist() == [90]


def test_224_is_cut_out_of_256():
    assert Geometry(3, 224, "fgvc").training_size == 256


@pytest.mark.parametrize("transform", ["square", "vtab"])
def test_square_keeps_the_whole_picture(transform: str):
    geometry = Geometry(1, 16, transform)
    columns = to_tensor(stripes(160, 20), geometry)[0, 0].tolist()
    assert columns[0] < 10
    assert columns[-1] > 150
    assert geometry.training_size == 16


@pytest.mark.parametrize("transform", ["square", "fgvc"])
@pytest.mark.parametrize("channels", [1, 3])
def test_arrays_and_files_are_fitted_alike(transform: str, channels: int, tmp_path: Path):
    pixels = torch.nn.functional.interpolate(
        torch.randint(0, 255, (1, 3, 5, 9), dtype=torch.float32), (40, 72), mode="bilinear"
    ).to(torch.uint8)
    Image.fromarray(pixels[0].permute(1, 2, 0).numpy()).save(tmp_path / "x.png")
    geometry = Geometry(channels, 21, transform)
    from_file = decode_image(tmp_path / "x.png", channels, 21, transform).int()
    from_array = ArraySource("x", ("a", "b"), torch.tensor([0]), pixels, geometry)
    assert (from_file - from_array.load(torch.tensor([0]))[0].int()).abs().max() <= 2
    assert from_array.load(torch.tensor([0]), training=True).shape[-1] == geometry.training_size


def test_random_crop_cuts_every_place_and_nothing_else():
    torch.manual_seed(0)
    images = torch.arange(36.0).view(1, 1, 6, 6).expand(400, 2, 6, 6)
    crops = random_crop(images, 4)
    assert crops.shape == (400, 2, 4, 4)
    corners = crops[:, 0, 0, 0]
    assert set(corners.tolist()) == {6.0 * row + column for row in range(3) for column in range(3)}
    steps = torch.arange(4.0)
    expected = corners.view(-1, 1, 1) + 6 * steps.view(4, 1) + steps
    assert torch.equal(crops[:, 1], expected)


def test_random_resized_crop_shows_a_share_of_the_picture():
    torch.manual_seed(0)
    columns = torch.linspace(-1, 1, 64).expand(500, 1, 64, 64)
    crops = random_resized_crop(columns, 32)
    assert crops.shape == (500, 1, 32, 32)
    width = (crops[:, 0, 0, -1] - crops[:, 0, 0, 0]) / 2 * 32 / 31
    assert width.min() > (0.08 * 3 / 4) ** 0.5 - 0.02
    assert width.max() <= 1.02
    assert width.min() < 0.4
    assert (crops.diff(dim=3) >= -1e-6).all()
    height = random_resized_crop(columns.transpose(2, 3), 32)[:, 0, :, 0]
    assert ((height[:, -1] - height[:, 0]) / 2 < 0.9).any()
    assert torch.allclose(random_resized_crop(torch.full((9, 3, 8, 8), 0.3), 4), torch.tensor(0.3))


def test_random_flip_mirrors_about_half():
    torch.manual_seed(0)
    images = torch.arange(3.0).expand(200, 1, 2, 3)
    flipped = random_flip(images)[:, 0, 0, 0] == 2
    assert 70 < int(flipped.sum()) < 130
    assert torch.equal(random_flip(images)[:, 0, 0, 1], torch.ones(200))


def test_view_is_fixed_only_without_randomness_and_repeats_with_the_seed():
    assert training_view("square", "none", 8) is None
    assert training_view("vtab", "none", 8) is None
    for transform, augment in (("fgvc", "none"), ("fgvc-resized", "affine"), ("square", "affine")):
        view = training_view(transform, augment, 8)
        assert view is not None
        images = torch.rand(5, 3, *[Geometry(3, 8, transform).training_size] * 2)
        torch.manual_seed(1)
        first = view(images)
        torch.manual_seed(1)
        assert first.shape == (5, 3, 8, 8)
        assert torch.equal(first, view(images))
        assert not torch.equal(first, view(images))


def test_images_without_the_margin_of_crops_are_refused():
    view = training_view("fgvc", "none", 56)
    assert view is not None
    with pytest.raises(ValueError, match="expected training images of 64 x 64, got"):
        view(torch.rand(2, 3, 56, 56))


def test_protocols_bring_their_own_augmentation():
    assert RunConfig.of("digits", "lion").recipe.augment == "affine"
    assert RunConfig.of("digits", "lion", transform="vtab").recipe.augment == "none"
    chosen = RunConfig.of("digits", "lion", transform="fgvc", augment="affine")
    assert chosen.recipe.augment == "affine"


@pytest.mark.parametrize(
    ("name", "mean", "std"),
    [("half", 0.5, 0.5), ("imagenet", (0.485 + 0.456 + 0.406) / 3, (0.229 + 0.224 + 0.225) / 3)],
)
def test_other_normalisation_reaches_the_frozen_network(
    backbone: FrozenBackbone, name: str, mean: float, std: float
):
    module = backbone.module
    own_mean, own_std = backbone.normalisation
    images = torch.rand(4, 1, 12, 12)
    other = with_normalisation(backbone, name)
    wanted = module.patch_embed((images - mean) / std)
    given = module.patch_embed((images - own_mean) / own_std)
    assert not torch.allclose(wanted, given, atol=1e-3)
    position = backbone.embed(images)[:, 1:] - given
    assert torch.allclose(other.embed(images)[:, 1:] - position, wanted, atol=1e-5)
    assert other.normalisation == (pytest.approx(mean), pytest.approx(std))
    assert backbone.normalisation == (own_mean, own_std)
    assert other.fingerprint == backbone.fingerprint


def test_imagenet_normalisation_acts_on_each_channel():
    images = torch.rand(2, 3, 4, 4)
    colour = FrozenBackbone(
        torch.nn.Identity(), embed=lambda x: (x - 0.25) / 2, encode=lambda x: x, name="x",
        channels=3, image_size=4, token_dim=4, feature_dim=4, normalisation=(0.25, 2.0),
    )  # fmt: skip
    seen = with_normalisation(colour, "imagenet").embed(images)
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    assert torch.allclose(seen, (images - mean.view(3, 1, 1)) / std.view(3, 1, 1), atol=1e-5)
    assert with_normalisation(colour, "backbone") is colour
    with pytest.raises(UserError, match="`normalisation`: expected one of backbone, half, imagen"):
        with_normalisation(colour, "imagnet")


def test_a_run_keeps_its_transform_and_normalisation_to_predict(
    lion: Lion, image_folder: Path, backbone_file: Path, tmp_path: Path
):
    done = lion("train", "--data", image_folder, "--backbone", backbone_file, "--shots", 3,
                "--validation-shots", 2, "--epochs", 2, "--hidden", 4, "--transform", "fgvc",
                "--normalisation", "half", "--runs", tmp_path, "--name", "x")  # fmt: skip
    assert done.code == 0, done.err
    evaluated = lion("eval", tmp_path / "x", "--data", image_folder)
    assert "over 36 images" in evaluated.out
    wide = tmp_path / "wide.png"
    Image.new("L", (60, 20), 128).save(wide)
    middle = tmp_path / "middle.png"
    Image.new("L", (20, 20), 128).save(middle)
    picture = Image.open(wide)
    picture.paste(0, (0, 0, 20, 20))
    picture.save(wide)
    rows = [lion("predict", tmp_path / "x", path, "--format", "csv").out.split(",", 3)[-1]
            for path in (wide, middle)]  # fmt: skip
    assert rows[0].split(",")[-3:] == rows[1].split(",")[-3:]
