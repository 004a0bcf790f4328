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
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lion_models.base.errors import UserError
from lion_models.base.files import write_json
from lion_models.data.base import TEST, TRAIN, VALIDATION, Source
from lion_models.data.loader import ImageCache, Images

__all__ = [
    "SealedTest",
    "Split",
    "Task",
    "class_counts",
    "earlier_reading",
    "fitting_shots",
    "make_task",
    "split_rows",
    "split_source",
    "take_task",
]

TEST_SHARE = 0.3
VALIDATION_SHARE = 0.1
LEAST_IMAGES = 3  # of a class: one for each part
_TEST_SEED = 2303_09992


@dataclass(frozen=True)
class Split:
    """Rows of a source, sorted: int64 (n,) each, disjoint."""

    train: Tensor
    validation: Tensor
    test: Tensor


@dataclass(frozen=True)
class Task:
    """What a method may learn from: images uint8 (n, C, S, S), labels int64 (n,), no test set.

    Training images are (n, C, R, R), R > S, where the transform crops at random; see `Geometry`.
    """

    classes: tuple[str, ...]
    train_images: Images
    train_labels: Tensor
    validation_images: Images
    validation_labels: Tensor


class SealedTest:
    """The test images, which only `measure` may touch.

    Args:
        source: where they are.
        rows: int64 (n,), which they are.
        cache: decodes them; None keeps none.

    The result is written to a ledger beside the run with the fingerprint of the weights that were
    measured. A second reading with other weights is refused: whatever was changed after the test
    score was known could have been chosen by it.
    """

    def __init__(self, source: Source, rows: Tensor, cache: ImageCache | None = None) -> None:
        self._images = (cache or ImageCache(limit=0)).images(source, rows)
        self._labels = source.labels[rows]

    def __len__(self) -> int:
        return len(self._labels)

    def measure(
        self,
        ledger: Path,
        weights: str,
        score: Callable[[Tensor, Tensor], dict[str, float]],
        chunk: int = 2000,
        again: bool = False,
        also: Callable[[], dict[str, float]] = dict,
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
            also: gives figures that are no means, once all images are scored.

        Returns:
            The mean of each value of `score`, with `images` and `weights`.

        Raises:
            UserError: the ledger shows a reading with other weights.
        """
        earlier = earlier_reading(ledger, weights)
        if earlier is not None and not again:
            return earlier
        totals: dict[str, float] = {}
        labels = self._labels.split(chunk)
        for images, truth in zip(self._images.split(chunk), labels, strict=True):
            for key, value in score(images, truth).items():
                totals[key] = totals.get(key, 0.0) + value
        result: dict[str, Any] = {key: value / len(self) for key, value in totals.items()}
        result |= {**also(), "images": len(self), "weights": weights}
        write_json(ledger, result)
        return result


def earlier_reading(ledger: Path, weights: str) -> dict[str, Any] | None:
    """What a ledger holds for these weights, without any data; None where there is no ledger.

    Raises:
        UserError: it shows a reading with other weights.
    """
    if not ledger.exists():
        return None
    earlier: dict[str, Any] = json.loads(ledger.read_text())
    if earlier["weights"] != weights:
        raise UserError(
            f"{ledger}: the test set was read with other weights already; start a "
            "new run instead of changing this one"
        )
    return earlier


def split_rows(
    labels: Tensor,
    classes: tuple[str, ...],
    seed: int,
    shots: int | None,
    validation_shots: int | None = None,
    test_cap: int | None = None,
    *,
    official: Tensor | None = None,
    imbalance: float | None = None,
    fold: tuple[int, int] | None = None,
) -> Split:
    """Divide the rows of every class into train, validation and test.

    Args:
        labels: int64 (N,).
        classes: class names, for the messages.
        seed: draws training and validation rows; the test rows (30% of a class, or the data set's
            own) do not depend on it.
        shots: training images per class; None takes all that test and validation leave.
        validation_shots: validation images per class; None takes all of the data set's own
            validation part, else as many as `shots`, or 10% of the class when `shots` is None.
        test_cap: most test images per class; None keeps all.
        official: int8 (N,), the part of each row in the data set's own split; see `Source`. A part
            that it does not have is drawn from its training rows.
        imbalance: training images of the first class over those of the last, 1 or more. Class c of
            C keeps floor(n imbalance^(-c / (C-1))) of them, n being `shots` or the most that
            every class can give (Cui et al., CVPR 2019, section 5.1). Validation stays as it is in
            the balanced split, of which this one is a part.
        fold: which of how many, from 1: its rows are the test rows, in the place of 30%. Every row
            is in one fold, and which one depends on neither the seed nor other classes.

    Raises:
        UserError: a class has too few images, or folds were asked for and the data set brings a
            test part.
    """
    for option, count in (("`shots`", shots), ("`validation_shots`", validation_shots)):
        if count is not None and count < 1:
            raise UserError(f"{option}: expected 1 or more, got {count}")
    factors = _profile(len(classes), imbalance)
    if fold is not None:
        _check_folds(labels, classes, official, fold[1])
    pools = [_pool(labels, official, seed, label, test_cap, fold) for label in range(len(classes))]
    held = _validation_counts(pools, shots, validation_shots, balanced=imbalance is not None)
    rooms = [
        len(pool.train) - (0 if pool.validation is not None else count)
        for pool, count in zip(pools, held, strict=True)
    ]
    if imbalance is None:
        wanted = rooms if shots is None else [shots] * len(classes)
    else:
        most = min(room / factor for room, factor in zip(rooms, factors, strict=True))
        top = most if shots is None else shots
        wanted = [int(top * factor + 1e-9) for factor in factors]
        if wanted[-1] < 1 <= wanted[0]:
            raise UserError(
                f"`imbalance` {imbalance:g}: leaves class '{classes[-1]}' no image, because the "
                f"first class has {wanted[0]}; lower `imbalance` to at most {wanted[0]} or raise "
                "`shots`"
            )
    advice = "lower `shots`"
    if shots is not None and imbalance is None and (most := _most_shots(pools, validation_shots)):
        advice += f" to {most}, the largest that every class has room for"
    parts: tuple[list[Tensor], list[Tensor], list[Tensor]] = ([], [], [])
    # The one that has least is the one to name.
    order = sorted(range(len(pools)), key=lambda label: rooms[label] - wanted[label])
    for label in order:
        figures = wanted[label], held[label], rooms[label]
        _check_room(pools[label], classes[label], *figures, shots, advice)
    for pool, count, keep, room in zip(pools, wanted, held, rooms, strict=True):
        parts[0].append(pool.train[:count])
        if pool.validation is not None:
            parts[1].append(pool.validation[:keep])
        else:
            start = room if shots is None else min(shots, room)
            parts[1].append(pool.train[start : start + keep])
        parts[2].append(pool.test)
    train_rows, validation_rows, test_rows = (torch.cat(part).sort().values for part in parts)
    return Split(train_rows, validation_rows, test_rows)


def fitting_shots(source: Source, shots: int, validation_shots: int | None = None) -> int:
    """`shots`, or as many training images as the smallest class has room for; 0 where it has none.

    Args:
        source: to be split.
        shots: what is wanted.
        validation_shots: see `split_rows`.
    """
    labels, official = source.labels, source.official
    pools = [_pool(labels, official, 0, label, None) for label in range(len(source.classes))]
    return min(shots, _most_shots(pools, validation_shots))


def _most_shots(pools: list[_Pool], validation_shots: int | None) -> int:
    """The largest `shots` that every class has room for, validation being as large by default."""

    def room(pool: _Pool) -> int:
        if pool.validation is not None:
            return len(pool.train)
        count = len(pool.train)
        return count // 2 if validation_shots is None else count - validation_shots

    return max(0, min(map(room, pools)))


class _Pool(NamedTuple):
    """The rows of one class, shuffled: training by the seed, test by a seed of its own."""

    train: Tensor
    validation: Tensor | None
    test: Tensor
    images: int
    tested: int


def _pool(
    labels: Tensor,
    official: Tensor | None,
    seed: int,
    label: int,
    test_cap: int | None,
    fold: tuple[int, int] | None = None,
) -> _Pool:
    rows = (labels == label).nonzero().squeeze(1)
    count = len(rows)
    part = torch.full_like(rows, TRAIN) if official is None else official[rows]
    own_test, own_validation = (
        official is not None and bool((official == role).any()) for role in (TEST, VALIDATION)
    )
    shuffled = torch.randperm(count, generator=_generator(_TEST_SEED, label))
    rows, part = rows[shuffled], part[shuffled]
    train = rows[part == TRAIN]
    if own_test:
        test = rows[part == TEST]
    elif fold is not None:
        # The first fold is not the one that has more of every class.
        inside = (torch.arange(len(train)) + label) % fold[1] == fold[0] - 1
        test, train = train[inside], train[~inside]
    else:
        taken = max(1, round(TEST_SHARE * len(train)))
        test, train = train[:taken], train[taken:]
    train = train[torch.randperm(len(train), generator=_generator(seed, label))]
    validation = None
    if own_validation:
        validation = rows[part == VALIDATION]
        order = torch.randperm(len(validation), generator=_generator(seed, label))
        validation = validation[order]
    return _Pool(train, validation, test[:test_cap], count, len(test))


def _check_folds(
    labels: Tensor, classes: tuple[str, ...], official: Tensor | None, folds: int
) -> None:
    """Raise UserError where the data has a test part, or a class cannot be in every fold."""
    if official is not None and bool((official == TEST).any()):
        raise UserError(
            "`folds`: the data has a test part of its own, and folds would test on others; leave "
            "`folds` out, or name the training part alone as `data`"
        )
    free = labels if official is None else labels[official == TRAIN]
    counts = torch.bincount(free, minlength=len(classes))
    least = int(counts.min())
    if least < folds:
        name = classes[int(counts.argmin())]
        instead = f"lower `folds` to at most {least}" if least > 1 else "add images"
        raise UserError(
            f"`folds`: class '{name}' has {least} image{'s' * (least > 1)}, fewer than {folds} "
            f"folds; {instead}, or leave the class out"
        )


def _profile(classes: int, imbalance: float | None) -> list[float]:
    if imbalance is None or classes < 2:
        return [1.0] * classes
    if not imbalance >= 1:
        raise UserError(f"`imbalance`: expected 1 or more, got {imbalance:g}")
    return [imbalance ** (-label / (classes - 1)) for label in range(classes)]


def _validation_counts(
    pools: list[_Pool], shots: int | None, validation_shots: int | None, balanced: bool
) -> list[int]:
    """Validation images of each class; `balanced` takes the same share of all."""
    if validation_shots is not None:
        return [validation_shots] * len(pools)
    smallest = min(pool.images for pool in pools)
    counts = []
    for pool in pools:
        if pool.validation is not None:
            counts.append(len(pool.validation))
        elif shots is not None:
            counts.append(shots)
        else:
            share = smallest if balanced else pool.images
            counts.append(max(1, round(VALIDATION_SHARE * share)))
    return counts


def _check_room(
    pool: _Pool, name: str, wanted: int, held: int, room: int, shots: int | None, advice: str
) -> None:
    """Raise UserError where a class has too few images.

    Args:
        pool: of the class.
        name: of the class.
        wanted, held: images for training and for validation.
        room: for training.
        shots: what was asked for; None means all.
        advice: what to do about it.
    """
    if pool.validation is not None:
        if held > len(pool.validation):
            raise UserError(
                f"class '{name}' has {len(pool.validation)} images in the data set's own "
                f"validation part, {held} were asked for; lower `validation_shots`"
            )
        # Small sets of many classes do leave one out of their own training part.
        if wanted <= room and (wanted >= 1 or shots is None):
            return
        raise UserError(
            f"class '{name}' has {len(pool.train)} images in the data set's own training part, "
            f"{wanted} were asked for; {advice}, or use `shots` all"
        )
    if 1 <= wanted <= room:
        return
    if pool.images < LEAST_IMAGES:
        count = f"{pool.images} image{'s' * (pool.images > 1)}"
        raise UserError(
            f"class '{name}' has {count}; expected {LEAST_IMAGES} or more, one each for "
            "training, validation and test; add images or leave the class out"
        )
    raise UserError(
        f"class '{name}' has {pool.images} images, of which {pool.tested} are kept for the "
        f"test; {max(wanted, 1)} for training and {held} for validation are more than the "
        f"{len(pool.train)} left; {advice}, or `validation_shots`, or add images"
    )


def _generator(seed: int, label: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed * 1_000_003 + label)


def split_source(
    source: Source,
    seed: int,
    shots: int | None,
    validation_shots: int | None = None,
    test_cap: int | None = None,
    imbalance: float | None = None,
    fold: tuple[int, int] | None = None,
) -> Split:
    """`split_rows` of a source, with the split that the data set brings."""
    return split_rows(
        source.labels,
        source.classes,
        seed,
        shots,
        validation_shots,
        test_cap,
        official=source.official,
        imbalance=imbalance,
        fold=fold,
    )


def make_task(
    source: Source,
    seed: int,
    shots: int | None,
    validation_shots: int | None = None,
    test_cap: int | None = None,
    imbalance: float | None = None,
) -> Task:
    """Split a source and take its training and validation images.

    Args:
        source: of `open_source`.
        seed: draws training and validation images; test images do not depend on it.
        shots: training images per class; None takes all that test and validation leave.
        validation_shots: validation images per class; None takes all of the data set's own
            validation part, else as many as `shots`, or 10% of the class when `shots` is None.
        test_cap: most test images per class; None keeps all.
        imbalance: training images of the first class over those of the last, 1 or more; the
            classes between fall geometrically. None is balanced.

    Raises:
        UserError: a class has too few images.
    """
    split = split_source(source, seed, shots, validation_shots, test_cap, imbalance)
    return take_task(source, split)


def take_task(source: Source, split: Split, cache: ImageCache | None = None) -> Task:
    """The training and validation images of a split.

    Args:
        source, split: which images.
        cache: decodes them when they are used. None decodes them now, to tensors, where all of
            them fit into a cache's usual limit.
    """
    keeper = ImageCache() if cache is None else cache
    train = keeper.images(source, split.train, training=True)
    validation = keeper.images(source, split.validation)
    fits = cache is None and keeper.limit >= sum(
        images[:1].nbytes * len(images) for images in (train, validation)
    )
    return Task(
        classes=source.classes,
        train_images=train[:] if fits else train,
        train_labels=source.labels[split.train],
        validation_images=validation[:] if fits else validation,
        validation_labels=source.labels[split.validation],
    )


def class_counts(task: Task) -> Tensor:
    """Training images of each class: int64 (C,)."""
    return torch.bincount(task.train_labels, minlength=len(task.classes))
