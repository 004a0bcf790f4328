"""Damaged and missing files, what is remembered about files, and the lists of VTAB-1k."""

from __future__ import annotations

import builtins
import errno
import json
import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from PIL import Image, ImageFile

from lion_models.base.errors import UserError
from lion_models.base.folders import cache_root
from lion_models.data import (
    ArraySource,
    BadFilesWarning,
    Geometry,
    check_fit,
    open_source,
    split_source,
    verify,
)
from lion_models.data.images import decode_image
from lion_models.data.levels import Extent
from tests.support.command import Lion
from tests.support.small import cats_and_dogs, noise


def cut(path: Path) -> Path:
    """Leave the header whole and half of the data away."""
    path.write_bytes(path.read_bytes()[: path.stat().st_size * 2 // 3])
    with Image.open(path) as image:
        assert image.size == (24, 24)
    return path


@pytest.fixture(autouse=True)
def fresh_cache(own_cache: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    return cats_and_dogs(tmp_path / "photos", 8, ".jpg")


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.png", b"\x89PNG\r\n\x1a\n\0\0\0\5IHDR\0\0\0\x08\0aaaa"),
        ("a.ppm", b"P6\n8 8\nx55\n" + bytes(192)),
        ("a.ppm", b"P6\n8 8\n25\xff5\n" + bytes(192)),
    ],
)
def test_damage_that_pillow_takes_for_a_wrong_value_is_damage(
    name: str, content: bytes, photos: Path
):
    path = photos / "dog" / name
    path.write_bytes(content)
    with pytest.raises(UserError, match=rf"{name}: damaged image"):
        decode_image(path, 3, 8)
    with pytest.warns(BadFilesWarning, match=name):
        assert len(open_source(str(photos), 3, 8, bad_files="skip")) == 16


def test_a_jpeg_whose_data_are_cut_is_found_when_the_folder_is_opened(photos: Path):
    cut(photos / "dog" / "3.jpg")
    with pytest.raises(UserError, match=r"3\.jpg: damaged image \(.*truncated.*`bad_files` skip"):
        open_source(str(photos), 3, 8)
    assert len(open_source(str(photos), 3, 8, verify="header")) == 16


def test_skipping_lists_every_file_and_keeps_the_rest(photos: Path):
    bad = [cut(photos / "dog" / "3.jpg"), photos / "cat" / "1.jpg", photos / "cat" / "2.jpg"]
    bad[1].write_text("hello")
    bad[2].write_bytes(b"")
    with pytest.warns(BadFilesWarning, match="left out 3 unusable files") as caught:
        source = open_source(str(photos), 3, 8, bad_files="skip")
    text = str(caught[0].message)
    assert all(str(path) in text for path in bad)
    assert sorted(line.split(": ")[0] for line in source.skipped) == sorted(map(str, bad))
    assert torch.bincount(source.labels).tolist() == [6, 7]
    assert not set(source.paths) & set(bad)
    assert source.load(torch.arange(13)).shape == (13, 3, 8, 8)


def test_several_damaged_files_come_with_advice_in_the_plural(photos: Path):
    for index in range(2):
        cut(photos / "dog" / f"{index}.jpg")
    with pytest.raises(UserError, match="`bad_files` skip trains without them"):
        open_source(str(photos), 3, 8)


def test_many_damaged_files_are_counted_and_the_first_are_named(photos: Path):
    for index in range(8):
        (photos / "cat" / f"{index}.jpg").write_text("x")
        for copy in range(3):
            (photos / "dog" / f"{index}-{copy}.jpg").write_text("x")
    with pytest.raises(UserError, match=r"32 unusable files in .*photos") as failed:
        open_source(str(photos), 3, 8)
    assert str(failed.value).count("not an image") == 20
    assert "and 12 more" in str(failed.value)


def test_a_class_without_a_usable_file_is_an_error_when_skipping(photos: Path):
    for path in (photos / "cat").iterdir():
        path.write_text("x")
    with (
        pytest.warns(BadFilesWarning),
        pytest.raises(UserError, match="no usable image is left in class 'cat'"),
    ):
        open_source(str(photos), 3, 8, bad_files="skip")


@pytest.fixture
def decoded(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The files that were decoded to be checked."""
    seen: list[Path] = []
    real = verify.check_whole

    def watched(path: Path) -> Extent:
        seen.append(path)
        return real(path)

    monkeypatch.setattr(verify, "check_whole", watched)
    return seen


def test_files_are_decoded_once_until_they_change(photos: Path, decoded: list[Path]):
    open_source(str(photos), 3, 8)
    assert len(decoded) == 16
    open_source(str(photos), 1, 16)
    assert len(decoded) == 16
    changed, touched = photos / "cat" / "0.jpg", photos / "dog" / "0.jpg"
    noise(changed, seed=99)
    os.utime(touched, ns=(1, 1))
    open_source(str(photos), 3, 8)
    assert sorted(decoded[16:]) == [changed, touched]
    noise(photos / "cat" / "new.jpg")
    open_source(str(photos), 3, 8)
    assert len(decoded) == 19


def test_damage_is_not_remembered_as_it_may_have_been_a_disk_s(photos: Path, decoded: list[Path]):
    path = cut(photos / "dog" / "3.jpg")
    for _ in range(2):
        with pytest.raises(UserError, match=r"3\.jpg"):
            open_source(str(photos), 3, 8)
    assert len(decoded) == 17
    noise(path)
    assert len(open_source(str(photos), 3, 8)) == 16


def test_damaged_or_unwritable_memory_is_no_obstacle(
    photos: Path, decoded: list[Path], monkeypatch
):
    open_source(str(photos), 3, 8)
    for store in (cache_root() / "verified").glob("*.json"):
        store.write_text('{"pillow": 3')
    assert len(open_source(str(photos), 3, 8)) == 16
    assert len(decoded) == 32

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    noise(photos / "cat" / "0.jpg", seed=5)
    with pytest.warns(UserWarning, match="not written .*No space left"):
        assert len(open_source(str(photos), 3, 8)) == 16


def test_the_memory_is_whole_json_and_holds_only_the_folder_s_files(photos: Path):
    open_source(str(photos), 3, 8)
    (photos / "cat" / "7.jpg").unlink()
    noise(photos / "cat" / "8.jpg")
    open_source(str(photos), 3, 8)
    (store,) = (cache_root() / "verified").iterdir()
    names = json.loads(store.read_text())["files"]
    assert set(names) == {str(path) for path in photos.rglob("*.jpg")}


def test_train_skips_on_request_and_writes_down_what(
    lion: Lion, photos: Path, backbone_file: Path, tmp_path: Path
):
    bad = cut(photos / "dog" / "3.jpg")
    arguments = ("train", "--data", photos, "--backbone", backbone_file, "--shots", 2, "--epochs",
                 1, "--method", "linear", "--runs", tmp_path / "runs", "--name", "x",
                 "--no-test")  # fmt: skip
    refused = lion(*arguments)
    assert refused.code == 2
    assert f"{bad}: damaged image" in refused.err
    assert not (tmp_path / "runs" / "x").exists()
    with pytest.warns(BadFilesWarning, match=r"3\.jpg"):
        done = lion(*arguments, "--bad-files", "skip")
    assert done.code == 0, done.err
    skipped = json.loads((tmp_path / "runs" / "x" / "result.json").read_text())["skipped_files"]
    assert len(skipped) == 1
    assert skipped[0].startswith(f"{bad}: damaged image")
    wrong = lion(*arguments, "--bad-files", "drop")
    assert "--bad-files: expected one of fail, skip, got 'drop'" in wrong.err


def test_train_and_test_folders_are_the_data_set_s_own_split(tmp_path: Path):
    folder = tmp_path / "pets"
    for part, count in (("train", 5), ("val", 2), ("test", 3)):
        for label, name in enumerate(("cat", "dog")):
            for index in range(count):
                noise(folder / part / name / f"{index}.png", seed=10 * index + label)
    source = open_source(str(folder), 3, 8)
    assert source.classes == ("cat", "dog")
    split = split_source(source, 0, None)
    for rows, part, count in ((split.train, "train", 10), (split.validation, "val", 4),
                              (split.test, "test", 6)):  # fmt: skip
        assert {source.paths[row].parts[-3] for row in rows} == {part}
        assert len(rows) == count
    noise(folder / "test" / "fox" / "0.png")
    with pytest.raises(UserError, match=r"test/fox is a class that .*train does not have"):
        open_source(str(folder), 3, 8)


def test_classes_that_are_called_like_parts_stay_classes(tmp_path: Path):
    for name in ("train", "tram"):
        noise(tmp_path / "rail" / name / "inner" / "0.png")
    assert open_source(str(tmp_path / "rail"), 3, 8).classes == ("train", "tram")
    noise(tmp_path / "pair" / "train" / "0.png")
    noise(tmp_path / "pair" / "test" / "0.png")
    assert open_source(str(tmp_path / "pair"), 3, 8).official is None


def test_array_of_another_shape_is_named():
    labels, images = torch.tensor([0, 1]), torch.zeros(2, 1, 9, 9, dtype=torch.uint8)
    source = ArraySource("mine", ("a", "b"), labels, images)
    with pytest.raises(UserError, match=r"its images are \(1, 9, 9\), the backbone takes \(1, 12"):
        check_fit(source, 1, 12)
    check_fit(ArraySource("mine", ("a", "b"), labels, images, Geometry(3, 12)), 3, 12)
    with pytest.raises(UserError, match=r"expected images \(N, 1 or 3, height, width\)"):
        ArraySource("mine", ("a", "b"), labels, images[0])
    with pytest.raises(UserError, match="2 images but labels of shape"):
        ArraySource("mine", ("a", "b"), labels[:1], images)
    with pytest.raises(UserError, match="labels run from 0 to 1; expected 0 to 0 for 1 classes"):
        ArraySource("mine", ("a",), labels, images)


VTAB = {
    "train800.txt": [f"images/train/{i}.jpg {i % 2}" for i in range(6)],
    "val200.txt": [f"images/train/{i}.jpg {i % 2}" for i in range(6, 10)],
    "test.txt": [f"images/test/with space {i}.jpg {i % 2}" for i in range(8)],
}


@pytest.fixture
def vtab(tmp_path: Path) -> Path:
    folder = tmp_path / "cifar"
    for name, lines in VTAB.items():
        for line in lines:
            noise(folder / line.rsplit(" ", 1)[0], seed=len(line))
        (folder / name).write_text("\n".join(lines) + "\n\n")
    union = VTAB["val200.txt"] + VTAB["train800.txt"]
    (folder / "train800val200.txt").write_text("\n".join(union))
    return folder


def test_vtab_folder_keeps_its_own_parts(vtab: Path):
    source = open_source(str(vtab), 3, 8, transform="vtab")
    assert source.classes == ("0", "1")
    split = split_source(source, seed=5, shots=None)
    parts = [split.train, split.validation, split.test]
    for rows, lines in zip(parts, VTAB.values(), strict=True):
        found = [f"{source.paths[row].relative_to(vtab)} {source.labels[row]}" for row in rows]
        assert found == lines
    (vtab / "train800val200.txt").unlink()
    assert len(open_source(str(vtab), 3, 8)) == 18


def rewrite(path: Path, old: str, new: str) -> None:
    assert old in path.read_text()
    path.write_text(path.read_text().replace(old, new))


@pytest.mark.parametrize(
    ("name", "old", "new", "message"),
    [("train800.txt", "/0.jpg 0", "/0.jpg\t", r"train800\.txt, line 1: expected 'path label'"),
     ("val200.txt", "/7.jpg 1", "/7.jpg dog", r"val200\.txt, line 2: .*got 'images/train/7\.jpg d"),
     ("test.txt", " 3.jpg 1", " 3.jpg -1", r"test\.txt, line 4: .*whole number from 0"),
     ("val200.txt", "/7.jpg", "/1.jpg", r"lists images/train/1\.jpg, which train800\.txt lists"),
     ("train800val200.txt", "/7.jpg 1", "/7.jpg 0", "is not train800.txt and val200.txt together"),
     ("test.txt", "with space 5", "gone", r"gone\.jpg: no such file")],
)  # fmt: skip
def test_bad_vtab_lists_are_named(vtab: Path, name: str, old: str, new: str, message: str):
    rewrite(vtab / name, old, new)
    with pytest.raises(UserError, match=message):
        open_source(str(vtab), 3, 8)


def test_vtab_files_that_are_missing_can_be_skipped(vtab: Path):
    (vtab / "images/train/2.jpg").unlink()
    with pytest.warns(BadFilesWarning, match=r"train/2\.jpg: no such file"):
        source = open_source(str(vtab), 3, 8, bad_files="skip")
    assert len(source) == len(source.official) == 17
    assert len(split_source(source, 0, None).train) == 5


def test_vtab_lists_that_are_missing_or_empty_are_named(vtab: Path):
    (vtab / "val200.txt").write_text("\n")
    with pytest.raises(UserError, match=r"val200\.txt lists no image"):
        open_source(str(vtab), 3, 8)
    (vtab / "val200.txt").unlink()
    with pytest.raises(UserError, match=r"looks like VTAB-1k but lacks val200\.txt"):
        open_source(str(vtab), 3, 8)


def test_whole_files_raise_no_warning(photos: Path):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        source = open_source(str(photos), 3, 8, bad_files="skip")
    assert source.skipped == ()


def lock(monkeypatch: pytest.MonkeyPatch, path: Path) -> None:
    """Forbid to read a picture; tests that run as root may read all of them."""
    real = builtins.open

    def guarded(file: object, *rest: object, **options: object) -> object:
        if isinstance(file, (str, Path)) and Path(file) == path:
            raise PermissionError(errno.EACCES, "Permission denied", str(file))
        return real(file, *rest, **options)

    monkeypatch.setattr(builtins, "open", guarded)


@pytest.fixture
def locked(photos: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    lock(monkeypatch, photos / "dog" / "3.jpg")
    return photos / "dog" / "3.jpg"


@pytest.mark.parametrize("verify", ["full", "header"])
@pytest.mark.parametrize("bad_files", ["fail", "skip"])
def test_a_file_that_cannot_be_read_is_neither_damaged_nor_skipped(
    photos: Path, locked: Path, verify: str, bad_files: str
):
    with pytest.raises(UserError, match=r"3\.jpg: cannot be read \(Permission denied\)") as failed:
        open_source(str(photos), 3, 8, verify=verify, bad_files=bad_files)
    assert "damaged" not in str(failed.value)
    assert "skip" not in str(failed.value)


def test_a_file_that_could_not_be_read_is_tried_again(
    photos: Path, monkeypatch: pytest.MonkeyPatch
):
    with monkeypatch.context() as patch:
        lock(patch, photos / "dog" / "3.jpg")
        with pytest.raises(UserError):
            open_source(str(photos), 3, 8)
    assert len(open_source(str(photos), 3, 8)) == 16


@pytest.mark.parametrize("unreadable", ["fail", "skip"])
def test_predict_ends_at_a_file_that_cannot_be_read(
    lion: Lion, trained: Path, photos: Path, locked: Path, unreadable: str
):
    refused = lion("predict", trained, photos, "--unreadable", unreadable)
    assert refused.code == 2
    assert "3.jpg: cannot be read (Permission denied)" in refused.err
    assert "--unreadable" not in refused.err


def test_a_file_in_a_locked_folder_cannot_be_read(photos: Path, monkeypatch: pytest.MonkeyPatch):
    path, real = photos / "dog" / "3.jpg", os.stat

    def guarded(file: object, *rest: object, **options: object) -> object:
        if file == path:
            raise PermissionError(errno.EACCES, "Permission denied", str(file))
        return real(file, *rest, **options)

    monkeypatch.setattr(os, "stat", guarded)
    with pytest.raises(UserError, match=r"3\.jpg: cannot be read \(Permission denied\)"):
        decode_image(path, 3, 8)
    with pytest.raises(UserError, match=r"3\.jpg: cannot be read \(Permission denied\)"):
        open_source(str(photos), 3, 8)


def test_an_impossible_offset_inside_a_file_is_damage(tmp_path: Path, monkeypatch):
    path = noise(tmp_path / "0.png")

    def fail(image: object) -> None:
        raise OSError(errno.EINVAL, "Invalid argument")  # what seek says of a negative place

    monkeypatch.setattr(ImageFile.ImageFile, "load", fail)
    with pytest.raises(UserError, match=r"0\.png: damaged image"):
        decode_image(path, 3, 8)


def test_a_picture_that_is_too_large_is_not_damaged(photos: Path, monkeypatch):
    noise(photos / "dog" / "large.png", side=2000)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1_500_000)
    message = r"large\.png: larger than 3 megapixels; make it smaller; `bad_files` skip trains"
    with pytest.raises(UserError, match=message):
        open_source(str(photos), 3, 8)
    with pytest.warns(BadFilesWarning, match=r"large\.png: larger than 3 megapixels"):
        assert len(open_source(str(photos), 3, 8, bad_files="skip")) == 16


def test_large_pictures_print_no_warning_of_pillow_s(tmp_path: Path):
    path = noise(tmp_path / "0.png", side=40)
    code = (
        "import sys, pathlib, PIL.Image; from lion_models.data import decode_image;"
        "PIL.Image.MAX_IMAGE_PIXELS = 1000;"
        "print(decode_image(pathlib.Path(sys.argv[1]), 3, 8).shape)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(path)], capture_output=True, text=True, check=True
    )
    assert "8, 8" in done.stdout
    assert done.stderr == ""
