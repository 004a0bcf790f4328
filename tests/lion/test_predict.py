"""`lion predict` names several classes, and says where it is unsure."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path

import pytest

from lion_models.base.errors import UserError
from lion_models.run.predict import Answers, Prediction
from tests.support.command import CLASSES, Lion

ONE = Prediction(Path("a.png"), (0.2, 0.5, 0.3))


def test_the_most_probable_classes_come_first_and_equal_ones_in_order():
    assert Answers(CLASSES, top=2).ranked(ONE) == [("light", 0.5), ("middle", 0.3)]
    assert len(Answers(CLASSES, top=9).ranked(ONE)) == 3
    tied = Prediction(Path("a.png"), (0.25, 0.5, 0.25))
    assert [name for name, _ in Answers(CLASSES, top=3).ranked(tied)] == ["light", "dark", "middle"]


def test_an_answer_below_the_threshold_is_unsure_and_one_at_it_is_not():
    assert Answers(CLASSES, threshold=0.5).name(ONE) == "light"
    assert Answers(CLASSES, threshold=0.51).name(ONE) == "unsure"
    assert Answers(CLASSES, 2, 0.51).to_dict(ONE) == {
        "file": "a.png",
        "class": "unsure",
        "probability": 0.5,
        "top": [{"class": "light", "probability": 0.5}, {"class": "middle", "probability": 0.3}],
        "probabilities": {"dark": 0.2, "light": 0.5, "middle": 0.3},
    }


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"top": 0}, "`top`: expected 1 or more, got 0"),
        ({"threshold": 1.5}, "`threshold`: expected a probability, got 1.5"),
        ({"threshold": float("nan")}, "`threshold`: expected a probability, got nan"),
        ({"threshold": 0.5, "classes": ("unsure", "b")}, "a class of the run is called 'unsure'"),
    ],
)
def test_what_cannot_be_told_is_refused(given: dict[str, object], message: str):
    with pytest.raises(UserError, match=message):
        Answers(**{"classes": CLASSES, **given})


def test_top_and_threshold_are_in_table_csv_and_json(
    lion: Lion, trained: Path, image_folder: Path, tmp_path: Path
):
    folder = image_folder / "dark"
    given = ("predict", trained, folder, "--top", 2, "--threshold", 1)
    table = lion(*given)
    assert table.code == 0, table.err
    assert table.out.count("unsure") == 12 + table.out.count("unsure of")
    assert "unsure of 12 of 12: no class has 1" in table.err
    plain = list(csv.DictReader(io.StringIO(lion("predict", trained, folder, "--format",
                                                 "csv").out)))  # fmt: skip
    lion(*given, "--output", tmp_path / "p.csv")
    with (tmp_path / "p.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    lion(*given, "--output", tmp_path / "p.json")
    written = json.loads((tmp_path / "p.json").read_text())
    for row, before, one in zip(rows, plain, written, strict=True):
        assert row["class"] == one["class"] == "unsure"
        assert row["class_1"] == one["top"][0]["class"] == before["class"]
        assert row["probability"] == row["probability_1"] == before["probability"]
        assert row["probability_2"] == f"{one['top'][1]['probability']:.6f}"
        assert len(one["top"]) == 2
    assert "class_1" not in plain[0]
