"""Lists of pictures, labels in CSV files, zip files, and classes that are written in many ways."""

from __future__ import annotations

import re
import unicodedata
import zipfile
from pathlib import Path

import pytest
import torch
from PIL import Image

from lion_models.base.errors import UserError
from lion_models.base.names import difference, look_alike
from lion_models.data import open_source
from lion_models.data.base import TEST, TRAIN
from lion_models.data.folder import FoldersWarning
from lion_models.data.text import read_text
from tests.support.command import Lion
from tests.support.small import cats_and_dogs, noise


@pytest.fixture(autouse=True)
def fresh_cache(own_cache: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.mark.parametrize(
    "encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32"]
)
def test_lists_are_read_in_any_encoding(tmp_path: Path, encoding: str):
    noise(tmp_path / "é.jpg")
    noise(tmp_path / "b.jpg", seed=1)
    noise(tmp_path / "c.jpg", seed=2)
    for name, line in (("train800", "b.jpg 0\né.jpg 1"), ("val200", "c.jpg 0"), ("test", "")):
        text = line or "d.jpg 1"
        (tmp_path / f"{name}.txt").write_text(text + "\r\n", encoding=encoding)
    noise(tmp_path / "d.jpg", seed=3)
    source = open_source(str(tmp_path), 1, 8)
    assert [path.name for path in source.paths] == ["b.jpg", "é.jpg", "c.jpg", "d.jpg"]
    (tmp_path / "list.csv").write_text("path,label\nb.jpg,x\né.jpg,y\n", encoding=encoding)
    assert open_source(str(tmp_path / "list.csv"), 1, 8).classes == ("x", "y")


def test_what_is_no_text_is_said(tmp_path: Path):
    (tmp_path / "a").write_bytes(b"ab\0cd")
    with pytest.raises(UserError, match="no text"):
        read_text(tmp_path / "a")
    (tmp_path / "a").write_bytes(b"\xff\xfea\0b")
    with pytest.raises(UserError, match="save it as UTF-8"):
        read_text(tmp_path / "a")
    (tmp_path / "a").write_bytes(b"caf\xe9.jpg 1")
    assert read_text(tmp_path / "a") == "caf\udce9.jpg 1"


def labels(folder: Path, *lines: str, heading: str = "path,label") -> Path:
    path = folder / "labels.csv"
    path.write_text("\n".join((heading, *lines)) + "\n")
    return path


def test_labels_come_from_a_csv_file(tmp_path: Path):
    cats_and_dogs(tmp_path, 3, ".png")
    path = labels(tmp_path, "cat/0.png,10", '"cat/1.png",9', "dog/0.png,10", "", "dog/1.png,9")
    source = open_source(str(path), 1, 8)
    assert source.classes == ("9", "10")
    assert source.labels.tolist() == [1, 0, 1, 0]
    assert source.official is None
    lines = "1;train;tom;cat/0.png", "2;train;rex;dog/0.png", "3;test;tom;cat/1.png"
    path = labels(tmp_path, *lines, heading="id;split;Class;file_name")
    source = open_source(str(path), 1, 8)
    assert source.classes == ("rex", "tom")
    assert source.official.tolist() == [TRAIN, TRAIN, TEST]
    path = labels(tmp_path, 'cat/0.png,"a\nb"', "cat/1.png,c\u2028d", f"dog/0.png,{'9' * 5000},")
    assert open_source(str(path), 1, 8).classes == ("9" * 5000, "a\nb", "c\u2028d")


@pytest.mark.parametrize(
    ("heading", "lines", "message"),
    [
        ("path,label,class", ("cat/0.png,a,b",), "2 columns of labels"),
        ("path,cat,dog", ("cat/0.png,1,0",), "0 columns of labels .*'path,label'"),
        ("path,label", ("cat/0.png,a", "cat/0.png,b"), "line 3: cat/0.png is listed in line 2"),
        ("path,label", ("cat/0.png,a|b", "dog/0.png,c"), "several labels, which are not supported"),
        ("path,label", ("cat/0.png,",), "line 2: expected a path and a label"),
        ("path,label", ("cat/0.png,a",), "lists one class .'a'."),
        ("path,label", ("cat/0.png,a", "cat/9.png,b"), "9.png: no such file"),
        ("path,label,split", ("cat/0.png,a,all",), "'all' is no part; expected one of train"),
        ("", (), "0 columns of paths"),
        ("path,label", ("cat/0.png,a", 'dog/0.png,"b', "cat/1.png,c"), "line 4: no CSV .*end of d"),
        ("path,label", ("cat/0.png,a, b", "dog/0.png,c"), "line 2: 3 cells .* 2 columns"),
    ],
)
def test_what_is_wrong_with_a_csv_file_is_named(
    tmp_path: Path, heading: str, lines: tuple[str, ...], message: str
):
    cats_and_dogs(tmp_path, 1, ".png")
    with pytest.raises(UserError, match=message):
        open_source(str(labels(tmp_path, *lines, heading=heading)), 1, 8)


def test_a_folder_without_classes_names_its_csv_file(tmp_path: Path):
    noise(tmp_path / "0.png")
    labels(tmp_path, "0.png,a")
    with pytest.raises(UserError, match=r"if labels\.csv has their classes, name that file"):
        open_source(str(tmp_path), 1, 8)


def zipped(folder: Path, archive: Path) -> Path:
    with zipfile.ZipFile(archive, "w") as file:
        for path in sorted(folder.rglob("*.*")):
            file.write(path, path.relative_to(folder.parent))
        file.writestr("__MACOSX/photos/._0.png", b"0")
    return archive


def test_a_zip_file_is_a_folder(lion: Lion, tmp_path: Path, backbone_file: Path):
    photos = cats_and_dogs(tmp_path / "photos", 6, ".png")
    archive = zipped(photos, tmp_path / "photos.zip")
    source, same = open_source(str(archive), 1, 8), open_source(str(photos), 1, 8)
    assert source.name == str(archive)
    assert source.classes == same.classes
    assert source.row_names() == same.row_names()
    rows = torch.arange(12)
    assert torch.equal(source.load(rows), same.load(rows))
    done = lion("train", "--data", archive, "--backbone", backbone_file, "--method", "linear",
                "--shots", 2, "--epochs", 1, "--runs", tmp_path / "runs")  # fmt: skip
    assert done.code == 0, done.err
    run = tmp_path / "runs" / "photos-linear-s42"
    assert lion("eval", run).code == 0
    noise(photos / "cat" / "new.png", seed=77)
    assert len(open_source(str(zipped(photos, archive)), 1, 8)) == 13


def test_a_zip_file_that_cannot_be_unpacked_is_named(tmp_path: Path):
    archive = tmp_path / "a.zip"
    archive.write_bytes(b"PK\3\4 no archive")
    with pytest.raises(UserError, match=r"a\.zip cannot be unpacked .*copy it again"):
        open_source(str(archive), 1, 8)
    zipped(cats_and_dogs(tmp_path / "photos", 2, ".png"), archive)
    content = bytearray(archive.read_bytes())
    content[200:260] = bytes(60)
    archive.write_bytes(content)
    with pytest.raises(UserError, match="cannot be unpacked"):
        open_source(str(archive), 1, 8)
    assert not list((tmp_path / "cache").rglob("*.part"))


def test_a_run_is_measured_on_some_of_its_classes(
    lion: Lion, trained: Path, image_folder: Path, tmp_path: Path
):
    (tmp_path / "two").mkdir()
    for name in ("light", "middle"):
        (tmp_path / "two" / name).symlink_to(image_folder / name)
    with pytest.warns(UserWarning, match="has 2 of the run's 3 classes, without dark"):
        done = lion("eval", trained, "--data", tmp_path / "two", "--report")
    assert done.code == 0, done.err
    (tmp_path / "two" / "middle").unlink()
    with pytest.warns(UserWarning, match="has 1 of the run's 3 classes"):
        one = lion("eval", trained, "--data", tmp_path / "two", "--report")
    assert one.code == 0, one.err
    assert "over 12 images" in one.out


def test_classes_that_are_written_otherwise_are_taken_for_the_run_s_own(
    lion: Lion, trained: Path, image_folder: Path, tmp_path: Path
):
    (tmp_path / "d").mkdir()
    for name, other in (("dark", "Dark"), ("light", "light "), ("middle", "middle")):
        (tmp_path / "d" / other).symlink_to(image_folder / name)
    own = lion("eval", trained, "--data", image_folder).out
    with pytest.warns(UserWarning, match="'Dark' for 'dark' .they differ in case."):
        done = lion("eval", trained, "--data", tmp_path / "d")
    figures = [re.findall(r"accuracy .* nats", out) for out in (own, done.out)]
    assert figures[0] == figures[1] != []
    (tmp_path / "d" / "fox").symlink_to(image_folder / "dark")
    refused = lion("eval", trained, "--data", tmp_path / "d")
    assert "has 1 classes that the run was not trained for: fox" in refused.err


def test_classes_of_one_folder_that_look_alike_are_said(tmp_path: Path):
    composed, taken_apart = (unicodedata.normalize(form, "Bär") for form in ("NFC", "NFD"))
    for seed, name in enumerate((composed, taken_apart, "dog")):
        noise(tmp_path / name / "0.png", seed=seed)
    with pytest.warns(FoldersWarning, match=r"2 classes .* in Unicode form"):
        open_source(str(tmp_path), 1, 8)
    assert difference("Cat", "cat ") == "spaces and case"
    assert look_alike(["cat", "cow"], ["Cat"]) == {"cat": "Cat"}


def test_a_class_of_the_test_part_in_other_letters_is_named(tmp_path: Path):
    for seed, name in enumerate(("train/cat", "train/dog", "test/Cat", "test/dog")):
        noise(tmp_path / name / "0.png", seed=seed)
    with pytest.raises(UserError, match=r"test/Cat is a class .*differs from 'cat' in case"):
        open_source(str(tmp_path), 1, 8)


def test_bytes_of_a_hugging_face_column_are_turned_as_their_exif_says(tmp_path: Path):
    from lion_models.data.hub import _as_picture

    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("L", (8, 4)).save(tmp_path / "a.jpg", exif=exif)
    content = (tmp_path / "a.jpg").read_bytes()
    for value in (
        {"bytes": content, "path": None},
        {"bytes": None, "path": str(tmp_path / "a.jpg")},
    ):
        assert _as_picture(value).size == (4, 8)
