"""Which files are pictures, how their values become grey, and what is said of the rest."""

from __future__ import annotations

import json
import subprocess
import sys
import types
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageFile

from lion_models.base.errors import UserError
from lion_models.data import decode_image, find_images, formats, open_source
from lion_models.data.files import LeftOutWarning
from lion_models.data.folder import FoldersWarning
from lion_models.data.verify import ConstantWarning
from tests.support.command import Lion
from tests.support.small import cats_and_dogs, noise

POSTSCRIPT = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\nshowpage\n%%EOF\n"


@pytest.fixture(autouse=True)
def fresh_cache(own_cache: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def no_process(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*command: object, **options: object) -> None:
        raise AssertionError(f"started {command}")

    for name in ("Popen", "run", "call", "check_call", "check_output"):
        monkeypatch.setattr(subprocess, name, refuse)


def test_raster_formats_are_read_whatever_their_names_end_in(tmp_path: Path):
    suffixes = (".avif", ".jfif", ".webp", ".jp2", ".tga", ".pcx", ".apng", ".jpe", ".dib", ".qoi",
                ".pnm", ".mpo")  # fmt: skip
    kinds = {".apng": "PNG", ".jpe": "JPEG", ".jfif": "JPEG", ".pnm": "PPM"}
    paths = []
    for seed, suffix in enumerate(suffixes):
        path = noise(tmp_path / "cat" / f"{seed}.png", seed=seed)
        with Image.open(path) as image:
            paths.append(path.with_suffix(suffix.upper() if seed % 2 else suffix))
            image.save(paths[-1], kinds.get(suffix))
        path.unlink()
    assert find_images(tmp_path) == sorted(paths)
    for path in paths:
        assert decode_image(path, 3, 24).float().std() > 30


@pytest.mark.parametrize("name", ["x.jpg", "x.eps", "x.png"])
def test_postscript_is_no_picture_and_starts_no_program(
    lion: Lion, trained: Path, tmp_path: Path, no_process: None, name: str
):
    path = tmp_path / name
    path.write_bytes(POSTSCRIPT)
    with pytest.raises(UserError, match="not an image"):
        decode_image(path, 1, 8)
    done = lion("predict", trained, path, noise(tmp_path / "a.png"), "--unreadable", "skip")
    assert done.code == 0, done.err
    assert "skipped 1 of 2 files" in done.err


def test_what_is_left_out_is_counted_and_named(lion: Lion, trained: Path, tmp_path: Path):
    photos = cats_and_dogs(tmp_path / "photos", 6, ".png")
    for name in ("a.heic", "b.HEIC", "notes.txt", "Thumbs.db", ".hidden.txt", "raw"):
        (photos / "cat" / name).write_bytes(b"0")
    expected = r"left out 4 files .*: 2 \.heic \(.*1 \.txt .*1 without a suffix.*deqcore\[heic\]"
    with pytest.warns(LeftOutWarning, match=expected):
        assert len(open_source(str(photos), 1, 8)) == 12
    with pytest.warns(LeftOutWarning, match="left out 4 files"):
        done = lion("predict", trained, photos, "--format", "csv")
    assert done.code == 0


def test_heic_is_named_where_its_package_is_missing(tmp_path: Path):
    path = tmp_path / "x.jpg"
    path.write_bytes(b"\0\0\0\x18ftypheic" + bytes(40))
    with pytest.raises(UserError, match=r"a HEIC picture.*pip install 'deqcore\[heic\]'"):
        decode_image(path, 1, 8)


def test_heic_is_read_where_its_package_is_installed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    class Heif(ImageFile.ImageFile):
        format = "HEIF"

        def _open(self) -> None:
            self._mode, self._size = "L", (8, 8)
            self.tile = [("raw", (0, 0, 8, 8), 16, ("L", 0, 1))]

    def register_heif_opener() -> None:
        Image.register_open("HEIF", Heif, lambda start: start[4:12] == b"ftypheic")

    package = types.ModuleType("pillow_heif")
    package.register_heif_opener = register_heif_opener
    monkeypatch.setitem(sys.modules, "pillow_heif", package)
    for cached in (formats._heic_is_read, formats._formats):
        cached.cache_clear()
    try:
        path = tmp_path / "x.heic"
        path.write_bytes(b"\0\0\0\x18ftypheic0000" + bytes(range(64)))
        assert find_images(tmp_path) == [path]
        assert decode_image(path, 1, 8).flatten().tolist() == list(range(64))
    finally:
        Image.OPEN.pop("HEIF", None)
        Image.ID.remove("HEIF")
        for cached in (formats._heic_is_read, formats._formats):
            cached.cache_clear()


def test_pictures_beside_and_below_class_folders_are_said(tmp_path: Path):
    photos = cats_and_dogs(tmp_path / "photos", 3, ".png")
    noise(photos / "loose.png", seed=50)
    with pytest.warns(FoldersWarning, match=r"1 pictures beside the class folders .*loose\.png"):
        open_source(str(photos), 1, 8)
    (photos / "loose.png").unlink()
    photos.rename(tmp_path / "animals")
    noise(tmp_path / "all" / "things" / "0.png", seed=60)
    (tmp_path / "animals").rename(tmp_path / "all" / "animals")
    with pytest.warns(FoldersWarning, match=r"'animals' from cat, dog; if those are the classes"):
        source = open_source(str(tmp_path / "all"), 1, 8)
    assert source.classes == ("animals", "things")
    (tmp_path / "all" / "things" / "0.png").unlink()
    (tmp_path / "all" / "things").rmdir()
    with pytest.raises(UserError, match=r"holds one class \('animals'\).*name .*all/animals"):
        open_source(str(tmp_path / "all"), 1, 8)


def test_train_says_what_it_learns_from(lion: Lion, image_folder: Path, tmp_path: Path):
    done = lion("train", "--data", image_folder, "--method", "linear", "--shots", 4, "--epochs", 1,
                "--validation-shots", 2, "--runs", tmp_path)  # fmt: skip
    assert done.code == 0, done.err
    assert "36 images in 3 classes (dark, light, middle), 12 a class" in done.out
    assert "12 for training, 6 for validation, 12 for test, 6 not used" in done.out
    assert "tiny-vit, which sees 28 x 28 pixels in grey; method: linear" in done.out
    assert done.out.index("images:") < done.out.index("chosen epoch")


def tiffs(folder: Path, *pictures: np.ndarray) -> Path:
    """Two classes of one-channel TIFFs."""
    for index, values in enumerate(pictures):
        path = folder / ("a" if index % 2 else "b") / f"{index}.tif"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(values).save(path)
    return folder


def ramp(low: float, high: float, dtype: type = np.float32) -> np.ndarray:
    return np.linspace(low, high, 64).reshape(8, 8).astype(dtype)


@pytest.mark.parametrize(
    ("low", "high", "dtype"),
    [(0, 4095, np.uint16), (0, 65535, np.uint16), (0, 1023, np.uint16), (312.5, 871.0, np.float32),
     (-1, 1, np.float32), (0, 1, np.float32), (0, 255, np.float32), (-500, 70000, np.int32)],
)  # fmt: skip
@pytest.mark.parametrize("verify", ["full", "header"])
def test_the_values_of_a_data_set_become_all_of_grey(
    tmp_path: Path, low: float, high: float, dtype: type, verify: str
):
    middle = (low + high) / 2
    folder = tiffs(tmp_path / "t", ramp(low, high, dtype), ramp(low, middle, dtype))
    source = open_source(str(folder), 1, 8, verify=verify)
    whole, half = source.load(torch.tensor([1, 0])).flatten(1).float()
    assert whole.min() == 0
    assert whole.max() == 255
    # One rule for all: what is half as bright stays so.
    assert half.max().item() == pytest.approx(127.5, abs=1)


def test_values_that_are_no_numbers_are_ignored(tmp_path: Path):
    values = ramp(0, 1)
    values[0] = np.nan
    values[1, 0], values[1, 1] = np.inf, -np.inf
    folder = tiffs(tmp_path / "t", values, ramp(0, 1))
    image = open_source(str(folder), 1, 8).load(torch.tensor([1]))[0, 0]
    assert image[0].tolist() == [0] * 8
    assert image[1, :2].tolist() == [255, 0]
    assert image[-1, -1] == 255
    assert decode_image(folder / "b" / "0.tif", 1, 8)[0, -1, -1] == 255


def test_nearly_constant_pictures_are_said_and_a_range_mends_them(tmp_path: Path):
    flat = (ramp(0, 40, np.uint16), ramp(3, 50, np.uint16))
    folder = tiffs(tmp_path / "t", *flat, ramp(0, 60000, np.uint16))
    with pytest.warns(ConstantWarning, match=r"2 of 3 pictures .*`value_range` says"):
        open_source(str(folder), 1, 8)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        open_source(str(tiffs(tmp_path / "u", *flat)), 1, 8)


def test_a_run_reads_every_picture_by_its_data_set_s_rule(
    lion: Lion, tmp_path: Path, backbone_file: Path
):
    folder = tiffs(tmp_path / "t", *(ramp(0, 4095 - 9 * n, np.uint16) for n in range(16)))
    arguments = ("train", "--data", folder, "--backbone", backbone_file, "--method", "linear",
                 "--shots", 2, "--epochs", 1, "--runs", tmp_path, "--name")  # fmt: skip
    done = lion(*arguments, "auto")
    assert done.code == 0, done.err
    assert "integers 0 to 4095 are black to white" in done.out
    assert json.loads((tmp_path / "auto/data.json").read_text())["levels"] == {
        "integers": [0, 4095]
    }
    predicted = {}
    for name, top in (("same", 4095), ("wide", 65535)):
        path = tiffs(tmp_path / name, ramp(0, top, np.uint16)) / "b" / "0.tif"
        out = lion("predict", tmp_path / "auto", path, "--format", "csv").out
        predicted[name] = out.splitlines()[1].split(",")[-1]
    assert predicted["same"] != predicted["wide"]
    given = lion(*arguments, "given", "--value-range", "0:65535")
    assert "integers 0 to 65535" in given.out
    wrong = lion(*arguments, "wrong", "--value-range", "9")
    assert wrong.code == 2
    assert "--value-range: expected LOW:HIGH" in wrong.err
