"""Mutated picture files and names: a result or an error that says what to do, and no process."""

from __future__ import annotations

import csv
import io
import os
import subprocess
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from lion_models.base.errors import UserError
from lion_models.data.images import check_header, check_whole, decode_file
from lion_models.data.transforms import Geometry
from tests.support.command import Lion
from tests.support.small import noise

FILES, NAMES = 500, 200
FOREIGN = (
    b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\nshowpage\n%%EOF\n",
    b"%PDF-1.4\n1 0 obj\n<<>>\nendobj\n",
    b"\xd7\xcd\xc6\x9a" + bytes(80),  # a Windows metafile
    b"<svg xmlns='http://www.w3.org/2000/svg'/>",
    b"",
)


@pytest.fixture(autouse=True)
def no_process(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*command: object, **options: object) -> None:
        raise SystemExit(f"started {command}")  # which no handler of errors takes

    for name in ("Popen", "run", "call", "check_call", "check_output"):
        monkeypatch.setattr(subprocess, name, refuse)
    for name in ("system", "popen", "posix_spawn", "fork"):
        monkeypatch.setattr(os, name, refuse)


def whole_files() -> list[bytes]:
    """One file of each kind, with EXIF where it can have some."""
    exif = Image.Exif()
    exif[0x0112], exif[0x010E] = 6, "a picture"
    colour = Image.fromarray(np.random.default_rng(0).integers(0, 255, (20, 30, 3), np.uint8))
    wide = Image.fromarray(np.arange(600, dtype=np.uint16).reshape(20, 30) * 100)
    real = Image.fromarray(np.linspace(-1, 1, 600, dtype=np.float32).reshape(20, 30))
    palette = colour.quantize(16)
    kinds = [
        *((colour, form, {"exif": exif}) for form in ("JPEG", "PNG", "WEBP", "AVIF", "TIFF")),
        *((colour, form, {}) for form in ("BMP", "PPM", "JPEG2000", "TGA", "PCX", "SGI", "QOI",
                                          "DDS", "ICO", "MPO")),
        (palette, "GIF", {}), (palette, "PNG", {"transparency": 3}),
        (wide, "PNG", {}), (wide, "TIFF", {"compression": "tiff_lzw"}), (real, "TIFF", {}),
        (colour.convert("CMYK"), "JPEG", {}),
        (colour.convert("1"), "TIFF", {"compression": "group4"}),
    ]  # fmt: skip
    files = []
    for image, form, options in kinds:
        buffer = io.BytesIO()
        image.save(buffer, form, **options)
        files.append(buffer.getvalue())
    return files


def mutated(content: bytes, generator: np.random.Generator) -> bytes:
    """A file with some of its bytes changed, most of them in its header, or cut, or grown."""
    data = bytearray(content)
    for _ in range(int(generator.integers(1, 6))):
        end = min(len(data), 120) if generator.random() < 0.7 else len(data)
        at = int(generator.integers(max(1, end)))
        kind = generator.integers(5)
        if kind == 0:
            data[at : at + 1] = generator.bytes(1)
        elif kind == 1:  # a size that is huge, negative or none
            data[at : at + 4] = (b"\xff\xff\xff\xff", bytes(4), b"\x7f\xff\xff\xff")[at % 3]
        elif kind == 2:
            del data[at : at + int(generator.integers(1, 9))]
        elif kind == 3:
            data[at:at] = generator.bytes(int(generator.integers(1, 9)))
        elif len(data) > 40:
            del data[int(generator.integers(20, len(data))) :]
    return bytes(data)


def test_mutated_pictures_are_decoded_or_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10**6)
    generator = np.random.default_rng(1)
    whole = whole_files()
    outcomes = {"decoded": 0, "named": 0}
    for number in range(FILES):
        path = tmp_path / f"{number}.jpg"
        path.write_bytes(mutated(whole[number % len(whole)], generator))
        for read in (check_header, check_whole, lambda path: decode_file(path, Geometry(3, 16))):
            try:
                read(path)
            except UserError as error:
                assert str(path) in str(error)  # noqa: PT017  (it may also succeed)
                outcome = "named"
            else:
                outcome = "decoded"
        outcomes[outcome] += 1
    assert min(outcomes.values()) > FILES // 20, outcomes


def test_whole_pictures_are_decoded_and_foreign_files_are_named(tmp_path: Path):
    for number, content in enumerate(whole_files()):
        (tmp_path / f"{number}.png").write_bytes(content)
        decode_file(tmp_path / f"{number}.png", Geometry(1, 16))
    for number, content in enumerate(FOREIGN):
        (tmp_path / f"{number}.jpg").write_bytes(content)
        with pytest.raises(UserError, match="not an image"):
            decode_file(tmp_path / f"{number}.jpg", Geometry(1, 16))


def mutated_names(count: int) -> list[str]:
    """Names that a file system takes, each with some that a program may stumble over."""
    generator = np.random.default_rng(2)
    parts = [*"$_^{}\\[]`%&|,;\"' \n\t\r\x7f-@é~*?", "$$", "\\frac", "[red]", ":cat:", "%s", "{0}",
             "<b>", "\x1b[31m", "=1+1", "e\u0301", "日本", "\U0001f600", "\u202e", "\ufeff",
             "a" * 60, os.fsdecode(b"\xff"), os.fsdecode(b"\xe9\x80"), "nul"]  # fmt: skip
    names: set[str] = set()
    while len(names) < count:
        chosen = generator.choice(len(parts), int(generator.integers(1, 5)))
        name = f"x{len(names)}" * (len(names) % 2) + "".join(parts[at] for at in chosen)
        if name.strip(". ") and not name.startswith("."):
            names.add(name)
    return sorted(names)


def test_files_of_any_name_are_predicted(lion: Lion, trained: Path, tmp_path: Path):
    folder = tmp_path / "in"
    for seed, name in enumerate(mutated_names(NAMES)):
        noise(folder / "0.png", side=8, seed=seed).rename(folder / f"{name}.png")
    for form in ("csv", "json"):
        done = lion("predict", trained, folder, "--output", tmp_path / f"p.{form}")
        assert done.code == 0, done.err
    with (tmp_path / "p.csv").open(encoding="utf-8", newline="") as file:
        assert len(list(csv.DictReader(file))) == NAMES
    table = lion("predict", trained, folder)
    assert table.code == 0, table.err
    assert "\x1b" not in table.out
    missing = lion("predict", trained, *(f"{name}/none" for name in mutated_names(3)))
    assert missing.code == 2


@pytest.mark.drawn
def test_classes_of_any_name_are_trained_tested_and_drawn(
    lion: Lion, tmp_path: Path, recwarn: pytest.WarningsRecorder
):
    data = tmp_path / "$data[b]$"
    for label, name in enumerate(mutated_names(NAMES // 2)):
        for index in range(3):
            noise(data / name / f"{index}.png", side=8, seed=3 * label + index)
    done = lion("train", "--data", data, "--method", "linear", "--shots", 1, "--epochs", 1,
                "--runs", tmp_path / "[runs]", "--name", "a$b$")  # fmt: skip
    assert done.code == 0, done.err
    run = tmp_path / "[runs]" / "a$b$"
    assert (run / "curves.png").exists()
    assert (run / "confusion.png").exists()
    report = lion("eval", run, "--report")
    assert report.code == 0, report.err
    assert "\x1b" not in report.out
    again = lion("eval", run, "--data", data)
    assert again.code == 0, again.err
    assert not [each for each in recwarn if "not drawn" in str(each.message)]
