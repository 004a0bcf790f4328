"""Accuracy of a run: on its own test set (measured once, then remembered) or on other data."""

from __future__ import annotations

import warnings
from contextlib import suppress
from pathlib import Path
from typing import Any

import rich_click as click
import torch
from rich.table import Table
from torch import Tensor

from lion_models.backbones import load_backbone
from lion_models.base.errors import UserError
from lion_models.base.files import make_folder, write_json
from lion_models.cli import options
from lion_models.cli.console import out
from lion_models.cli.text import fit_table
from lion_models.data.verify import BAD_FILES
from lion_models.run import LoadedRun, Run, load_run
from lion_models.run.balance import accuracy_text
from lion_models.run.predict import evaluate_on
from lion_models.run.report import CONFUSION, REPORT, class_report, read_report
from lion_models.run.workbench import Workbench

__all__ = ["command"]


@click.command("eval", help=__doc__)
@options.path_argument("run", "A run's folder, or its checkpoint with --data.")
@click.option(
    "--data",
    show_default="the run's own test set, read once",
    help="Other data with the same classes; every image of it is used.",
)
@click.option("--report", is_flag=True, help="Precision, recall and F1 of each class.")
@options.path_option(
    "--report-to", "With --data: write report.json and confusion.png to this folder."
)
@click.option(
    "--bad-files",
    type=options.Names(*BAD_FILES),
    show_default="the run's own",
    help="With --data: fail or skip, as in training.",
)
@options.BACKBONE_PLACE
@options.MOVED_DATA
@options.CHANGED_DATA
@options.machine_options("threads", "workers", "device")
def command(
    run: Path,
    data: str | None,
    report: bool,
    report_to: Path | None,
    bad_files: str | None,
    backbone: str | None,
    moved_data: str | None,
    changed_data: bool,
    machine: options.Machine,
) -> None:
    bench = Workbench(machine.device, machine.workers, image_cache=0)  # every image is read once
    if data is None:
        if not run.is_dir():
            load_run(run)
            raise UserError(f"{run}: is a checkpoint file; name the run's folder, or add --data")
        if report_to is not None:
            raise UserError(f"--report-to: a run's own report is written to {run}; add --data")
        if backbone is not None or bad_files is not None:
            raise UserError("--backbone and --bad-files: go with --data; add it")
        own = Run.open(run, bench=bench, moved_data=moved_data, changed_data=changed_data)
        figures = own.measure()["test"]
        classes = read_report(run / REPORT) if report else {}
        where = "the run's test set"
    else:
        if moved_data is not None or changed_data:
            name = "--changed-data" if changed_data else "--moved-data"
            raise UserError(f"{name}: is about the run's own data; leave it or --data out")
        if report_to is not None:  # before an hour of images
            make_folder(report_to)
        loaded = load_run(run, None if backbone is None else load_backbone(backbone))
        loaded.model.to(machine.device)
        predicted: list[Tensor] = []
        figures, truth = evaluate_on(loaded, data, predicted, bad_files, bench.images)
        _warn_of_training_images(run, loaded, data)
        classes = class_report(loaded.classes, truth, torch.cat(predicted)) if (
            report or report_to) else {}  # fmt: skip
        where = data
    out.print(
        f"accuracy {accuracy_text(figures, digits=2)}, cross-entropy {figures['loss']:.4f} "
        f"nats over {figures['images']} images of {where}",
        highlight=False,
    )
    if report:
        out.print(fit_table(_report_table(classes), out))
    if report_to is not None:
        from lion_models.run.plots import plot_confusion

        write_json(report_to / REPORT, classes)
        plot_confusion(report_to / CONFUSION, classes)
        out.print(f"wrote {report_to}/{REPORT} and {report_to}/{CONFUSION}", soft_wrap=True)


def _warn_of_training_images(run: Path, loaded: LoadedRun, data: str) -> None:
    own = Run(run if run.is_dir() else run.parent, loaded.config)
    own.backbone = loaded.model.backbone  # wherever its file lies now
    count = 0
    with suppress(UserError), warnings.catch_warnings():
        # What is wrong with the run's own data is no matter here.
        warnings.simplefilter("ignore")
        count = own.training_images_in(data)
    if count:
        click.echo(
            f"warning: {count} of these images are training images of the run; its accuracy on "
            "its own test set: leave --data out",
            err=True,
        )


def _report_table(report: dict[str, Any]) -> Table:
    title = f"balanced accuracy {100 * report['balanced_accuracy']:.1f}%, macro F1 "
    table = Table(title=f"{title}{report['macro_f1']:.3f}", title_justify="left")
    table.add_column("class")
    for heading in ("precision", "recall", "f1", "support"):
        table.add_column(heading, justify="right", no_wrap=True)
    for row in report["classes"]:
        shares = (f"{row[key]:.3f}" for key in ("precision", "recall", "f1"))
        table.add_row(row["class"], *shares, str(row["support"]))
    return table
