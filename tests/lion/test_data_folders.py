"""Which files and sub-folders of a folder are data, and which are its split."""

from __future__ import annotations

import os
import shutil
import warnings
from pathlib import Path

import pytest

from lion_models.base.errors import UserError
from lion_models.data import BadFilesWarning, CopiesWarning, find_images, open_source
from lion_models.data.base import TEST, TRAIN, VALIDATION
from tests.support.command import Lion
from tests.support.small import cats_and_dogs, noise


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    return cats_and_dogs(tmp_path / "photos", 3, ".png")


CLUTTER = (".ipynb_checkpoints", "__MACOSX", "@eaDir")


@pytest.mark.parametrize("name", CLUTTER)
def test_folders_that_programs_leave_behind_hold_no_data(photos: Path, name: str):
    before = find_images(photos)
    noise(photos / "cat" / name / "0-checkpoint.png")
    noise(photos / "cat" / "inner" / name / "deep" / "0.png")
    assert find_images(photos) == before
    assert len(open_source(str(photos), 3, 8)) == 6


def test_a_folder_below_a_hidden_one_can_be_named(tmp_path: Path):
    path = noise(tmp_path / ".cache" / "cat" / "0.png")
    assert find_images(path.parent) == [path]


@pytest.mark.parametrize("name", CLUTTER)
def test_folders_that_programs_leave_behind_are_no_classes(photos: Path, name: str):
    (photos / name).mkdir()
    assert open_source(str(photos), 3, 8).classes == ("cat", "dog")
    noise(photos / name / "0.png")
    assert open_source(str(photos), 3, 8).classes == ("cat", "dog")


@pytest.mark.parametrize("target", ["gone.png", "9.png"])  # the second is the link itself
def test_a_link_to_no_file_is_a_missing_file(lion: Lion, trained: Path, photos: Path, target: str):
    link = photos / "cat" / "9.png"
    link.symlink_to(target)
    with pytest.raises(UserError, match=r"9\.png: no such file.*`bad_files` skip"):
        open_source(str(photos), 3, 8)
    with pytest.warns(BadFilesWarning, match=r"9\.png: no such file"):
        assert len(open_source(str(photos), 3, 8, bad_files="skip")) == 6
    for verify in ("full", "header"):
        with pytest.raises(UserError, match=f"a link to '{target}'"):
            open_source(str(photos), 3, 8, verify=verify)
    refused = lion("predict", trained, photos)
    assert refused.code == 2
    assert "9.png: no such file" in refused.err
    done = lion("predict", trained, photos, "--unreadable", "skip")
    assert "skipped 1 of 7 files" in done.err


def test_linked_folders_are_walked(photos: Path, tmp_path: Path):
    outside = noise(tmp_path / "disk" / "more" / "0.png", seed=50)
    (photos / "cat" / "more").symlink_to(outside.parent)
    assert photos / "cat" / "more" / "0.png" in find_images(photos / "cat")
    assert len(open_source(str(photos), 3, 8)) == 7


def test_links_that_lead_back_end_and_give_no_picture_twice(photos: Path):
    before = find_images(photos)
    (photos / "cat" / "all").symlink_to("..")
    (photos / "cat" / "again").symlink_to(".")
    (photos / "cat" / "a").symlink_to("z")
    (photos / "cat" / "b").symlink_to("z")
    inner = noise(photos / "cat" / "z" / "0.png", seed=50)
    assert find_images(photos) == sorted([*before, inner])
    assert find_images(photos / "cat") == sorted([*before[:3], inner])


def test_a_folder_that_cannot_be_listed_is_named(photos: Path, monkeypatch: pytest.MonkeyPatch):
    real = os.scandir

    def scandir(path: str) -> object:
        if Path(path).name == "dog":
            raise PermissionError(13, "Permission denied", str(path))
        return real(path)

    monkeypatch.setattr(os, "scandir", scandir)
    with pytest.raises(UserError, match=r"dog: cannot be read \(Permission denied\)"):
        find_images(photos)


def make_split(folder: Path, *parts: str) -> Path:
    for number, part in enumerate(parts):
        for label, name in enumerate(("cat", "dog")):
            noise(folder / part / name / "0.png", seed=10 * number + label)
    return folder


@pytest.mark.parametrize(
    ("parts", "official"),
    [
        (("Train", "Test"), [TRAIN, TEST]),
        (("TRAIN", "val", "TEST"), [TRAIN, VALIDATION, TEST]),
        (("training", "validation", "testing"), [TRAIN, VALIDATION, TEST]),
        (("Training", "Valid"), [TRAIN, VALIDATION]),
    ],
)
def test_parts_of_a_split_are_known_by_any_common_name(
    tmp_path: Path, parts: tuple[str, ...], official: list[int]
):
    source = open_source(str(make_split(tmp_path, *parts)), 3, 8)
    assert source.classes == ("cat", "dog")
    assert source.official is not None
    found = {source.paths[row].parts[-3]: int(part) for row, part in enumerate(source.official)}
    assert found == dict(zip(parts, official, strict=True))


def test_a_folder_beside_the_parts_of_a_split_is_named(tmp_path: Path):
    make_split(tmp_path, "train", "Test")
    for name in CLUTTER:
        noise(tmp_path / name / "cat" / "0.png")
    assert open_source(str(tmp_path), 3, 8).classes == ("cat", "dog")
    noise(tmp_path / "unlabelled" / "0.png")
    with pytest.raises(UserError, match=r"Test, train.*'unlabelled'.*move it out of .*rename"):
        open_source(str(tmp_path), 3, 8)


def test_two_training_parts_are_refused(tmp_path: Path):
    make_split(tmp_path, "train", "Training", "test")
    with pytest.raises(UserError, match=r"Training and train are both training parts"):
        open_source(str(tmp_path), 3, 8)


@pytest.mark.parametrize("inside", ["0.png", "notes.txt"])
def test_a_part_without_class_folders_is_named(tmp_path: Path, inside: str):
    make_split(tmp_path, "train")
    (tmp_path / "test").mkdir()
    noise(tmp_path / "0.png").rename(tmp_path / "test" / inside)
    with pytest.raises(UserError, match=r"test holds no class folder.*train"):
        open_source(str(tmp_path), 3, 8)


def test_images_beside_the_class_folders_of_a_part_are_named(tmp_path: Path):
    make_split(tmp_path, "train", "test")
    noise(tmp_path / "test" / "stray.PNG")
    with pytest.raises(UserError, match=r"stray\.PNG lies beside class folders"):
        open_source(str(tmp_path), 3, 8)


def test_classes_called_train_and_test_hold_their_images_directly(tmp_path: Path):
    for number, name in enumerate(("Train", "test", "tram")):
        noise(tmp_path / name / "0.png", seed=number)
        (tmp_path / name / "__MACOSX").mkdir()
    source = open_source(str(tmp_path), 3, 8)
    assert source.classes == ("Train", "test", "tram")
    assert source.official is None


def test_copies_are_counted_and_named_at_every_opening(photos: Path):
    shutil.copy(photos / "cat" / "1.png", photos / "cat" / "copy.png")
    shutil.copy(photos / "cat" / "1.png", photos / "dog" / "again.png")
    shutil.copy(photos / "dog" / "0.png", photos / "dog" / "9.png")
    for _ in range(2):  # decoded, then remembered
        with pytest.warns(CopiesWarning) as caught:
            assert len(open_source(str(photos), 3, 8)) == 9
        assert len(caught) == 1
        text = str(caught[0].message)
        assert "3 files of" in text
        assert "cat/1.png = cat/copy.png = dog/again.png, dog/0.png = dog/9.png;" in text
    noise(photos / "dog" / "9.png", seed=70)
    with pytest.warns(CopiesWarning, match="2 files of"):
        open_source(str(photos), 3, 8)


def test_many_copies_are_counted_and_the_first_are_named(photos: Path):
    for index in range(20):
        noise(photos / "cat" / f"a{index:02}.png", seed=100 + index)
        shutil.copy(photos / "cat" / f"a{index:02}.png", photos / "dog" / f"b{index:02}.png")
    with pytest.warns(
        CopiesWarning, match="20 files of.*a04.png = dog/b04.png and more;"
    ) as caught:
        open_source(str(photos), 3, 8)
    assert str(caught[0].message).count(" = ") == 5


def test_files_of_one_size_are_no_copies(tmp_path: Path):
    for name in ("cat", "dog"):
        for index in range(2):
            noise(tmp_path / name / f"{index}.bmp", seed=index + 2 * (name == "dog"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        open_source(str(tmp_path), 3, 8)
        shutil.copy(tmp_path / "cat" / "0.bmp", tmp_path / "dog" / "0.bmp")
        open_source(str(tmp_path), 3, 8, verify="header")
