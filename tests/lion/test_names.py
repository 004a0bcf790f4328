"""Names of files and classes that terminals, pictures and tables take for something else."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
from fontTools.fontBuilder import FontBuilder
from fontTools.pens.ttGlyphPen import TTGlyphPen
from matplotlib import font_manager

from lion_models.base.names import shown, written
from lion_models.run import plots
from lion_models.run.lettering import _fonts_for, lettering
from lion_models.run.plots import plot_confusion
from tests.support.command import Lion
from tests.support.small import noise

NOT_UTF8 = os.fsdecode(b"caf\xe9")


pytestmark = pytest.mark.drawn


def photos(folder: Path, *classes: str, images: int = 6) -> Path:
    for label, name in enumerate(classes):
        for index in range(images):
            noise(folder / name / f"{index}.png", seed=100 * label + index)
    return folder


def train(lion: Lion, data: Path, backbone: Path, runs: Path, *more: object):
    return lion("train", "--data", data, "--backbone", backbone, "--method", "linear", "--shots", 2,
                "--validation-shots", 2, "--epochs", 1, "--runs", runs, *more)  # fmt: skip


@pytest.mark.parametrize("name", ["$50_$100", "$x^$", "$\\frac$", "[bold]", ":cat:", "a|b", "日本"])
def test_a_run_with_any_class_name_is_trained_tested_and_shown(
    lion: Lion, tmp_path: Path, backbone_file: Path, name: str
):
    data = photos(tmp_path / "pics_$a_$b", name, "other")
    done = train(lion, data, backbone_file, tmp_path / "runs", "--name", "x")
    assert done.code == 0, done.err
    assert (tmp_path / "runs/x/curves.png").exists()
    assert (tmp_path / "runs/x/confusion.png").exists()
    report = lion("eval", tmp_path / "runs/x", "--report")
    assert report.code == 0, report.err
    assert name in report.out


def test_a_path_with_brackets_is_printed_as_it_is(lion: Lion, tmp_path: Path, backbone_file: Path):
    data = photos(tmp_path / "a[b]", "cat", "dog")
    done = train(lion, data, backbone_file, tmp_path / "runs", "--name", "exp[raw]")
    assert done.code == 0, done.err
    assert f"{tmp_path}/runs/exp[raw]/report.html" in done.out
    shown = lion("eval", tmp_path / "runs" / "exp[raw]", "--data", data)
    assert f"images of {data}" in "".join(shown.out.split("\n"))


def test_names_that_are_no_utf8_are_predicted_and_written(
    lion: Lion, trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("COLUMNS", "300")
    image = noise(tmp_path / "in" / "0.png").rename(tmp_path / "in" / f"{NOT_UTF8}.png")
    for form in ("csv", "json"):
        output = tmp_path / f"p.{form}"
        done = lion("predict", trained, image, image.parent, "--output", output)
        assert done.code == 0, done.err
        text = output.read_text(encoding="utf-8")
        rows = json.loads(text) if form == "json" else list(csv.DictReader(text.splitlines()))
        assert [Path(row["file"]).name for row in rows] == ["caf\\xe9.png"] * 2
    for form in ("table", "csv", "json"):
        done = lion("predict", trained, image, "--format", form)
        assert done.code == 0, done.err
        assert "caf" in done.out


def test_a_data_folder_and_classes_that_are_no_utf8_are_trained_on(
    lion: Lion, tmp_path: Path, backbone_file: Path
):
    data = photos(tmp_path / NOT_UTF8, NOT_UTF8, "tea")
    done = train(lion, data, backbone_file, tmp_path / "runs")
    assert done.code == 0, done.err
    run = next((tmp_path / "runs").glob("*linear*"))
    assert json.loads((run / "report.json").read_text())["classes"][0]["class"] == NOT_UTF8
    report = lion("eval", run, "--report")
    assert report.code == 0, report.err
    assert "caf\\xe9" in report.out


@pytest.mark.parametrize("form", ["table", "csv"])
def test_an_ascii_terminal_shows_what_it_has_no_letters_for(
    trained: Path, tmp_path: Path, form: str
):
    image = noise(tmp_path / "日本.png")
    command = [sys.executable, "-m", "lion_models", "predict", trained, image, "--format", form]
    env = os.environ | {"PYTHONIOENCODING": "ascii", "COLUMNS": "200"}
    done = subprocess.run(command, env=env, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr.decode()
    assert b"\\u65e5\\u672c.png" in done.stdout


def test_messages_hold_nothing_that_moves_the_cursor(lion: Lion, tmp_path: Path):
    missing = lion("train", "--data", f"{tmp_path}/\x1b[2Jgone\u202e")
    assert missing.code == 2
    assert "\\x1b[2Jgone\\u202e" in missing.err
    assert shown("a\tb\nc\x07") == "a\tb\nc\\x07"
    assert written(NOT_UTF8) == "caf\\xe9"
    assert written("\ud800é") == "\\ud800é"


@pytest.fixture
def installed_font(tmp_path: Path):
    """A font that matplotlib knows for the time of a test, with one letter, U+10FFEE."""
    pen = TTGlyphPen(None)
    pen.moveTo((0, 0))
    pen.lineTo((0, 800))
    pen.lineTo((800, 0))
    pen.closePath()
    builder = FontBuilder(1000, isTTF=True)
    builder.setupGlyphOrder([".notdef", "own"])
    builder.setupCharacterMap({0x10FFEE: "own"})
    builder.setupGlyf({".notdef": pen.glyph(), "own": pen.glyph()})
    builder.setupHorizontalMetrics({".notdef": (900, 0), "own": (900, 0)})
    builder.setupHorizontalHeader(ascent=800, descent=-200)
    builder.setupNameTable({"familyName": "Lion Test", "styleName": "Regular"})
    builder.setupOS2(sTypoAscender=800, sTypoDescender=-200)
    builder.setupPost()
    builder.save(tmp_path / "own.ttf")
    before = list(font_manager.fontManager.ttflist)
    font_manager.fontManager.addfont(tmp_path / "own.ttf")
    _fonts_for.cache_clear()
    yield
    font_manager.fontManager.ttflist[:] = before
    _fonts_for.cache_clear()


def confusion(name: str) -> dict[str, object]:
    rows = [{"class": each, "support": 1} for each in (name, "b")]
    return {"classes": rows, "confusion": [[1, 0], [0, 1]], "images": 2, "accuracy": 1.0}


def test_letters_are_drawn_by_a_font_that_has_them(installed_font: None, tmp_path: Path):
    assert lettering("a\U0010ffee\U0010fff0$") == "a\U0010ffee\\U0010fff0\\$"
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # matplotlib warns of each letter that it draws as a box
        plot_confusion(tmp_path / "c.png", confusion("\U0010ffee\U0010fff0 日本"))
    assert (tmp_path / "c.png").exists()


def test_a_picture_that_cannot_be_drawn_is_a_warning(tmp_path: Path):
    broken = confusion("a") | {"accuracy": "none"}
    with pytest.warns(UserWarning, match=r"c\.png: not drawn \(ValueError"):
        plot_confusion(tmp_path / "c.png", broken)


def test_a_run_whose_pictures_cannot_be_drawn_is_measured(
    lion: Lion, tmp_path: Path, backbone_file: Path, monkeypatch: pytest.MonkeyPatch
):
    def fail(*size: object, **options: object) -> None:
        raise RuntimeError("no canvas")

    monkeypatch.setattr(plots, "new_figure", fail)
    data = photos(tmp_path / "pics", "cat", "dog")
    with pytest.warns(UserWarning, match=r"confusion\.png: not drawn \(RuntimeError: no canvas\)"):
        done = train(lion, data, backbone_file, tmp_path / "runs", "--name", "x")
    assert done.code == 0, done.err
    assert (tmp_path / "runs/x/test.json").exists()
