"""Data sets' own splits, and long tails."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lion_models.base.errors import UserError
from lion_models.data import (
    ArraySource,
    class_counts,
    make_task,
    split_rows,
    split_source,
)
from lion_models.data.base import TEST, TRAIN, VALIDATION
from tests.support.command import Lion


def rows_of(count: int, classes: int) -> tuple[torch.Tensor, tuple[str, ...]]:
    return torch.arange(count * classes) % classes, tuple(map(str, range(classes)))


def per_class(rows: torch.Tensor, labels: torch.Tensor, classes: int) -> list[int]:
    return torch.bincount(labels[rows], minlength=classes).tolist()


def test_long_tail_has_the_exponential_profile_of_its_ratio():
    labels, classes = rows_of(800, 10)
    split = split_rows(labels, classes, 3, 200, 20, imbalance=100)
    # floor(200 * 100 ** (-c / 9)) by hand
    assert per_class(split.train, labels, 10) == [200, 119, 71, 43, 25, 15, 9, 5, 3, 2]
    assert per_class(split.validation, labels, 10) == [20] * 10
    assert per_class(split.test, labels, 10) == [240] * 10


@given(
    ratio=st.sampled_from([1, 2.5, 10, 50]),
    shots=st.sampled_from([50, None]),
    seed=st.integers(0, 1000),
    classes=st.integers(2, 6),
)
def test_long_tail_is_a_part_of_the_balanced_split(ratio, shots, seed, classes):
    labels, names = rows_of(200, classes)
    balanced = split_rows(labels, names, seed, shots, 20)
    tailed = split_rows(labels, names, seed, shots, 20, imbalance=ratio)
    assert torch.isin(tailed.train, balanced.train).all()
    assert torch.equal(tailed.validation, balanced.validation)
    assert torch.equal(tailed.test, balanced.test)
    again = split_rows(labels, names, seed, shots, 20, imbalance=ratio)
    assert torch.equal(tailed.train, again.train)
    counts = per_class(tailed.train, labels, classes)
    assert counts == sorted(counts, reverse=True)
    assert counts[0] == per_class(balanced.train, labels, classes)[0]
    assert counts[0] / counts[-1] == pytest.approx(ratio, rel=1 / counts[-1])


def test_larger_ratio_takes_images_away_and_changes_no_other():
    labels, names = rows_of(300, 4)
    mild, steep = (split_rows(labels, names, 5, 100, 10, imbalance=r) for r in (10, 100))
    assert torch.isin(steep.train, mild.train).all()


def test_long_tail_of_an_unequal_set_fits_its_smallest_class():
    labels = torch.tensor([0] * 100 + [1] * 40 + [2] * 400)
    split = split_rows(labels, ("a", "b", "c"), 0, None, 5, imbalance=4)
    # class a can give 100 - 30 - 5 = 65, b 40 - 12 - 5 = 23 and should give half of a's: 46, 23, 11
    assert per_class(split.train, labels, 3) == [46, 23, 11]


def test_validation_of_a_long_tail_is_balanced_even_if_the_data_are_not():
    labels = torch.tensor([0] * 100 + [1] * 40 + [2] * 400)
    split = split_rows(labels, ("a", "b", "c"), 0, None, imbalance=4)
    assert per_class(split.validation, labels, 3) == [4, 4, 4]


def test_a_tail_without_images_and_a_ratio_below_one_are_named():
    labels, names = rows_of(100, 5)
    with pytest.raises(UserError, match=r"`imbalance` 50: leaves class '4' no image.*at most 20"):
        split_rows(labels, names, 0, 20, imbalance=50)
    with pytest.raises(UserError, match=r"`imbalance`: expected 1 or more, got 0\.5"):
        split_rows(labels, names, 0, 20, imbalance=0.5)


def official_source(train: int = 12, validation: int = 4, test: int = 6) -> ArraySource:
    parts = [TRAIN] * train * 2 + [VALIDATION] * validation * 2 + [TEST] * test * 2
    official = torch.tensor(parts, dtype=torch.int8)
    images = torch.arange(len(parts), dtype=torch.uint8).view(-1, 1, 1, 1)
    labels = torch.arange(len(parts)) % 2
    return ArraySource("own", ("even", "odd"), labels, images, official=official)


def test_own_parts_keep_their_roles_for_every_seed():
    source = official_source()
    for seed in range(4):
        split = split_source(source, seed, shots=3)
        assert split.test.tolist() == list(range(32, 44))
        assert split.validation.tolist() == list(range(24, 32))
        assert split.train.max() < 24
        assert per_class(split.train, source.labels, 2) == [3, 3]
    everything = split_source(source, 0, shots=None)
    assert everything.train.tolist() == list(range(24))
    assert split_source(source, 0, 3, validation_shots=1).validation.numel() == 2
    assert split_source(source, 0, 3, test_cap=2).test.numel() == 4


def test_a_missing_own_part_is_drawn_from_the_training_part():
    source = official_source(train=20, validation=0)
    split = split_source(source, 1, shots=5)
    assert split.test.tolist() == list(range(40, 52))
    assert split.validation.max() < 40
    assert not torch.isin(split.validation, split.train).any()
    source = official_source(train=20, test=0)
    first, second = (split_source(source, seed, shots=5) for seed in (1, 2))
    assert torch.equal(first.test, second.test)
    assert len(first.test) == 12
    assert first.test.max() < 40
    assert first.validation.tolist() == list(range(40, 48))


def test_more_images_than_an_own_part_has_are_named():
    source = official_source()
    with pytest.raises(UserError, match="12 images in the data set's own training part, 13 were"):
        split_source(source, 0, shots=13)
    with pytest.raises(UserError, match="4 images in the data set's own validation part, 5 were"):
        split_source(source, 0, shots=3, validation_shots=5)


def test_class_counts_count_training_images():
    labels, names = rows_of(100, 3)
    images = torch.zeros(300, 1, 2, 2, dtype=torch.uint8)
    task = make_task(ArraySource("x", names, labels, images), 0, 20, 5, imbalance=4)
    assert class_counts(task).tolist() == [20, 10, 5]


def test_train_with_a_long_tail_records_the_images_of_each_class(
    lion: Lion, backbone_file: Path, tmp_path: Path
):
    done = lion("train", "--data", "digits", "--backbone", backbone_file, "--shots", 20,
                "--validation-shots", 2, "--epochs", 1, "--method", "linear", "--imbalance", 10,
                "--runs", tmp_path, "--name", "tail", "--no-test")  # fmt: skip
    assert done.code == 0, done.err
    result = (tmp_path / "tail" / "result.json").read_text()
    assert '"train_images": [\n    20,\n    15,\n    11,\n    9,\n    7,' in result
    wrong = lion("train", "--data", "digits", "--imbalance", 0.5, "--runs", tmp_path)
    assert wrong.code == 2
    assert "--imbalance: expected 1 or more and below 1,000,000, got 0.5" in wrong.err
