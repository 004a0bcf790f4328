"""Where classes are unequal, every headline has the balanced accuracy beside the accuracy."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from PIL import Image

from lion_models.run.balance import accuracy_text, are_unequal, balanced_accuracy
from lion_models.run.report import class_report
from lion_models.study.report import comparison_table, measured_markdown, summarise
from tests.support.command import Lion


@pytest.fixture
def long_tail(tmp_path: Path) -> Path:
    """Classes of 40, 12 and 6 images, which nothing tells apart."""
    generator = torch.Generator().manual_seed(0)
    for name, count in (("head", 40), ("middle", 12), ("tail", 6)):
        (tmp_path / "data" / name).mkdir(parents=True)
        for index in range(count):
            noise = torch.randint(0, 256, (12, 12), dtype=torch.uint8, generator=generator)
            Image.fromarray(noise.numpy()).save(tmp_path / "data" / name / f"{index}.png")
    return tmp_path / "data"


def test_balanced_accuracy_is_the_reports():
    truth = torch.tensor([0] * 8 + [1] * 4 + [2] * 2)
    predicted = torch.tensor([0] * 8 + [0, 0, 0, 1] + [0, 0])
    report = class_report(("a", "b", "c", "empty"), truth, predicted)
    assert balanced_accuracy(truth, predicted) == pytest.approx(report["balanced_accuracy"])
    assert are_unequal(truth)
    assert not are_unequal(torch.arange(12) % 3)
    assert accuracy_text({"accuracy": 0.81}) == "81.0%"
    assert accuracy_text({"accuracy": 0.81, "balanced_accuracy": 1 / 3}) == "81.0% (balanced 33.3%)"


def test_a_long_tail_shows_both_wherever_there_is_a_headline(
    lion: Lion, long_tail: Path, backbone_file: Path, tmp_path: Path
):
    options = ("--data", long_tail, "--backbone", backbone_file, "--shots", "all", "--epochs", 1,
               "--runs", tmp_path / "runs")  # fmt: skip
    done = lion("train", *options, "--method", "linear", "--name", "tail")
    assert done.code == 0, done.err
    for line in ("chosen epoch", "test accuracy"):
        [found] = [text for text in done.out.splitlines() if line in text]
        assert "(balanced " in found
    result = json.loads((tmp_path / "runs/tail/result.json").read_text())
    report = json.loads((tmp_path / "runs/tail/report.json").read_text())
    assert result["test"]["balanced_accuracy"] == pytest.approx(report["balanced_accuracy"])
    for arguments in ((), ("--data", long_tail)):
        measured = lion("eval", tmp_path / "runs/tail", *arguments)
        assert "(balanced " in measured.out
    compared = lion("compare", *options, "--methods", "linear", "--seeds", 1, "--name", "c")
    assert compared.code == 0, compared.err
    assert "balanced" in compared.out


def test_equal_classes_show_one(lion: Lion, trained: Path):
    assert "balanced" not in lion("eval", trained).out


def cell(method: str, balanced: float | None) -> dict[str, object]:
    return {"method": method, "seed": 1, "test_accuracy": 0.81, "validation_accuracy": 0.8,
            "trained": 4620, "without_head": 0, "kept": 4620, "kept_without_head": 0,
            "nonzero_without_head": 0, "seconds": 1.0, "solver_steps": None,
            **({} if balanced is None else {"test_balanced_accuracy": balanced})}  # fmt: skip


def test_tables_of_studies_have_a_column_where_classes_are_unequal():
    headings = [
        str(c.header) for c in comparison_table(summarise([cell("linear", 0.33)]), "").columns
    ]
    assert "balanced" in headings
    headings = [
        str(c.header) for c in comparison_table(summarise([cell("linear", None)]), "").columns
    ]
    assert "balanced" not in headings
    tests = [{"accuracy": 0.81, "balanced_accuracy": 0.333}, {"accuracy": 0.83,
             "balanced_accuracy": 0.353}]  # fmt: skip
    row = {"method": "linear", "condition": {}, "setting": {}, "tests": tests,
           "test_accuracy": 0.82, "parameters": {"without_head": 0}}  # fmt: skip
    text = measured_markdown({"options": {"data": "photos"}, "tested": [row]})
    assert "82.0 ± 1.4 / 34.3 ± 1.4" in text
    assert "after / the balanced one" in text
