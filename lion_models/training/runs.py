"""A run's folder: config.json, metrics.jsonl, checkpoint, test ledger, result.json, curves.png."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lion_models.backbones import FrozenBackbone, load_backbone
from lion_models.classifier import TunedClassifier, count_parameters
from lion_models.data import SealedTest, Source, Task, class_counts
from lion_models.errors import UserError
from lion_models.lion import Lion
from lion_models.seeding import seed_all
from lion_models.training.checkpoint import CHECKPOINT, load_run, save_checkpoint
from lion_models.training.config import RunConfig, build_model, make_solver
from lion_models.training.plots import plot_run
from lion_models.training.run_data import open_data, split_data, take_task
from lion_models.training.trainer import FitState, fit, freeze_images, score

__all__ = ["measure_run", "prepare_folder", "read_config", "train_run"]

STATE = "training_state.pt"
TEST_LEDGER = "test.json"
TRACE_IMAGES = 256

OnEpoch = Callable[[FitState], None]


def read_config(folder: Path) -> RunConfig:
    """The configuration stored in a run's folder."""
    path = folder / "config.json"
    if not path.is_file():
        raise UserError(
            f"{folder}: not a run (no config.json); expected a folder that 'lion train' has written"
        )
    return RunConfig.from_dict(json.loads(path.read_text()))


def prepare_folder(folder: Path, config: RunConfig, resume: bool, overwrite: bool) -> None:
    """Make sure that a run's folder is new, wanted again, or free to be replaced.

    Raises:
        UserError: the folder holds something and neither was asked for, or something else.
    """
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        if resume:
            raise UserError(f"--resume: {folder} holds no run; leave --resume out to start one")
        folder.mkdir(parents=True, exist_ok=True)
        _write_json(folder / "config.json", config.to_dict())
        return
    stored = read_config(folder)
    if resume:
        differing = [
            key for key, value in config.to_dict().items() if stored.to_dict()[key] != value
        ]
        if differing:
            shown = ", ".join(f"{key}={stored.to_dict()[key]!r}" for key in differing)
            raise UserError(
                f"--resume: {folder} was started with {shown}; repeat the same options "
                "or choose another --name"
            )
    elif overwrite:
        shutil.rmtree(folder)
        prepare_folder(folder, config, resume=False, overwrite=False)
    else:
        raise UserError(
            f"{folder} exists; use --resume to continue it, --overwrite to replace it, "
            "or another --name"
        )


def train_run(
    folder: Path,
    config: RunConfig,
    *,
    test: bool = True,
    device: str = "cpu",
    backbone: FrozenBackbone | None = None,
    source: Source | None = None,
    on_epoch: OnEpoch = lambda state: None,
) -> dict[str, Any]:
    """Train one method in a prepared folder, from its start or from where it was interrupted.

    Args:
        folder: prepared by `prepare_folder`.
        config: the run's.
        test: read the test set at the end; otherwise `measure_run` may do so later.
        device: where to train.
        backbone, source: loaded already; None loads what the configuration names.
        on_epoch: called after every epoch.

    Returns:
        The content of result.json.
    """
    result_path = folder / "result.json"
    if result_path.exists():
        finished: dict[str, Any] = json.loads(result_path.read_text())
        return (
            measure_run(folder, device=device, backbone=backbone, source=source)
            if test
            else finished
        )
    backbone = load_backbone(config.backbone) if backbone is None else backbone
    backbone = backbone.to(device)
    source = source or open_data(config, backbone)
    task = take_task(source, config, backbone)
    seed_all(config.seed)
    model = build_model(config, backbone, len(task.classes)).to(device)
    traces = {"before": _traces(model, task, config)}

    metrics_path, state_path = folder / "metrics.jsonl", folder / STATE
    state = _load_state(state_path)
    rows = state.history if state else []
    metrics_path.write_text("".join(json.dumps(row) + "\n" for row in rows))

    def after_epoch(state: FitState) -> None:
        with metrics_path.open("a") as metrics:
            metrics.write(json.dumps(state.history[-1]) + "\n")
        _save_state(state_path, state)
        on_epoch(state)

    state = fit(model, task, config, state, after_epoch)
    traces["after"] = _traces(model, task, config)
    save_checkpoint(folder / CHECKPOINT, state.best, config, model.backbone, task.classes)
    chosen = state.history[state.best_epoch - 1]
    counts = count_parameters(model)
    result = {
        "method": config.method,
        "seed": config.seed,
        "best_epoch": state.best_epoch,
        "validation_accuracy": chosen["validation_accuracy"],
        "parameters": counts.to_dict(),
        "train_images": class_counts(task).tolist(),
        "skipped_files": list(source.skipped),
        "seconds": sum(row["seconds"] for row in state.history),
        "solver": chosen["solver"],
        "traces": traces,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "device": device,
    }
    _write_json(result_path, result)
    state_path.unlink(missing_ok=True)
    plot_run(folder / "curves.png", config, state.history, result)
    if not test:
        return result
    return measure_run(folder, device=device, backbone=backbone, source=source)


def measure_run(
    folder: Path,
    *,
    device: str = "cpu",
    backbone: FrozenBackbone | None = None,
    source: Source | None = None,
) -> dict[str, Any]:
    """Measure a finished run on its test set, once, and add it to result.json.

    Raises:
        UserError: the run is not finished, or its test set was read with other weights.
    """
    read_config(folder)
    if not (folder / "result.json").is_file():
        raise UserError(f"{folder}: not finished; continue it with 'lion train --resume'")
    result: dict[str, Any] = json.loads((folder / "result.json").read_text())
    run = load_run(folder, backbone)
    config, model = run.config, run.model.to(device)
    source = source or open_data(config, model.backbone)
    split = split_data(source, config)

    def measure(images: Tensor, labels: Tensor) -> dict[str, float]:
        return score(model, freeze_images(model, images), labels.to(device))

    sealed = SealedTest(source, split.test)
    result["test"] = sealed.measure(folder / TEST_LEDGER, run.weights, measure)
    _write_json(folder / "result.json", result)
    history = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    plot_run(folder / "curves.png", config, history, result)
    return result


def _traces(model: TunedClassifier, task: Task, config: RunConfig) -> dict[str, list[list[float]]]:
    """Per layer and solver step: 10th, 50th and 90th percentile of the residual over images."""
    if not isinstance(model, Lion):
        return {}
    fixed = freeze_images(model, task.validation_images[:TRACE_IMAGES])
    traces = model.eval().residual_traces(fixed, make_solver(config, record_trace=True))
    marks = torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64)
    return {
        side: trace.double().cpu().quantile(marks, dim=0).T.tolist()
        for side, trace in traces.items()
    }


def _save_state(path: Path, state: FitState) -> None:
    partial = path.with_suffix(".part")
    torch.save(asdict(state), partial)
    partial.replace(path)


def _load_state(path: Path) -> FitState | None:
    if not path.exists():
        return None
    try:
        return FitState(**torch.load(path, weights_only=True))
    except (RuntimeError, EOFError, TypeError) as error:
        raise UserError(f"{path}: damaged ({error}); start again with --overwrite") from error


def _write_json(path: Path, values: dict[str, Any]) -> None:
    partial = path.with_suffix(".part")
    partial.write_text(json.dumps(values, indent=2) + "\n")
    partial.replace(path)
