"""report.html stands alone, and its figures are those of the test set."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch

from lion_models.run import RunConfig
from lion_models.run.page import write_page
from lion_models.run.plots import dress, new_figure
from lion_models.run.reliability import (
    calibration,
    confused_pairs,
    surest_mistakes,
    top_accuracy,
)
from tests.support.command import Lion

pytestmark = pytest.mark.drawn

RESULT = {"parameters": {"trained": 9, "without_head": 0, "frozen": 9}, "best_epoch": 1,
          "epochs": 2, "validation_accuracy": 0.5, "train_images": [3, 3], "seconds": 1.0,
          "device": "cpu"}  # fmt: skip


class Balance(HTMLParser):
    """Raises where a tag is closed that is not the last one opened."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in ("meta", "img", "br", "line", "path"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in ("line", "path"):
            assert self.open.pop() == tag


def test_a_runs_page_needs_no_other_file_and_no_network(trained: Path):
    text = (trained / "report.html").read_text()
    addresses = re.findall(r'(?:src|href)="([^"]*)"', text)
    assert len(addresses) >= 2
    assert all(one.startswith("data:image/png;base64,") for one in addresses)
    assert "http" not in text
    parser = Balance()
    parser.feed(text)
    assert parser.open == []
    report = json.loads((trained / "report.json").read_text())
    assert f"Expected calibration error {100 * report['calibration']['ece']:.1f}%" in text
    assert f"{100 * report['top5_accuracy']:.1f}%" in text
    for heading in ("Curves", "Confusion", "Calibration", "Classes that are confused",
                    "Equilibrium solves", "Options"):  # fmt: skip
        assert heading in text
    wrong = report["images"] - sum(row[at] for at, row in enumerate(report["confusion"]))
    assert len(report["mistakes"]) == min(12, wrong)
    assert text.count("<figure>") == len(report["mistakes"])
    assert sum(one["images"] for one in report["calibration"]["bins"]) == report["images"]


def test_a_missing_page_is_written_again_without_the_data(lion: Lion, trained: Path):
    before = (trained / "report.html").read_text()
    (trained / "report.html").unlink()
    assert lion("eval", trained).code == 0
    assert (trained / "report.html").read_text() == before


def test_names_are_texts_and_not_marks(tmp_path: Path):
    name = "<script>alert(1)</script> & \udce9"
    write_page(tmp_path / "r.html", RunConfig.of(data=name, method="linear"), RESULT, {}, {})
    text = (tmp_path / "r.html").read_text()
    assert "<script>" not in text
    assert "&lt;script&gt;alert(1)&lt;/script&gt; &amp; \\udce9" in text


def test_calibration_is_the_gap_between_confidence_and_accuracy():
    chances = torch.tensor([[0.95, 0.05]] * 10 + [[0.25, 0.75]] * 4)
    truth = torch.tensor([0] * 6 + [1] * 4 + [1] * 3 + [0])
    figures = calibration(truth, chances)
    assert [one["images"] for one in figures["bins"]] == [4, 10]
    assert [one["accuracy"] for one in figures["bins"]] == pytest.approx([0.75, 0.6])
    assert figures["ece"] == pytest.approx(10 / 14 * 0.35, abs=1e-6)
    assert surest_mistakes(truth, chances) == [6, 7, 8, 9, 13]
    certain = torch.tensor([[1.0, 0.0]])
    assert calibration(torch.tensor([0]), certain)["ece"] == 0


def test_the_best_five_and_the_confused_pairs():
    chances = torch.arange(8.0).expand(8, 8).softmax(1)
    assert top_accuracy(torch.arange(8), chances) == pytest.approx(5 / 8)
    assert top_accuracy(torch.arange(2), chances[:2, :2]) == 1
    pairs = confused_pairs(("a", "b", "c"), [[5, 3, 0], [1, 9, 0], [0, 3, 1]])
    assert [(one["true"], one["predicted"], one["images"]) for one in pairs] == [
        ("a", "b", 3), ("c", "b", 3), ("b", "a", 1),
    ]  # fmt: skip
    assert pairs[1]["share"] == 0.75


def test_a_phone_shows_the_page_in_its_own_width(trained: Path):
    page = (trained / "report.html").read_text()
    assert 'name="viewport" content="width=device-width' in page
    assert page.count('<div class="scroll"><img ') == 2


def test_a_run_of_one_epoch_is_drawn_as_a_dot_with_whole_numbers():
    figure, [[axis]] = new_figure(4, 3)
    axis.plot([1], [50.0], label="validation")
    dress(axis, "Accuracy", "epoch", "accuracy (%)")
    figure.canvas.draw()
    low, high = axis.get_xlim()
    ticks = [tick for tick in axis.get_xticks() if low <= tick <= high]
    assert ticks == [1]
    assert axis.lines[0].get_marker() == "o"
