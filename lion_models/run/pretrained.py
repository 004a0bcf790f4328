"""The folder of a tuned model: a run's checkpoint, and a JSON file that says what it is."""

from __future__ import annotations

import json
from dataclasses import fields
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import nn

import deqcore
from lion_models.backbones import FrozenBackbone, load_backbone
from lion_models.backbones.given import GIVEN, freeze_network, given_image_size
from lion_models.base.errors import UserError
from lion_models.base.files import make_folder, write_json
from lion_models.methods.base import count_parameters, trained_state
from lion_models.run.checkpoint import (
    CHECKPOINT,
    FORMAT,
    LoadedRun,
    load_run,
    read_checkpoint,
    save_checkpoint,
)
from lion_models.run.config import CONFIG
from lion_models.run.feeding import preprocessing

__all__ = ["ABOUT", "read_pretrained", "write_pretrained"]

ABOUT = "model.json"
UNIT = "unit"  # what a run's models take: pixels in [0, 1]


def write_pretrained(folder: Path, run: LoadedRun, pixels: str) -> None:
    """Write a model's trained weights, and what it is.

    Args:
        folder: made if it is not there.
        run: the model.
        pixels: what it is called with.

    Raises:
        UserError: the folder is a run's, or cannot be written.
    """
    if (folder / CONFIG).exists():
        raise UserError(
            f"{folder}: holds a {CONFIG}, as runs and other models do; choose another folder"
        )
    make_folder(folder)
    model, config, backbone = run.model, run.config, run.model.backbone
    weights = trained_state(model)
    save_checkpoint(folder / CHECKPOINT, weights, config, backbone, run.classes, run.levels)
    about = {
        "format": FORMAT,
        "method": config.method.name,
        "options": {each.name: getattr(config.method, each.name) for each in fields(config.method)},
        "classes": list(run.classes),
        "pixels": pixels,
        "preprocessing": preprocessing(
            backbone, config.data.transform, run.levels, config.data.draft
        ),
        "backbone": backbone.describe(),
        "weights": {"file": CHECKPOINT, "sha256": run.weights},
        "parameters": count_parameters(model).to_dict(),
        "versions": _versions(),
    }
    write_json(folder / ABOUT, about)


def read_pretrained(folder: Path, backbone: str | nn.Module | None) -> tuple[LoadedRun, str]:
    """The model of a folder, and what it is called with.

    Args:
        folder: of `write_pretrained`, or a run's.
        backbone: a name, a `FrozenBackbone` or a network; None loads it by its name.

    Raises:
        UserError: nothing was saved there, it is damaged or of another version, or the backbone
            is another one.
    """
    about = _read_about(folder)
    _, metadata = read_checkpoint(folder / CHECKPOINT)
    name = metadata["backbone"]
    if backbone is None:
        backbone = _by_name(folder, name)
    elif isinstance(backbone, str):
        backbone = load_backbone(backbone)
    elif not isinstance(backbone, FrozenBackbone):
        mean, std = json.loads(metadata["normalisation"])
        size = given_image_size(name)
        backbone = freeze_network(
            backbone, image_size=size, normalisation=(_tuple(mean), _tuple(std))
        )
    run = load_run(folder, backbone)
    if about and about["weights"]["sha256"] != run.weights:
        raise UserError(
            f"{folder}: {ABOUT} and {CHECKPOINT} are of two different saves; save the model again"
        )
    return run, about.get("pixels", UNIT)


def _by_name(folder: Path, name: str) -> FrozenBackbone:
    how = "pass it: from_pretrained(folder, backbone=...)"
    if name.startswith(GIVEN):
        raise UserError(f"{folder}: was tuned around a network that was given, '{name}'; {how}")
    try:
        return load_backbone(name)
    except UserError as error:
        raise UserError(
            f"{folder}: its backbone '{name}' does not load ({error}); {how}"
        ) from error


def _read_about(folder: Path) -> dict[str, Any]:
    """model.json; empty where there is none, as in a run's folder."""
    path = folder / ABOUT
    if not path.exists():
        return {}
    try:
        about: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        form, _ = about["format"], about["weights"]["sha256"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: damaged ({error!r}); save the model again") from error
    if form != FORMAT:
        writer = about.get("versions", {}).get("deqcore", "another version")
        raise UserError(
            f"{path}: of format {form!r}, expected {FORMAT!r}; it was written by deqcore {writer}, "
            f"and this is {deqcore.__version__}: install that one, or save the model with this one"
        )
    return about


def _tuple(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def _versions() -> dict[str, str]:
    """Of what the numbers depend on, where it is installed."""
    found = {"deqcore": deqcore.__version__, "torch": torch.__version__}
    for package in ("timm", "torchvision", "transformers"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found
