"""One run: its configuration, data and model, each opened or made once; train and measure it."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from lion_models.backbones import FrozenBackbone, fingerprint
from lion_models.base.errors import UserError
from lion_models.base.files import holding, write_json
from lion_models.data import (
    FolderSource,
    SealedTest,
    Source,
    Split,
    Task,
    check_fit,
    class_counts,
    split_source,
    take_task,
)
from lion_models.data.levels import Levels
from lion_models.data.sources import user_folder
from lion_models.data.splits import earlier_reading
from lion_models.methods.base import TunedClassifier, count_parameters
from lion_models.run.balance import balanced_figure
from lion_models.run.checkpoint import (
    CHECKPOINT,
    LoadedRun,
    load_run,
    read_checkpoint,
    save_checkpoint,
)
from lion_models.run.config import RunConfig, build_model
from lion_models.run.data_record import (
    check_unchanged,
    data_place,
    levels_of,
    record_data,
    recorded_levels,
)
from lion_models.run.folder import (
    CURVES,
    RESULT,
    TEST_LEDGER,
    check_same,
    is_new,
    prepare_folder,
    read_config,
)
from lion_models.run.log import METRICS, STATE, STATE_SECONDS, RunLog, read_state
from lion_models.run.page import write_page
from lion_models.run.ranks import ALONE, Ranks
from lion_models.run.reliability import calibration, surest_mistakes, thumbnail, top_accuracy
from lion_models.run.report import CONFUSION, PAGE, REPORT, class_report, read_report
from lion_models.run.seeding import seed_all
from lion_models.run.suited import warn_unsuited
from lion_models.run.trainer import FitState, diverged, fit, freeze_images, score
from lion_models.run.workbench import Workbench

__all__ = ["OnEpoch", "Run"]

TRACE_IMAGES = 256

OnEpoch = Callable[[FitState], None]


class Run:
    """One training run: `Run("runs/first", config).train()`.

    Args:
        folder: where its files lie or will lie.
        config: what to train; what it leaves to the method is filled in.
        bench: device, and what the runs of this process share; None makes one for the CPU.
        moved_data: where its data lies now, as `data` would name it; None means where it
            lay when the run was trained.
        changed_data: go on although files of its data have other contents than in training.

    Attributes:
        place: what `open_source` takes for the run's data, in whatever folder this process works.
        source, split, task: the data, the rows of it, and the images to learn from.
        model: freshly initialised from the seed until `train` has trained it.
        trained: the classifier as its checkpoint has it.

    What the attributes hold is opened or made when it is first asked for, and once.
    """

    def __init__(
        self,
        folder: Path | str,
        config: RunConfig,
        *,
        bench: Workbench | None = None,
        moved_data: str | None = None,
        changed_data: bool = False,
    ) -> None:
        self.folder, self.config = Path(folder), config.resolved()
        self.bench = Workbench() if bench is None else bench
        self._moved_data, self._changed_data = moved_data, changed_data

    @classmethod
    def open(cls, folder: Path | str, **options: Any) -> Run:
        """The run that a folder holds.

        Raises:
            UserError: it holds none, or one of another version.
        """
        return cls(folder, read_config(Path(folder)), **options)

    @cached_property
    def backbone(self) -> FrozenBackbone:
        return self.bench.backbone(self.config.backbone.backbone)

    @cached_property
    def place(self) -> str:
        if self._moved_data is None and is_new(self.folder):
            return self.config.data.data
        return data_place(self.folder, self.config.data.data, self._moved_data)

    @cached_property
    def source(self) -> Source:
        data = replace(self.config.data, data=self.place)
        return self.bench.source(data, self.backbone, self.levels)

    @cached_property
    def levels(self) -> Levels | Literal["auto"] | None:
        return recorded_levels(self.folder)

    @cached_property
    def split(self) -> Split:
        data, seed = self.config.data, self.config.training.seed
        counts = data.shots, data.validation_shots, data.test_cap
        return split_source(self.source, seed, *counts, data.imbalance, data.held_out)

    @cached_property
    def task(self) -> Task:
        check_fit(self.source, self.backbone.channels, self.backbone.image_size)
        return take_task(self.source, self.split, self.bench.images)

    @cached_property
    def model(self) -> TunedClassifier:
        classes, backbone = len(self.source.classes), self.backbone
        seed_all(self.config.training.seed)
        return build_model(self.config, backbone, classes).to(self.bench.device)

    @cached_property
    def trained(self) -> LoadedRun:
        run = load_run(self.folder, self.backbone)
        run.model.to(self.bench.device)
        return run

    def check(self, *, anew: bool = False) -> None:
        """Raise UserError where data or backbone cannot serve the run; no image is decoded.

        Args:
            anew: whatever run the folder holds goes, and with it what that knows of its data.
        """
        if anew and self._moved_data is None:
            self.place = self.config.data.data
        if anew:
            self.levels = "auto"
        _ = self.split, self.model

    def prepare(self, *, resume: bool = False, overwrite: bool = False) -> None:
        """Check the run, then make its folder, or make sure that it may be gone on in.

        Args:
            resume: the folder holds this run, which goes on.
            overwrite: a run that it holds is removed.

        Raises:
            UserError: data or backbone cannot serve the run, or the folder holds something and
                neither was asked for, or something else.
        """
        self.check(anew=overwrite and not resume)
        prepare_folder(self.folder, self.config, resume, overwrite)

    @contextmanager
    def held(self, *, resume: bool = False, overwrite: bool = False) -> Iterator[None]:
        """`prepare`, and keep other processes out of the folder for as long as the block runs."""
        self.check(anew=overwrite and not resume)
        with ExitStack() as held:
            # A lock before a folder is replaced; none is left where a mistake is reported.
            new = not self.folder.exists()
            if not new:
                held.enter_context(holding(self.folder))
            prepare_folder(self.folder, self.config, resume, overwrite)
            if new:
                held.enter_context(holding(self.folder))
            yield

    def train(
        self,
        *,
        test: bool = True,
        on_epoch: OnEpoch = lambda state: None,
        plot: bool = True,
        tensorboard: bool = False,
        ranks: Ranks = ALONE,
        state_seconds: float = STATE_SECONDS,
    ) -> dict[str, Any]:
        """Train from the start, or from where the run was interrupted.

        Args:
            test: read the test set at the end; otherwise `measure` may do so later.
            on_epoch: called after every epoch.
            plot: draw the run's pictures.
            tensorboard: write scalars to `folder/tensorboard`.
            ranks: this process among those that train the model together; the first one writes.
            state_seconds: a state to resume from is written after the first epoch that ends this
                long after the last one was.

        Returns:
            The content of result.json; empty on all ranks but the first.

        Raises:
            UserError: bad data, data that changed since the run was interrupted, a folder of
                something else, a damaged state, or a file that cannot be written.
        """
        if ranks.first:
            if is_new(self.folder):
                self.prepare()
            else:
                check_same(self.folder, self.config)
        progress = self._read_progress() if ranks.first else None
        finished, state = ranks.share(progress) or (None, None)
        if finished is None:
            finished = self._fit(state, on_epoch, ranks, tensorboard, state_seconds)
            if ranks.first and plot and not test:
                self._plot(finished)
        return self.measure(plot=plot) if test and ranks.first else finished

    def measure(self, *, plot: bool = True) -> dict[str, Any]:
        """Measure a finished run on its test set, once, and add that to result.json.

        It also writes report.json, the figures of each class, and with `plot` confusion.png. A run
        that was measured needs neither its data nor its backbone.

        Raises:
            UserError: the run is not finished or of other options, its data is gone or has changed
                since it was trained, or its test set was read with other weights.
        """
        check_same(self.folder, self.config)
        result = self._read_result()
        if result is None:
            raise UserError(f"{self.folder}: not finished; train it on with `resume`")
        test = None
        if (self.folder / REPORT).exists():
            weights, _ = read_checkpoint(self.folder / CHECKPOINT)
            test = earlier_reading(self.folder / TEST_LEDGER, fingerprint(weights))
        measured = test is None
        if test is None:
            test = self._read_test_set()
        if result.get("test") != test:
            result["test"] = test
            write_json(self.folder / RESULT, result)
        if plot and (measured or self._lacks_pictures()):
            self._plot(result)
        return result

    def validation_images(self, count: int) -> Tensor:
        """Up to `count` of the validation images, spread over the classes: uint8 (n, C, S, S).

        Raises:
            UserError: the data is gone, or what lies at `moved_data` is not the run's.
        """
        if self._moved_data is not None:
            self._check_unchanged()
        rows = self.split.validation
        chosen = torch.linspace(0, len(rows) - 1, min(count, len(rows))).round().long()
        return self.source.load(rows[chosen])

    def training_images_in(self, data: str) -> int:
        """How many of the training images are in `data`, as far as names and paths tell."""
        (prefix, place), (other_prefix, other) = user_folder(self.place), user_folder(data)
        same = self.place == data if place is None else (prefix, place) == (other_prefix, other)
        if same:
            return len(self.split.train)
        if place is None or other is None or not (place in other.parents or other in place.parents):
            return 0
        files = self.source.paths if isinstance(self.source, FolderSource) else ()
        folders = [files[row].parent.resolve() for row in self.split.train] if files else []
        return sum(other in (inside, *inside.parents) for inside in folders)

    def _read_result(self) -> dict[str, Any] | None:
        path = self.folder / RESULT
        return json.loads(path.read_text()) if path.is_file() else None

    def _read_progress(self) -> tuple[dict[str, Any] | None, FitState | None]:
        """The result of a finished run or the state of an interrupted one; what a killed process
        left half written is removed."""
        for stray in self.folder.glob("*.part"):
            stray.unlink(missing_ok=True)
        result = self._read_result()
        return result, None if result else read_state(self.folder / STATE)

    def _fit(
        self,
        state: FitState | None,
        on_epoch: OnEpoch,
        ranks: Ranks,
        tensorboard: bool,
        state_seconds: float,
    ) -> dict[str, Any]:
        """Train and write checkpoint and result; returns the latter."""
        changed = False
        if state is not None or self._moved_data is not None:
            changed = self._check_unchanged()
        if ranks.first and self.source not in self.bench.looked_at:
            self.bench.looked_at.add(self.source)
            warn_unsuited(self.source, self.split.train, self.backbone)
        task, model = self.task, self.model
        del self.model  # which is about to be trained
        if (state is None or changed) and ranks.first:
            record_data(self.folder, self.place, self.source, self.split)
        traces = {"before": self._traces(model)}
        log = RunLog(self.folder, state, state_seconds, tensorboard) if ranks.first else None

        def after_epoch(state: FitState) -> None:
            if log is not None:
                log.add(state)
                on_epoch(state)

        state = fit(
            model,
            task,
            self.config.training,
            state,
            after_epoch,
            robust=self.config.robust,
            pruning=self.config.pruning,
            transform=self.config.data.transform,
            features=self.bench.features,
            ranks=ranks,
        )
        if log is None:
            return {}
        log.close()
        traces["after"] = self._traces(model)
        levels = levels_of(self.source)
        save_checkpoint(
            self.folder / CHECKPOINT, state.best, self.config, model.backbone, task.classes, levels
        )
        weights = fingerprint(state.best)
        self.trained = LoadedRun(model, self.config, task.classes, weights, levels)
        result = self._describe(state, traces)
        write_json(self.folder / RESULT, result)
        (self.folder / STATE).unlink(missing_ok=True)
        return result

    def _describe(self, state: FitState, traces: dict[str, Any]) -> dict[str, Any]:
        """The content of result.json, before the test set is read."""
        chosen = state.history[state.best_epoch - 1]
        return {
            "method": self.config.method.name,
            "seed": self.config.training.seed,
            "best_epoch": state.best_epoch,
            "epochs": len(state.history),
            "diverged": diverged(state.history, len(self.source.classes)),
            "last_loss": state.history[-1]["loss"],
            "validation_accuracy": chosen["validation_accuracy"],
            "validation_loss": chosen["validation_loss"],
            **{key: chosen[key] for key in ("validation_balanced_accuracy",) if key in chosen},
            "parameters": count_parameters(self.trained.model).to_dict(),
            "train_images": class_counts(self.task).tolist(),
            "skipped_files": list(self.source.skipped),
            "seconds": sum(row["seconds"] for row in state.history),
            "solver": chosen["solver"],
            "traces": traces,
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
            "device": self.bench.device,
        }

    def _traces(self, model: TunedClassifier) -> dict[str, list[list[float]]]:
        """Per layer and solver step: 10th, 50th, 90th percentile of the residual over images."""
        if not model.implicit_layers:
            return {}
        fixed = freeze_images(model, self.task.validation_images[:TRACE_IMAGES])
        traces = model.eval().residual_traces(fixed)
        marks = torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64)
        return {
            side: trace.double().cpu().quantile(marks, dim=0).T.tolist()
            for side, trace in traces.items()
        }

    def _read_test_set(self) -> dict[str, Any]:
        """The one reading of the test set: writes test.json and report.json."""
        run = self.trained
        predicted: list[Tensor] = []
        truths: list[Tensor] = []
        chances: list[Tensor] = []

        def measure(images: Tensor, labels: Tensor) -> dict[str, float]:
            truths.append(labels)
            fixed = freeze_images(run.model, images)
            return score(run.model, fixed, labels.to(self.bench.device), predicted, chances)

        changed = self._check_unchanged()
        sealed = SealedTest(self.source, self.split.test, self.bench.images)
        # A ledger without a report is of a version that wrote none: the same weights are scored
        # again.
        test = sealed.measure(
            self.folder / TEST_LEDGER,
            run.weights,
            measure,
            again=True,
            also=lambda: balanced_figure(torch.cat(truths), torch.cat(predicted)),
        )
        truth = torch.cat(truths)
        report = class_report(run.classes, truth, torch.cat(predicted))
        report |= self._trust(truth, torch.cat(chances))
        write_json(self.folder / REPORT, report)
        return test | ({"changed_data": True} if changed else {})

    def _check_unchanged(self) -> bool:
        return check_unchanged(self.folder, self.source, self.split, self._changed_data)

    def _trust(self, truth: Tensor, chances: Tensor) -> dict[str, Any]:
        """What report.json says of the probabilities, with the surest mistakes as pictures."""
        confidence, predicted = chances.max(1)
        classes, names = self.source.classes, self.source.row_names()
        mistakes = []
        for at in surest_mistakes(truth, chances):
            row = self.split.test[at : at + 1]
            mistakes.append(
                {
                    "file": str(names[int(row)]) if names else f"row {int(row)}",
                    "true": classes[truth[at]],
                    "predicted": classes[predicted[at]],
                    "confidence": confidence[at].item(),
                    "picture": thumbnail(self.source.load(row)[0]),
                }
            )
        return {
            "top5_accuracy": top_accuracy(truth, chances),
            "calibration": calibration(truth, chances),
            "mistakes": mistakes,
        }

    def _lacks_pictures(self) -> bool:
        """Whether pictures are missing that could be drawn: none where nothing can be written."""
        missing = not all((self.folder / name).exists() for name in (CURVES, CONFUSION, PAGE))
        return missing and os.access(self.folder, os.W_OK)

    def _plot(self, result: dict[str, Any]) -> None:
        # Imported here: matplotlib takes longer to load than a small run to train.
        from lion_models.run.plots import plot_confusion, plot_run

        history = [json.loads(line) for line in (self.folder / METRICS).read_text().splitlines()]
        plot_run(self.folder / CURVES, self.config, history, result)
        report: dict[str, Any] = {}
        if (self.folder / REPORT).exists():
            report = read_report(self.folder / REPORT)
            plot_confusion(self.folder / CONFUSION, report)
        pictures = {"Curves": self.folder / CURVES, "Confusion": self.folder / CONFUSION}
        write_page(self.folder / PAGE, self.config, result, report, pictures)
