"""Large JPEG files decoded at a part of their size: as good, and the same wherever they go."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from lion_models.data.images import decode_file
from lion_models.data.transforms import DRAFT_TIMES, Geometry
from lion_models.run import load_run
from lion_models.run.predict import predict
from tests.support.command import Lion
from tests.support.pictures import followed


def photo(path: Path, width: int, height: int, orientation: int = 1, mode: str = "RGB") -> Path:
    """Smooth colours with edges and grain, as photographs have."""
    rng = np.random.default_rng(0)
    small = Image.fromarray(rng.integers(0, 256, (9, 12, 3), dtype=np.uint8))
    pixels = np.asarray(small.resize((width, height), Image.Resampling.BICUBIC), np.float64)
    pixels[height // 3 :, width // 2 :] *= 0.5
    pixels += rng.normal(0, 4, pixels.shape)
    exif = Image.Exif()
    exif[274] = orientation
    image = Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8)).convert(mode)
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path, quality=90, exif=exif)
    return path


@pytest.mark.parametrize("transform", ["square", "fgvc"])
@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
def test_a_large_jpeg_is_hardly_another_picture(transform: str, mode: str, tmp_path: Path):
    path = photo(tmp_path / "a.jpg", 600, 400, orientation=6, mode=mode)
    for channels in (1, 3):
        whole, drawn = (
            decode_file(path, Geometry(channels, 28, transform, draft=draft)).float()
            for draft in (False, True)
        )
        assert whole.shape == drawn.shape
        assert not torch.equal(whole, drawn)
        assert (whole - drawn).abs().mean() < 2.55  # a hundredth; its colours are no photograph's


def test_no_side_is_decoded_below_twice_what_is_shown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    sizes = []
    resize = Image.Image.resize

    def spy(image: Image.Image, size: tuple[int, int], *more: object, **other: object) -> object:
        sizes.append(image.size)
        return resize(image, size, *more, **other)

    shapes = [(900, 600), (2000, 113), (113, 111), (230, 224)]
    paths = [photo(tmp_path / f"{w}.jpg", w, h) for w, h in shapes]
    monkeypatch.setattr(Image.Image, "resize", spy)
    for path in paths:
        decode_file(path, Geometry(3, 28, draft=True))
    assert sizes == [(113, 75), (1000, 57), (113, 111), (58, 56)]
    assert min(min(size) for size in sizes) >= DRAFT_TIMES * 28


def test_small_and_other_files_are_read_bit_for_bit_as_ever(tmp_path: Path):
    small = photo(tmp_path / "a.jpg", 100, 60)
    other = photo(tmp_path / "a.png", 900, 600)
    for path in (small, other):
        plain, drawn = (decode_file(path, Geometry(3, 32, draft=draft)) for draft in (False, True))
        assert torch.equal(plain, drawn)


def test_a_run_keeps_to_it_and_its_export_says_so(lion: Lion, backbone_file: Path, tmp_path: Path):
    data = tmp_path / "data"
    for name, width in (("wide", 300), ("square", 200)):
        for index in range(4):
            photo(data / name / f"{index}.jpg", width + index, 200)
    shared = ("train", "--data", data, "--backbone", backbone_file, "--method", "linear",
              "--epochs", 1, "--no-test", "--runs", tmp_path)  # fmt: skip
    assert lion(*shared, "--name", "plain").code == 0
    done = lion(*shared, "--name", "draft", "--draft")
    assert done.code == 0, done.err
    assert "draft" not in json.loads((tmp_path / "plain" / "config.json").read_text())
    run = load_run(tmp_path / "draft")
    assert run.geometry == Geometry(1, 12, draft=True)
    exported = lion("export", tmp_path / "draft")
    assert exported.code == 0, exported.err
    how = json.loads((tmp_path / "draft" / "model.pt2.json").read_text())["preprocessing"]
    assert how["draft"] == [24, 24]
    path = data / "wide" / "0.jpg"
    pixels = torch.from_numpy(followed(path, how))
    assert torch.equal((pixels[0] * 255).round().byte(), decode_file(path, run.geometry))
    [answer] = predict(run, [path])
    with torch.no_grad():
        expected = run.model(pixels).softmax(1)[0]
    torch.testing.assert_close(torch.tensor(answer.probabilities), expected)
