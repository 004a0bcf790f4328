"""Class probabilities for image files, and accuracy on another data set."""

from __future__ import annotations

import csv
import json
import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

from lion_models.base.errors import UserError, choose, few
from lion_models.base.names import difference, look_alike, shown, written
from lion_models.data import open_source
from lion_models.data.files import walk, warn_of_left_out
from lion_models.data.images import UnreadableError, decode_file
from lion_models.data.loader import ImageCache
from lion_models.run.balance import balanced_figure
from lion_models.run.checkpoint import LoadedRun
from lion_models.run.trainer import freeze_images, score

__all__ = [
    "UNREADABLE",
    "UNSURE",
    "Answers",
    "Prediction",
    "evaluate_on",
    "gather_images",
    "predict",
    "write_predictions",
]

UNREADABLE = ("fail", "skip")
UNSURE = "unsure"
CHUNK = 100


def gather_images(paths: Sequence[Path]) -> list[Path]:
    """Files as given, folders as the images below them.

    Raises:
        UserError: a path that does not exist, or a folder without images.
    """
    found: list[Path] = []
    for path in paths:
        if path.is_dir():
            inside = walk(path)
            warn_of_left_out(inside.others, str(path))
            if not inside.images:
                raise UserError(f"{path}: no image in this folder")
            found += inside.images
        elif path.is_file():
            found.append(path)
        else:
            raise UserError(f"{path}: no such file or folder; expected an image or a folder")
    return found


def predict(
    run: LoadedRun, images: Sequence[Path], unreadable: str = "fail"
) -> Iterator[Prediction]:
    """Predictions in the order of the images, a few dozen images decoded at a time.

    Args:
        run: the classifier.
        images: files.
        unreadable: `fail`, or `skip`, which gives a prediction with `error` for each such file.

    Raises:
        UnreadableError: a file may not or cannot be read.
        UserError: a file is not an image, with `fail`.
    """
    choose("unreadable", unreadable, UNREADABLE)
    backbone = run.model.backbone
    device = run.model.head.weight.device
    geometry, chunk = run.geometry, backbone.evaluation_batch
    for start in range(0, len(images), chunk):
        pixels: list[Tensor] = []
        errors: dict[Path, str] = {}
        for path in images[start : start + chunk]:
            try:
                pixels.append(decode_file(path, geometry))
            except UnreadableError:
                raise
            except UserError as error:
                if unreadable == "fail":
                    raise UserError(f"{error}, or leave it out with `unreadable` skip") from error
                errors[path] = str(error)
        rows: Iterator[list[float]] = iter(())
        if pixels:
            with torch.no_grad():
                batch = torch.stack(pixels).to(device).float() / 255
                rows = iter(run.model(batch).softmax(1).cpu().tolist())
        for path in images[start : start + chunk]:
            if path in errors:
                yield Prediction(path, (), errors[path])
            else:
                yield Prediction(path, tuple(next(rows)))


@dataclass(frozen=True)
class Prediction:
    """Class probabilities of one image.

    Attributes:
        path: the file.
        probabilities: in the order of the run's classes; empty where the file is unreadable.
        error: why it is unreadable.
    """

    path: Path
    probabilities: tuple[float, ...]
    error: str = ""

    @property
    def best(self) -> int:
        return max(range(len(self.probabilities)), key=self.probabilities.__getitem__)

    def ranked(self, count: int) -> list[int]:
        """The most probable classes, up to `count`, the first of equals first."""
        order = range(len(self.probabilities))
        return sorted(order, key=lambda label: -self.probabilities[label])[:count]


@dataclass(frozen=True)
class Answers:
    """How predictions are told.

    Args:
        classes: names, in the order of the probabilities.
        top: classes to name for each image, most probable first; those that there are, if fewer.
        threshold: where the most probable class has less, the answer is `unsure`.

    Raises:
        UserError: no class to name, no probability, or a class that is itself called `unsure`.
    """

    classes: Sequence[str]
    top: int = 1
    threshold: float = 0.0

    def __post_init__(self) -> None:
        if self.top < 1:
            raise UserError(f"`top`: expected 1 or more, got {self.top}")
        if not 0 <= self.threshold <= 1:
            raise UserError(f"`threshold`: expected a probability, got {self.threshold:g}")
        if self.threshold and UNSURE in self.classes:
            raise UserError(
                f"`threshold`: a class of the run is called '{UNSURE}' itself; leave the option "
                "out, and compare the probabilities"
            )

    def name(self, one: Prediction) -> str:
        """The class that is answered, or `unsure`."""
        sure = one.probabilities[one.best] >= self.threshold
        return self.classes[one.best] if sure else UNSURE

    def ranked(self, one: Prediction) -> list[tuple[str, float]]:
        """The most probable classes with their probabilities, whatever the threshold."""
        return [(self.classes[at], one.probabilities[at]) for at in one.ranked(self.top)]

    def columns(self) -> list[str]:
        """The heading of a CSV file."""
        ranks = range(1, min(self.top, len(self.classes)) + 1) if self.top > 1 else ()
        more = [heading for rank in ranks for heading in (f"class_{rank}", f"probability_{rank}")]
        return ["file", "class", "probability", *more, *(f"p_{written(c)}" for c in self.classes)]

    def cells(self, one: Prediction) -> list[str]:
        """A line of a CSV file."""
        ranked = self.ranked(one) if self.top > 1 else ()
        ranks = [text for name, chance in ranked for text in (shown(name), f"{chance:.6f}")]
        chances = (f"{value:.6f}" for value in (one.probabilities[one.best], *one.probabilities))
        return [shown(str(one.path)), shown(self.name(one)), next(chances), *ranks, *chances]

    def to_dict(self, one: Prediction) -> dict[str, Any]:
        """`file`, `class`, `probability`, where more than one is named `top`, and all
        `probabilities` by class name."""
        ranked = [
            {"class": written(name), "probability": chance} for name, chance in self.ranked(one)
        ]
        return {
            "file": written(str(one.path)),
            "class": written(self.name(one)),
            "probability": one.probabilities[one.best],
            **({"top": ranked} if self.top > 1 else {}),
            "probabilities": dict(zip(map(written, self.classes), one.probabilities, strict=True)),
        }


def write_predictions(
    file: IO[str], form: str, answers: Answers, predictions: Iterable[Prediction]
) -> int:
    """Write predictions as they come, as `csv` (one column per class) or `json` (a list).

    Args:
        file: open for writing.
        form: `csv` or `json`.
        answers: how each is told.
        predictions: without errors.

    Returns:
        How many there were.
    """
    count = 0
    writer = csv.writer(file, lineterminator="\n")
    if form == "csv":
        writer.writerow(answers.columns())
    for count, one in enumerate(predictions, start=1):
        if form == "csv":
            writer.writerow(answers.cells(one))
        else:
            file.write("[\n" if count == 1 else ",\n")
            file.write(json.dumps(answers.to_dict(one)))
    if form == "json":
        file.write("\n]\n" if count else "[]\n")
    return count


def evaluate_on(
    run: LoadedRun,
    data: str,
    predicted: list[Tensor] | None = None,
    bad_files: str | None = None,
    cache: ImageCache | None = None,
) -> tuple[dict[str, float], Tensor]:
    """Mean accuracy and cross-entropy on every image of another data set, of the run's classes.

    Args:
        run: the classifier.
        data: as for `data`.
        predicted: gets the predicted labels.
        bad_files: `fail` or `skip`; None means as the run was trained.
        cache: decodes the images; None keeps none.

    Returns:
        The figures, and the true labels.

    Raises:
        UserError: the data has a class that the run was not trained for.
    """
    model, geometry = run.model, run.geometry
    source = open_source(
        data,
        geometry.channels,
        geometry.size,
        transform=geometry.transform,
        bad_files=run.config.data.bad_files if bad_files is None else bad_files,
        levels=run.levels,
        classes=run.classes,
        draft=geometry.draft,
    )
    known = _known_labels(source.classes, run.classes, data)
    all_labels = known[source.labels]
    totals: dict[str, float] = {}
    predicted = [] if predicted is None else predicted
    everything = (cache or ImageCache(limit=0)).images(source, torch.arange(len(source)))
    labels = all_labels.to(model.head.weight.device).split(CHUNK)
    for images, truth in zip(everything.split(CHUNK), labels, strict=True):
        sums = score(model, freeze_images(model, images), truth, predicted)
        for key, value in sums.items():
            totals[key] = totals.get(key, 0.0) + value
    means = {key: value / len(source) for key, value in totals.items()}
    balanced = balanced_figure(all_labels, torch.cat(predicted))
    return {**means, **balanced, "images": len(source)}, all_labels


def _known_labels(classes: Sequence[str], known: Sequence[str], data: str) -> Tensor:
    """The run's label of each class of other data, which may lack some; int64 (classes,).

    Raises:
        UserError: a class that the run was not trained for.
    """
    alike = look_alike([name for name in classes if name not in known], known)
    unknown = [name for name in classes if name not in known and name not in alike]
    taken = [alike.get(name, name) for name in classes]
    twice = [name for name in taken if taken.count(name) > 1]
    if unknown or twice:
        what = f"{len(unknown)} classes that the run was not trained for: {few(unknown)}"
        if twice:
            what = f"several classes that are the run's '{twice[0]}'"
        raise UserError(
            f"`data` {data}: has {what}; the run was trained for {few(known)}; "
            "rename or remove the others"
        )
    if alike:
        one, other = next(iter(alike.items()))
        warnings.warn(
            f"`data` {data}: {len(alike)} classes are written otherwise than the run's, {one!r} "
            f"for {other!r} (they differ in {difference(one, other)}); they are taken for the same",
            stacklevel=3,
        )
    if len(taken) < len(known):
        missing = [name for name in known if name not in taken]
        warnings.warn(
            f"`data` {data}: has {len(taken)} of the run's {len(known)} classes, without "
            f"{few(missing)}; the figures are those of its own images",
            stacklevel=3,
        )
    return torch.tensor([known.index(name) for name in taken])
