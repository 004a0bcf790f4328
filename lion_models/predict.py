"""Class probabilities for image files, and accuracy on another data set."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from lion_models.data import decode_image, find_images, open_source
from lion_models.errors import UserError
from lion_models.training.checkpoint import LoadedRun
from lion_models.training.trainer import freeze_images, score

__all__ = ["evaluate_on", "format_predictions", "gather_images", "predict"]

CHUNK = 500


def gather_images(paths: Sequence[Path]) -> list[Path]:
    """Files as given, folders as the images below them.

    Raises:
        UserError: a path that does not exist, or a folder without images.
    """
    found: list[Path] = []
    for path in paths:
        if path.is_dir():
            inside = find_images(path)
            if not inside:
                raise UserError(f"{path}: no image in this folder")
            found += inside
        elif path.is_file():
            found.append(path)
        else:
            raise UserError(f"{path}: no such file or folder; expected an image or a folder")
    return found


def predict(run: LoadedRun, images: Sequence[Path]) -> list[dict[str, Any]]:
    """One row per image: `file`, `class`, `probability`, and `probabilities` by class name."""
    backbone = run.model.backbone
    device = run.model.head.weight.device
    rows = []
    chunk = backbone.evaluation_batch
    for start in range(0, len(images), chunk):
        paths = images[start : start + chunk]
        pixels = torch.stack(
            [
                decode_image(path, backbone.channels, backbone.image_size, run.config.transform)
                for path in paths
            ]
        )
        with torch.no_grad():
            probabilities = run.model(pixels.to(device).float() / 255).softmax(1).cpu()
        for path, row in zip(paths, probabilities.tolist(), strict=True):
            best = max(range(len(row)), key=row.__getitem__)
            rows.append(
                {
                    "file": str(path),
                    "class": run.classes[best],
                    "probability": row[best],
                    "probabilities": dict(zip(run.classes, row, strict=True)),
                }
            )
    return rows


def format_predictions(rows: Sequence[dict[str, Any]], form: str) -> str:
    """Predictions as `csv` (one column per class) or `json`."""
    if form == "json":
        return json.dumps(rows, indent=2)
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    names = list(rows[0]["probabilities"])
    writer.writerow(["file", "class", "probability", *(f"p_{name}" for name in names)])
    for row in rows:
        values = (f"{value:.6f}" for value in (row["probability"], *row["probabilities"].values()))
        writer.writerow([row["file"], row["class"], *values])
    return text.getvalue().rstrip("\n")


def evaluate_on(run: LoadedRun, data: str) -> dict[str, float]:
    """Mean accuracy and cross-entropy on every image of another data set with the same classes.

    Raises:
        UserError: the data's classes are not the run's.
    """
    model = run.model
    backbone, transform = model.backbone, run.config.transform
    source = open_source(data, backbone.channels, backbone.image_size, transform=transform)
    if source.classes != run.classes:
        raise UserError(
            f"--data {data}: has classes {', '.join(source.classes)}; the run was "
            f"trained for {', '.join(run.classes)}"
        )
    totals: dict[str, float] = {}
    for rows in torch.arange(len(source)).split(CHUNK):
        images, labels = source.load(rows), source.labels[rows].to(model.head.weight.device)
        for key, value in score(model, freeze_images(model, images), labels).items():
            totals[key] = totals.get(key, 0.0) + value
    return {key: value / len(source) for key, value in totals.items()} | {"images": len(source)}
