"""A run's folder: configuration, data, metrics, checkpoint, result, test ledger, pictures."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lion_models.backbones import fingerprint
from lion_models.base.errors import UserError
from lion_models.base.files import make_folder, write_json
from lion_models.data import SealedTest, Task, class_counts
from lion_models.data.splits import earlier_reading
from lion_models.methods.base import TunedClassifier, count_parameters
from lion_models.methods.lion import Lion
from lion_models.run.checkpoint import CHECKPOINT, load_run, read_checkpoint, save_checkpoint
from lion_models.run.config import RunConfig
from lion_models.run.data_record import (
    DATA_RECORD,
    check_unchanged,
    data_place,
    record_data,
    split_data,
    take_task,
)
from lion_models.run.log import METRICS, STATE, STATE_SECONDS, RunLog, read_state
from lion_models.run.models import build_model, make_solver
from lion_models.run.ranks import ALONE, Ranks
from lion_models.run.report import CONFUSION, REPORT, read_report, write_report
from lion_models.run.seeding import seed_all
from lion_models.run.trainer import FitState, fit, freeze_images, score
from lion_models.run.workbench import Workbench

__all__ = [
    "check_data",
    "is_new",
    "measure_run",
    "prepare_folder",
    "read_config",
    "train_run",
    "validation_images",
]

TEST_LEDGER = "test.json"
CURVES = "curves.png"
TRACE_IMAGES = 256
RUN_FILES = frozenset(
    (
        "config.json",
        DATA_RECORD,
        METRICS,
        STATE,
        CHECKPOINT,
        "result.json",
        TEST_LEDGER,
        REPORT,
        CONFUSION,
        CURVES,
        "tensorboard",
        "model.pt2",  # of lion export
        "model.onnx",
    )
)

OnEpoch = Callable[[FitState], None]


def read_config(folder: Path) -> RunConfig:
    """The configuration stored in a run's folder.

    Raises:
        UserError: none is there, it is damaged, or it is of another version.
    """
    path = folder / "config.json"
    if not path.is_file():
        raise _not_a_run(folder)
    try:
        return RunConfig.from_dict(json.loads(path.read_text()))
    except UserError as error:
        raise UserError(f"{folder}: {error}") from error
    except (ValueError, TypeError) as error:
        raise UserError(f"{path}: damaged ({error})") from error


def _not_a_run(folder: Path) -> UserError:
    return UserError(
        f"{folder}: not a run (no config.json); expected a folder that 'lion train' has written"
    )


def prepare_folder(folder: Path, config: RunConfig, resume: bool, overwrite: bool) -> None:
    """Make sure that a run's folder is new, wanted again, or free to be replaced.

    Raises:
        UserError: the folder holds something and neither was asked for, or something else.
    """
    if is_new(folder):
        if resume:
            raise UserError(f"`resume`: {folder} holds no run; leave `resume` out to start one")
        make_folder(folder)
        write_json(folder / "config.json", config.to_dict())
    elif resume:
        stored = read_config(folder)
        differing = [
            key for key, value in config.to_dict().items() if stored.to_dict()[key] != value
        ]
        if differing:
            shown = ", ".join(f"{key}={stored.to_dict()[key]!r}" for key in differing)
            raise UserError(
                f"`resume`: {folder} was started with {shown}; repeat the same options "
                "or choose another `name` or `runs`"
            )
    elif overwrite:
        _remove(folder)
        prepare_folder(folder, config, resume=False, overwrite=False)
    elif not (folder / "config.json").is_file():
        raise _not_a_run(folder)
    else:
        raise UserError(
            f"{folder} exists; use `resume` to continue it, `overwrite` to replace it, "
            "or another `name` or `runs`"
        )


def _remove(folder: Path) -> None:
    """Remove a run of any version, or what is left of one, but nothing of the user's.

    The folder is renamed first: a kill while its files go leaves no half of a run under its name.
    """
    names = sorted(path.name for path in folder.iterdir()) if folder.is_dir() else [folder.name]
    others = [name for name in names if name not in RUN_FILES and not name.endswith(".part")]
    why = "is not a run (it has neither a run's config.json nor a run's checkpoint)"
    if others:
        more = f" and {len(others) - 3} more" if len(others) > 3 else ""
        why = f"holds {', '.join(others[:3])}{more}, which is no file of a run,"
    if others or not _was_written_here(folder):
        raise UserError(
            f"`overwrite`: {folder} {why} and is not replaced; move it away, or use another "
            "`name` or `runs`"
        )
    aside = folder.parent / ".locks" / f"{folder.name}.replaced"
    make_folder(aside.parent)
    if aside.exists():  # of a process that was killed here
        shutil.rmtree(aside)
    folder.rename(aside)
    shutil.rmtree(aside)


def _was_written_here(folder: Path) -> bool:
    """Whether a run's configuration or, where another version wrote that, its checkpoint is there.

    Other programs, too, call a file config.json or metrics.jsonl.
    """
    for read in (read_config, lambda folder: read_checkpoint(folder / CHECKPOINT)):
        try:
            read(folder)
        except UserError:
            continue
        return True
    return False


def is_new(folder: Path) -> bool:
    """Whether a folder is not there, or empty but for what a process left that was killed as it
    began."""
    if not folder.is_dir():
        return not folder.exists()
    return all(path.name.endswith(".part") for path in folder.iterdir())


def check_data(config: RunConfig, bench: Workbench) -> None:
    """Raise UserError where the data cannot serve a run; cheap, and before a folder is made."""
    source = bench.source(config)
    split_data(source, config)
    build_model(config, bench.backbone(config), len(source.classes))


def validation_images(
    folder: Path, config: RunConfig, bench: Workbench, count: int, data: str | None = None
) -> Tensor:
    """Up to `count` of a run's validation images, spread over the classes: uint8 (n, C, S, S).

    Raises:
        UserError: the data is gone, or it lies at `data` and is not the run's; see `data_place`.
    """
    source = bench.source(replace(config, data=data_place(folder, config, data)))
    if data is not None:
        check_unchanged(folder, source, config)
    rows = split_data(source, config).validation
    chosen = torch.linspace(0, len(rows) - 1, min(count, len(rows))).round().long()
    return source.load(rows[chosen])


def train_run(
    folder: Path,
    config: RunConfig,
    *,
    test: bool = True,
    bench: Workbench | None = None,
    on_epoch: OnEpoch = lambda state: None,
    plot: bool = True,
    tensorboard: bool = False,
    ranks: Ranks = ALONE,
    state_seconds: float = STATE_SECONDS,
    data: str | None = None,
) -> dict[str, Any]:
    """Train one method in a prepared folder, from its start or from where it was interrupted.

    Args:
        folder: prepared by `prepare_folder`.
        config: the run's.
        test: read the test set at the end; otherwise `measure_run` may do so later.
        bench: device, and what runs of this process share; None makes one for the CPU.
        on_epoch: called after every epoch.
        plot: draw the run's pictures.
        tensorboard: write scalars to `folder/tensorboard`.
        ranks: this process among those that train the model together; the first one writes.
        state_seconds: a state to resume from is written after the first epoch that ends this long
            after the last one was.
        data: where the data of an interrupted run lies now; see `data_place`.

    Returns:
        The content of result.json; empty on all ranks but the first.

    Raises:
        UserError: bad data, data that changed since the run was interrupted, a damaged state, or a
            file that cannot be written.
    """
    bench = Workbench() if bench is None else bench
    result_path, state_path = folder / "result.json", folder / STATE
    finished, state = ranks.share(_read_progress(folder) if ranks.first else None) or (None, None)
    if finished is None:
        known = data is not None or (folder / DATA_RECORD).is_file()
        here = replace(config, data=data_place(folder, config, data)) if known else config
        source, backbone = bench.source(here), bench.backbone(config)
        task = take_task(source, config, backbone)
        if state is not None or data is not None:
            check_unchanged(folder, source, config)
        if state is None and ranks.first:
            record_data(folder, source, here)
        seed_all(config.seed)
        model = build_model(config, backbone, len(task.classes)).to(bench.device)
        traces = {"before": _traces(model, task, config)}
        log = RunLog(folder, state, state_seconds, tensorboard) if ranks.first else None

        def after_epoch(state: FitState) -> None:
            if log is not None:
                log.add(state)
                on_epoch(state)

        state = fit(model, task, config, state, after_epoch, features=bench.features, ranks=ranks)
        if log is None:
            return {}
        log.close()
        traces["after"] = _traces(model, task, config)
        save_checkpoint(folder / CHECKPOINT, state.best, config, model.backbone, task.classes)
        chosen = state.history[state.best_epoch - 1]
        counts = count_parameters(model)
        finished = {
            "method": config.method,
            "seed": config.seed,
            "best_epoch": state.best_epoch,
            "epochs": len(state.history),
            "validation_accuracy": chosen["validation_accuracy"],
            "validation_loss": chosen["validation_loss"],
            "parameters": counts.to_dict(),
            "train_images": class_counts(task).tolist(),
            "skipped_files": list(source.skipped),
            "seconds": sum(row["seconds"] for row in state.history),
            "solver": chosen["solver"],
            "traces": traces,
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
            "device": bench.device,
        }
        write_json(result_path, finished)
        state_path.unlink(missing_ok=True)
        if plot:
            _plot(folder, config, finished)
    if not test or not ranks.first:
        return finished
    return measure_run(folder, bench=bench, plot=plot, data=data)


def measure_run(
    folder: Path, *, bench: Workbench | None = None, plot: bool = True, data: str | None = None
) -> dict[str, Any]:
    """Measure a finished run on its test set, once, and add it to result.json.

    It also writes report.json, the figures of each class, and with `plot` confusion.png. A run
    that was measured needs neither its data nor its backbone.

    Args:
        folder: the run's.
        bench: device, and what runs of this process share; None makes one for the CPU.
        plot: draw the run's pictures.
        data: where its data lies now; see `data_place`.

    Raises:
        UserError: the run is not finished, its data is gone or has changed since it was trained,
            or its test set was read with other weights.
    """
    stored = read_config(folder)
    if not (folder / "result.json").is_file():
        raise UserError(f"{folder}: not finished; continue it with `resume`")
    result: dict[str, Any] = json.loads((folder / "result.json").read_text())
    test = None
    if (folder / REPORT).exists():
        weights, _ = read_checkpoint(folder / CHECKPOINT)
        test = earlier_reading(folder / TEST_LEDGER, fingerprint(weights))
    measured = test is None
    if test is None:
        test = _read_test_set(folder, stored, Workbench() if bench is None else bench, data)
    if result.get("test") != test:
        result["test"] = test
        write_json(folder / "result.json", result)
    if plot and (measured or _lacks_pictures(folder)):
        _plot(folder, stored, result)
    return result


def _lacks_pictures(folder: Path) -> bool:
    """Whether pictures are missing that could be drawn; in a folder to read alone none could."""
    missing = not all((folder / name).exists() for name in (CURVES, CONFUSION))
    return missing and os.access(folder, os.W_OK)


def _read_test_set(
    folder: Path, stored: RunConfig, bench: Workbench, data: str | None
) -> dict[str, Any]:
    """The one reading of a run's test set: writes test.json and report.json."""
    run = load_run(folder, bench.backbone(stored))
    config, model = run.config, run.model.to(bench.device)
    source = bench.source(replace(config, data=data_place(folder, config, data)))
    split = split_data(source, config)
    predicted: list[Tensor] = []
    truths: list[Tensor] = []

    def measure(images: Tensor, labels: Tensor) -> dict[str, float]:
        truths.append(labels)
        return score(model, freeze_images(model, images), labels.to(bench.device), predicted)

    check_unchanged(folder, source, config)
    sealed = SealedTest(source, split.test)
    # A ledger without a report is of a version that wrote none: the same weights are scored again.
    test = sealed.measure(folder / TEST_LEDGER, run.weights, measure, again=True)
    write_report(folder / REPORT, run.classes, torch.cat(truths), torch.cat(predicted))
    return test


def _plot(folder: Path, config: RunConfig, result: dict[str, Any]) -> None:
    # Imported here: matplotlib takes longer to load than a small run to train.
    from lion_models.run.plots import plot_confusion, plot_run

    history = [json.loads(line) for line in (folder / METRICS).read_text().splitlines()]
    plot_run(folder / CURVES, config, history, result)
    if (folder / REPORT).exists():
        plot_confusion(folder / CONFUSION, read_report(folder / REPORT))


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


def _read_progress(folder: Path) -> tuple[dict[str, Any] | None, FitState | None]:
    """The result of a finished run or the state of an interrupted one; what a killed process left
    half written is removed."""
    for stray in folder.glob("*.part"):
        stray.unlink(missing_ok=True)
    if (folder / "result.json").exists():
        return json.loads((folder / "result.json").read_text()), None
    return None, read_state(folder / STATE)
