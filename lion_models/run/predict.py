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
    "Prediction",
    "evaluate_on",
    "gather_images",
    "predict",
    "write_predictions",
]

UNREADABLE = ("fail", "skip")
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

    def to_dict(self, classes: Sequence[str]) -> dict[str, Any]:
        """`file`, `class`, `probability`, and `probabilities` by class name."""
        return {
            "file": written(str(self.path)),
            "class": written(classes[self.best]),
            "probability": self.probabilities[self.best],
            "probabilities": dict(zip(map(written, classes), self.probabilities, strict=True)),
        }


def write_predictions(
    file: IO[str], form: str, classes: Sequence[str], predictions: Iterable[Prediction]
) -> int:
    """Write predictions as they come, as `csv` (one column per class) or `json` (a list).

    Args:
        file: open for writing.
        form: `csv` or `json`.
        classes: names, in the order of the probabilities.
        predictions: without errors.

    Returns:
        How many there were.
    """
    count = 0
    writer = csv.writer(file, lineterminator="\n")
    if form == "csv":
        writer.writerow(
            ["file", "class", "probability", *(f"p_{written(name)}" for name in classes)]
        )
    for count, one in enumerate(predictions, start=1):
        if form == "csv":
            values = (f"{value:.6f}" for value in (one.probabilities[one.best], *one.probabilities))
            writer.writerow([shown(str(one.path)), shown(classes[one.best]), *values])
        else:
            file.write("[\n" if count == 1 else ",\n")
            file.write(json.dumps(one.to_dict(classes)))
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
