"""Cross-validation: every image is tested once, by a run that has not seen it."""

from __future__ import annotations

import json
import statistics
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from lion_models import RunConfig
from lion_models.base.errors import UserError
from lion_models.data.base import TEST, TRAIN
from lion_models.data.splits import split_rows
from tests.support.command import Lion


@given(
    counts=st.lists(st.integers(5, 17), min_size=2, max_size=4),
    folds=st.integers(2, 5),
    seed=st.integers(0, 9),
    data=st.data(),
)
@settings(max_examples=30)
def test_every_row_is_in_one_fold_whatever_the_seed(
    counts: list[int], folds: int, seed: int, data: st.DataObject
):
    labels = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
    labels = labels[torch.tensor(data.draw(st.permutations(range(len(labels)))))]
    classes = tuple("abcd"[: len(counts)])
    parts = [split_rows(labels, classes, seed, None, fold=(f, folds)) for f in range(1, folds + 1)]
    assert torch.cat([part.test for part in parts]).sort().values.equal(torch.arange(len(labels)))
    for part in parts:
        rows = torch.cat([part.train, part.validation, part.test])
        assert rows.sort().values.equal(torch.arange(len(labels)))
        spread = torch.bincount(labels[part.test], minlength=len(counts)) * folds
        assert (spread - torch.tensor(counts)).abs().max() < folds
    other = split_rows(labels, classes, seed + 1, None, fold=(1, folds))
    assert other.test.equal(parts[0].test)
    sizes = [len(part.test) for part in parts]
    assert max(sizes) - min(sizes) <= 1 or len(counts) > folds or len(set(counts)) > 1


def test_what_cannot_be_folded_is_refused():
    labels = torch.tensor([0] * 8 + [1] * 3)
    with pytest.raises(UserError, match=r"class 'b' has 3 images, fewer than 5 folds; lower `folds"
                                        r"` to at most 3"):  # fmt: skip
        split_rows(labels, ("a", "b"), 1, None, fold=(1, 5))
    parts = torch.tensor([TRAIN, TEST] * 5 + [TRAIN])
    with pytest.raises(UserError, match="the data has a test part of its own"):
        split_rows(labels, ("a", "b"), 1, None, official=parts, fold=(1, 2))
    for wrong in ({"fold": 1}, {"folds": 3, "fold": 4}, {"folds": 1}, {"folds": 3}):
        with pytest.raises(UserError, match=r"`folds?`"):
            RunConfig.of("digits", **wrong)


@pytest.mark.drawn
def test_train_with_folds_shows_each_and_their_mean_and_goes_on(
    lion: Lion, image_folder: Path, backbone_file: Path, tmp_path: Path
):
    arguments = ("train", "--data", image_folder, "--backbone", backbone_file, "--method",
                 "linear", "--epochs", 2, "--folds", 4, "--runs", tmp_path,
                 "--name", "k")  # fmt: skip
    first = lion(*arguments)
    assert first.code == 0, first.err
    assert "images: 24 for training, 3 for validation, 9 for test (fold 1 of 4)" in first.out
    written = json.loads((tmp_path / "k" / "compare.json").read_text())
    assert [cell["fold"] for cell in written["cells"]] == [1, 2, 3, 4]
    assert sum(cell["test_images"] for cell in written["cells"]) == 36
    accuracies = [cell["test_accuracy"] for cell in written["cells"]]
    [row] = written["summary"]
    assert row["test_accuracy"] == pytest.approx(statistics.fmean(accuracies))
    assert row["test_spread"] == pytest.approx(statistics.stdev(accuracies))
    assert f"{100 * row['test_accuracy']:.1f} ± {100 * row['test_spread']:.1f}" in first.out
    assert np.asarray(Image.open(tmp_path / "k" / "compare.png")).std() > 10
    # What is missing is trained, and nothing else.
    stamps = {run: run.stat().st_mtime_ns for run in (tmp_path / "k").glob("*/result.json")}
    gone = tmp_path / "k" / "linear-s42-fold2" / "result.json"
    gone.unlink()
    again = lion(*arguments)
    assert again.code == 0, again.err
    changed = [run for run, stamp in stamps.items() if run.stat().st_mtime_ns != stamp]
    assert changed == [gone]
    assert json.loads((tmp_path / "k" / "compare.json").read_text())["summary"][0][
        "test_accuracy"] == row["test_accuracy"]  # fmt: skip


def test_compare_takes_folds_with_one_seed_and_one_fold_is_a_run(
    lion: Lion, image_folder: Path, backbone_file: Path, tmp_path: Path
):
    shared = ("--data", image_folder, "--backbone", backbone_file, "--epochs", 1, "--folds", 2,
              "--runs", tmp_path)  # fmt: skip
    done = lion("compare", *shared, "--methods", "linear,bias")
    assert done.code == 0, done.err
    names = {path.parent.name for path in tmp_path.glob("*/*/test.json")}
    assert names == {"linear-s42-fold1", "linear-s42-fold2", "bias-s42-fold1", "bias-s42-fold2"}
    one = lion("train", *shared, "--method", "linear", "--fold", 2)
    assert one.code == 0, one.err
    assert (tmp_path / f"{image_folder.name}-linear-s42-fold2" / "test.json").is_file()
    for wrong in (("--no-test",), ("--tensorboard",)):
        refused = lion("train", *shared, *wrong)
        assert refused.code == 2
        assert "--folds: runs a study" in refused.err
