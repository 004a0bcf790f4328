"""Seeded, stratified splits; a test set that is read once.

The test images of a data set are the same for every seed, so nothing that was ever trained on or
chosen by validation, with any seed, is tested on. Seeds draw training and validation images from
the rest. Each draw depends on the seed and the class alone: adding a class does not reshuffle the
others.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lion_models.data.sources import Source
from lion_models.errors import UserError
from lion_models.files import write_json

__all__ = ["SealedTest", "Split", "Task", "make_task", "split_rows"]

TEST_SHARE = 0.3
VALIDATION_SHARE = 0.1
_TEST_SEED = 2303_09992


@dataclass(frozen=True)
class Split:
    """Rows of a source, sorted: int64 (n,) each, disjoint."""

    train: Tensor
    validation: Tensor
    test: Tensor


@dataclass(frozen=True)
class Task:
    """What a method may learn from: images uint8 (n, C, S, S), labels int64 (n,), no test set."""

    classes: tuple[str, ...]
    train_images: Tensor
    train_labels: Tensor
    validation_images: Tensor
    validation_labels: Tensor


class SealedTest:
    """The test images, which only `measure` may touch.

    The result is written to a ledger beside the run with the fingerprint of the weights that were
    measured. A second reading with other weights is refused: whatever was changed after the test
    score was known could have been chosen by it.
    """

    def __init__(self, source: Source, rows: Tensor) -> None:
        self._source = source
        self._rows = rows

    def __len__(self) -> int:
        return len(self._rows)

    def measure(
        self,
        ledger: Path,
        weights: str,
        score: Callable[[Tensor, Tensor], dict[str, float]],
        chunk: int = 2000,
        again: bool = False,
    ) -> dict[str, Any]:
        """Score the test set with final weights and write the ledger.

        Args:
            ledger: the file that remembers the reading; created here.
            weights: fingerprint of the weights that `score` uses.
            score: maps images uint8 (n, C, S, S) and labels (n,) to sums over the images; it is
                called on chunks and its sums are added and divided by the number of images.
            chunk: images decoded at a time.
            again: call `score` although the ledger holds a reading of these very weights, for what
                the ledger does not hold.

        Returns:
            The mean of each value of `score`, with `images` and `weights`.

        Raises:
            UserError: the ledger shows a reading with other weights.
        """
        if ledger.exists():
            earlier: dict[str, Any] = json.loads(ledger.read_text())
            if earlier["weights"] != weights:
                raise UserError(
                    f"{ledger}: the test set was read with other weights already; start a "
                    "new run instead of changing this one"
                )
            if not again:
                return earlier
        totals: dict[str, float] = {}
        for rows in self._rows.split(chunk):
            for key, value in score(self._source.load(rows), self._source.labels[rows]).items():
                totals[key] = totals.get(key, 0.0) + value
        result: dict[str, Any] = {key: value / len(self) for key, value in totals.items()}
        result |= {"images": len(self), "weights": weights}
        write_json(ledger, result)
        return result


def split_rows(
    labels: Tensor,
    classes: tuple[str, ...],
    seed: int,
    shots: int | None,
    validation_shots: int | None = None,
    test_cap: int | None = None,
) -> Split:
    """Divide the rows of every class into train, validation and test.

    Args:
        labels: int64 (N,).
        classes: class names, for the messages.
        seed: draws training and validation rows; the test rows (30% of a class) do not depend on
            it.
        shots: training images per class; None takes all that test and validation leave.
        validation_shots: validation images per class; None takes as many as `shots`, or 10% of the
            class when `shots` is None.
        test_cap: most test images per class; None keeps all.

    Raises:
        UserError: a class has too few images.
    """
    parts: tuple[list[Tensor], list[Tensor], list[Tensor]] = ([], [], [])
    for label, name in enumerate(classes):
        rows = (labels == label).nonzero().squeeze(1)
        count = len(rows)
        rows = rows[torch.randperm(count, generator=_generator(_TEST_SEED, label))]
        test_count = max(1, round(TEST_SHARE * count))
        test, rest = rows[:test_count][:test_cap], rows[test_count:]
        if validation_shots is not None:
            held = validation_shots
        else:
            held = max(1, round(VALIDATION_SHARE * count)) if shots is None else shots
        wanted = len(rest) - held if shots is None else shots
        if wanted < 1 or wanted + held > len(rest):
            raise UserError(
                f"class '{name}' has {count} images, of which {test_count} are kept for the test; "
                f"{max(wanted, 1)} for training and {held} for validation are more than the "
                f"{len(rest)} left; lower --shots or --validation-shots, or add images"
            )
        rest = rest[torch.randperm(len(rest), generator=_generator(seed, label))]
        parts[0].append(rest[:wanted])
        parts[1].append(rest[wanted : wanted + held])
        parts[2].append(test)
    train_rows, validation_rows, test_rows = (torch.cat(part).sort().values for part in parts)
    return Split(train_rows, validation_rows, test_rows)


def _generator(seed: int, label: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed * 1_000_003 + label)


def make_task(
    source: Source,
    seed: int,
    shots: int | None,
    validation_shots: int | None = None,
    test_cap: int | None = None,
) -> Task:
    """Split a source and decode its training and validation images; see `split_rows`."""
    split = split_rows(source.labels, source.classes, seed, shots, validation_shots, test_cap)
    return Task(
        classes=source.classes,
        train_images=source.load(split.train),
        train_labels=source.labels[split.train],
        validation_images=source.load(split.validation),
        validation_labels=source.labels[split.validation],
    )
