"""Files that other programs write: archives, lists and TIFFs that are not what one expects."""

from __future__ import annotations

import struct
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from lion_models.base.errors import UserError
from lion_models.data import decode_image, open_source
from lion_models.data.archive import unpacked
from tests.support.small import cats_and_dogs


@pytest.fixture(autouse=True)
def fresh_cache(own_cache: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def archive(path: Path, pictures: Path, *more: tuple[str, bytes], slash: str = "/") -> Path:
    """A zip file of a folder's files, then of others."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        for each in sorted(pictures.rglob("*.png")):
            info = zipfile.ZipInfo("x")
            info.filename = str(each.relative_to(pictures)).replace("/", slash)
            file.writestr(info, each.read_bytes())
        for name, content in more:
            file.writestr(name, content)
    return path


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    return cats_and_dogs(tmp_path / "pictures", 4, ".png")


@pytest.mark.parametrize("name", ["../evil.png", "/abs/evil.png", "cats/../../evil.png"])
def test_an_archive_that_leads_out_of_its_folder_is_refused(
    name: str, pictures: Path, tmp_path: Path
):
    path = archive(tmp_path / "a.zip", pictures, (name, b"evil"))
    with pytest.raises(UserError, match=r"evil\.png' in it leads out of the folder"):
        open_source(str(path), 1, 8)
    assert not list(tmp_path.rglob("evil*"))


def test_an_archive_of_windows_has_folders_too(pictures: Path, tmp_path: Path):
    plain = open_source(str(pictures), 1, 8)
    source = open_source(str(archive(tmp_path / "a.zip", pictures, slash="\\")), 1, 8)
    assert source.classes == plain.classes
    assert len(source) == len(plain)


def test_an_archive_that_unpacks_to_far_more_is_refused(pictures: Path, tmp_path: Path):
    path = archive(tmp_path / "a.zip", pictures, ("cats/0.bin", bytes(2**28)))
    with pytest.raises(UserError, match=r"holds 0\.3 GiB in 0\.3 MiB"):
        unpacked(path)
    assert not list((tmp_path / "cache").rglob("*.png"))


def test_a_name_that_is_too_long_is_no_reason_to_copy_the_archive_again(
    pictures: Path, tmp_path: Path
):
    path = archive(tmp_path / "a.zip", pictures, (f"cats/{'n' * 300}.png", b""))
    with pytest.raises(UserError, match="shorten the names in it"):
        unpacked(path)


def labels(folder: Path, *lines: str) -> str:
    path = folder / "labels.csv"
    path.write_text("\n".join(["path,label", *lines]))
    return str(path)


def test_a_list_of_windows_finds_its_pictures(pictures: Path):
    files = [path.relative_to(pictures) for path in sorted(pictures.rglob("*.png"))]
    lines = [f"{str(path).replace('/', chr(92))},{path.parts[0]}" for path in files]
    assert len(open_source(labels(pictures, *lines), 1, 8)) == len(files)


def test_one_picture_in_two_spellings_is_listed_twice(pictures: Path):
    first, *_ = [path.relative_to(pictures) for path in sorted(pictures.rglob("*.png"))]
    again = f"./{first.parent}/../{first}"
    with pytest.raises(UserError, match=r"line 3: .* is listed in line 2 already"):
        open_source(labels(pictures, f"{first},a", f"{again},b"), 1, 8)


def test_values_of_which_zero_is_white_are_turned_round_with_any_number_of_bits(tmp_path: Path):
    ramp = np.linspace(0, 1, 64).reshape(8, 8)
    shown = {}
    for kind, top in ((np.uint8, 255), (np.uint16, 65535)):
        path = tmp_path / f"{top}.tif"
        Image.fromarray((ramp * top).astype(kind)).save(path)
        black = decode_image(path, 1, 8).int()
        set_tag(path, 262, 0)
        white = decode_image(path, 1, 8).int()
        torch.testing.assert_close(white, 255 - black, atol=1, rtol=0)
        shown[top] = white
    torch.testing.assert_close(shown[65535], shown[255], atol=1, rtol=0)


def set_tag(path: Path, tag: int, value: int) -> None:
    """Change the one short number of a tag of a little-endian TIFF."""
    content = path.read_bytes()
    at = content.index(struct.pack("<HHI", tag, 3, 1))
    path.write_bytes(content[: at + 8] + struct.pack("<H", value) + content[at + 10 :])


def test_a_kind_of_tiff_that_is_not_read_is_no_unknown_file(tmp_path: Path):
    path = tmp_path / "a.tif"
    Image.fromarray(np.ones((8, 8), np.float32)).save(path)
    set_tag(path, 258, 64)  # bits of a value
    with pytest.raises(UserError, match="a TIFF of a kind that is not read"):
        decode_image(path, 1, 8)


def test_a_folder_that_is_called_as_a_picture_is_named_as_a_folder(tmp_path: Path):
    (tmp_path / "a.jpg").mkdir()
    with pytest.raises(UserError, match=r"a\.jpg: is a folder; expected an image"):
        decode_image(tmp_path / "a.jpg", 1, 8)
