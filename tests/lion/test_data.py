"""Image decoding, sources, splits and the sealed test set."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from lion_models.base.errors import UserError
from lion_models.data import SealedTest, decode_image, make_task, open_source, split_rows
from lion_models.data.augment import jitter
from lion_models.data.idx import read_idx, read_idx_pair
from lion_models.data.sources import ArraySource
from tests.support.small import idx_bytes


def gradient_image(mode: str) -> Image.Image:
    """Left half black, right half white, in any mode."""
    grey = np.zeros((10, 10), dtype=np.uint8)
    grey[:, 5:] = 255
    if mode == "I;16":
        return Image.fromarray(grey.astype(np.uint16) * 257)
    if mode == "F":
        return Image.fromarray(grey.astype(np.float32) / 255)
    return Image.fromarray(grey).convert(mode)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize(
    ("mode", "suffix"),
    [("1", "png"), ("L", "png"), ("LA", "png"), ("P", "png"), ("RGB", "png"), ("RGBA", "png"),
     ("I;16", "png"), ("I;16", "tiff"), ("F", "tiff"), ("CMYK", "jpg")],
)  # fmt: skip
def test_every_mode_gives_the_same_picture(mode: str, suffix: str, channels: int, tmp_path: Path):
    path = tmp_path / f"image.{suffix}"
    gradient_image(mode).save(path)
    pixels = decode_image(path, channels, 10)
    assert pixels.shape == (channels, 10, 10)
    assert pixels.dtype == torch.uint8
    tolerance = 12 if suffix == "jpg" else 0
    assert pixels[:, :, :5].max() <= tolerance
    assert pixels[:, :, 5:].min() >= 255 - tolerance


def test_transparency_lies_on_white(tmp_path: Path):
    Image.new("RGBA", (4, 4), (0, 0, 0, 0)).save(tmp_path / "clear.png")
    assert (decode_image(tmp_path / "clear.png", 1, 4) == 255).all()


@pytest.mark.parametrize("channels", [1, 3])
def test_the_transparent_grey_of_a_16_bit_picture_lies_on_white(tmp_path: Path, channels: int):
    values = np.full((3, 3), 1000, dtype=np.uint16)
    values[0], values[1] = 20000, 20001  # one value in 8 bits, of which one alone is transparent
    Image.fromarray(values).save(tmp_path / "deep.png", transparency=20000)
    with Image.open(tmp_path / "deep.png") as image:
        assert image.mode.startswith("I")
        assert image.info["transparency"] == 20000
    pixels = decode_image(tmp_path / "deep.png", channels, 3)
    assert pixels[:, :, 0].tolist() == [[255, 78, 4]] * channels


def test_exif_orientation_is_applied(tmp_path: Path):
    image = gradient_image("L")
    exif = image.getexif()
    exif[0x0112] = 6  # rotate a quarter clockwise to view
    image.save(tmp_path / "turned.png", exif=exif)
    pixels = decode_image(tmp_path / "turned.png", 1, 10)[0]
    assert (pixels[:5] == 0).all()
    assert (pixels[5:] == 255).all()


def test_any_size_is_resized_without_cropping(tmp_path: Path):
    wide = Image.new("L", (40, 10), 0)
    wide.paste(255, (36, 0, 40, 10))
    wide.save(tmp_path / "wide.png")
    pixels = decode_image(tmp_path / "wide.png", 1, 10)[0]
    assert pixels[:, -1].min() > 200
    assert pixels[:, :7].max() == 0


@pytest.mark.parametrize(
    ("content", "named"), [("hello", "5 bytes of something else"), ("", "an empty file")]
)
def test_image_that_is_not_an_image_is_named(tmp_path: Path, content: str, named: str):
    (tmp_path / "fake.png").write_text(content)
    with pytest.raises(UserError, match=rf"fake\.png: not an image \({named}\)"):
        decode_image(tmp_path / "fake.png", 1, 8)


def test_image_cut_in_half_is_named(tmp_path: Path):
    noise = torch.randint(0, 255, (64, 64), dtype=torch.uint8).numpy()
    for suffix in ("png", "jpg"):
        path = tmp_path / f"cut.{suffix}"
        Image.fromarray(noise).save(path)
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
        with pytest.raises(UserError, match=rf"cut\.{suffix}: damaged image"):
            decode_image(path, 1, 8)


def test_packaged_sets_have_their_known_sizes():
    digits, mnist = open_source("digits", 1, 28), open_source("mnist5k", 3, 28)
    assert len(digits) == 1797
    assert torch.bincount(mnist.labels).tolist() == [500] * 10
    assert mnist.load(torch.tensor([0, 4999])).shape == (2, 3, 28, 28)
    assert digits.load(torch.arange(50)).max() == 255


def test_folder_keeps_class_names_and_counts(image_folder: Path):
    source = open_source(str(image_folder), 1, 12)
    assert source.classes == ("dark", "light", "middle")
    assert torch.bincount(source.labels).tolist() == [12, 12, 12]
    images = source.load(torch.arange(36)).float().flatten(1).mean(1)
    means = [images[source.labels == label].mean().item() for label in range(3)]
    assert means == pytest.approx([60, 190, 125], abs=3)


def test_bad_data_arguments_are_named(tmp_path: Path):
    with pytest.raises(UserError, match="did you mean 'mnist5k'"):
        open_source("mnist5", 1, 28)
    with pytest.raises(UserError, match="neither a folder nor one of cifar10, digits, emoji, fash"):
        open_source("/no/such/folder", 1, 28)
    with pytest.raises(UserError, match="holds no sub-folder"):
        open_source(str(tmp_path), 1, 28)
    (tmp_path / "only").mkdir()
    with pytest.raises(UserError, match=r"one class \('only'\); expected at least two"):
        open_source(str(tmp_path), 1, 28)
    (tmp_path / "second").mkdir()
    with pytest.raises(UserError, match=r"class folder .*only holds no image"):
        open_source(str(tmp_path), 1, 28)
    (tmp_path / "file.txt").write_text("")
    with pytest.raises(UserError, match="is a file; expected a folder"):
        open_source(str(tmp_path / "file.txt"), 1, 28)


labellings = st.lists(st.integers(8, 30), min_size=2, max_size=5)


@given(sizes=labellings, seed=st.integers(0, 10**6), shots=st.sampled_from([1, 2, None]))
def test_splits_are_disjoint_stratified_and_repeatable(
    sizes: list[int], seed: int, shots: int | None
):
    order = torch.randperm(sum(sizes), generator=torch.Generator().manual_seed(seed))
    labels = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes))[order]
    classes = tuple(map(str, range(len(sizes))))
    split = split_rows(labels, classes, seed, shots)
    rows = torch.cat([split.train, split.validation, split.test])
    assert len(rows.unique()) == len(rows)
    if shots is None:
        assert len(rows) == len(labels)
    else:
        assert torch.bincount(labels[split.train]).tolist() == [shots] * len(sizes)
        assert torch.bincount(labels[split.validation]).tolist() == [shots] * len(sizes)
    assert torch.bincount(labels[split.test]).tolist() == [round(0.3 * size) for size in sizes]
    again = split_rows(labels, classes, seed, shots)
    for part in ("train", "validation", "test"):
        assert torch.equal(getattr(split, part), getattr(again, part))


@given(seeds=st.tuples(st.integers(0, 1000), st.integers(0, 1000)))
def test_no_seed_ever_trains_on_another_seed_s_test_images(seeds: tuple[int, int]):
    labels = torch.arange(60) % 3
    first, second = (split_rows(labels, ("a", "b", "c"), seed, 5) for seed in seeds)
    assert torch.equal(first.test, second.test)
    used = torch.cat([first.train, first.validation, second.train, second.validation])
    assert not torch.isin(used, first.test).any()


def test_fewer_shots_are_a_subset_of_more():
    labels = torch.arange(100) % 2
    few = split_rows(labels, ("a", "b"), 1, 3)
    many = split_rows(labels, ("a", "b"), 1, 10)
    assert torch.isin(few.train, many.train).all()


def test_more_shots_than_images_is_named():
    with pytest.raises(UserError, match="class 'b' has 10 images, of which 3 are kept for the te"):
        split_rows(torch.tensor([0] * 90 + [1] * 10), ("a", "b"), 0, 7)


def tiny_source() -> ArraySource:
    images = torch.arange(40, dtype=torch.uint8).view(40, 1, 1, 1)
    return ArraySource("tiny", ("even", "odd"), torch.arange(40) % 2, images)


def test_task_holds_no_test_images():
    task = make_task(tiny_source(), seed=0, shots=4)
    test = split_rows(tiny_source().labels, ("even", "odd"), 0, 4).test
    held = torch.cat([task.train_images, task.validation_images]).flatten()
    assert not torch.isin(held.long(), test).any()


def test_test_set_is_read_once(tmp_path: Path):
    sealed, calls = SealedTest(tiny_source(), torch.arange(10)), []

    def score(images: torch.Tensor, labels: torch.Tensor) -> dict[str, float]:
        calls.append(len(images))
        return {"accuracy": float((labels == 0).sum())}

    ledger = tmp_path / "test.json"
    first = sealed.measure(ledger, "weights-a", score, chunk=4)
    assert first == {"accuracy": 0.5, "images": 10, "weights": "weights-a"}
    assert calls == [4, 4, 2]
    assert sealed.measure(ledger, "weights-a", score) == json.loads(ledger.read_text())
    assert calls == [4, 4, 2]
    with pytest.raises(UserError, match="test set was read with other weights already"):
        sealed.measure(ledger, "weights-b", score)
    assert calls == [4, 4, 2]


def test_idx_files_are_read_plain_and_compressed(tmp_path: Path):
    images, labels = np.arange(24).reshape(2, 3, 4), np.array([7, 1])
    (tmp_path / "train-images-idx3-ubyte").write_bytes(idx_bytes(images))
    (tmp_path / "train-labels-idx1-ubyte.gz").write_bytes(gzip.compress(idx_bytes(labels)))
    pixels, classes = read_idx_pair(tmp_path, "train")
    assert torch.equal(pixels.squeeze(1), torch.from_numpy(images).to(torch.uint8))
    assert classes.tolist() == [7, 1]


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"PNG\x00....", "not an IDX file"), (b"\0\0\x08\x03\0\0", "cut off inside its header"),
     (idx_bytes(np.zeros((2, 2)))[:-1], "expected 4 bytes of data")],
)  # fmt: skip
def test_damaged_idx_file_is_named(content: bytes, message: str, tmp_path: Path):
    path = tmp_path / "x-idx"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message):
        read_idx(path)


def test_idx_file_cut_inside_gzip_is_named(tmp_path: Path):
    path = tmp_path / "x.gz"
    path.write_bytes(gzip.compress(idx_bytes(np.arange(100)))[:-20])
    with pytest.raises(ValueError, match="not a whole gzip file"):
        read_idx(path)


def test_jitter_moves_images_a_little_and_repeats_with_the_seed():
    images = torch.zeros(50, 1, 28, 28)
    images[:, :, 13:15, 13:15] = 1
    torch.manual_seed(3)
    moved = jitter(images)
    torch.manual_seed(3)
    assert torch.equal(moved, jitter(images))
    rows = torch.arange(28) + 0.5
    mass = moved.sum((1, 2, 3))
    centre = (moved.sum((1, 3)) * rows).sum(1) / mass
    assert (centre - 14).abs().max() <= 28 * 0.1 * 1.2
    assert (centre - 14).abs().max() > 1
    assert ((moved >= 0) & (moved <= 1 + 1e-6)).all()


def test_jitter_keeps_a_flat_image_flat():
    assert torch.allclose(jitter(torch.full((9, 3, 12, 12), 0.4)), torch.tensor(0.4))


def test_a_file_that_is_no_image_is_refused_when_the_folder_is_opened(tmp_path):
    for name in ("cats", "dogs"):
        (tmp_path / name).mkdir()
        Image.new("L", (8, 8)).save(tmp_path / name / "good.png")
    (tmp_path / "dogs" / "late.png").write_text("hello")
    with pytest.raises(UserError, match=r"late\.png: not an image \(5 bytes of something else\)"):
        open_source(str(tmp_path), 1, 28)
