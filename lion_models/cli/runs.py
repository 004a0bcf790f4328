"""The commands for what is trained already: eval, predict, export, info."""

from __future__ import annotations

import json
import sys
import warnings
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from torch import Tensor
from tqdm import tqdm

from lion_models.backbones import TINY_VIT, load_backbone, read_vit, tiny_vit_path
from lion_models.base.errors import UserError, choose
from lion_models.base.files import make_folder, replacing, write_json
from lion_models.cli.options import Backbone, Device, MovedData, Threads, Workers, set_up
from lion_models.data import decode_image
from lion_models.run import LoadedRun, Run, load_run
from lion_models.run.export import FORMATS, export_run
from lion_models.run.memory import kept_bytes
from lion_models.run.predict import (
    UNREADABLE,
    Prediction,
    evaluate_on,
    gather_images,
    predict,
    write_predictions,
)
from lion_models.run.report import CONFUSION, REPORT, class_report, read_report
from lion_models.run.workbench import Workbench

__all__ = ["evaluate", "export", "info", "predict_command"]

COMPARED_IMAGES = 64

Moved = Annotated[
    str | None,
    typer.Option(
        "--backbone", help="Where its file lies now.", show_default="the name that the run stored"
    ),
]

out = Console()


def _load(run: Path, backbone: str | None) -> LoadedRun:
    return load_run(run, None if backbone is None else load_backbone(backbone))


def evaluate(
    run: Annotated[Path, typer.Argument(help="A run's folder, or its checkpoint with --data.")],
    data: Annotated[
        str | None,
        typer.Option(
            help="Other data with the same classes; every image of it is used.",
            show_default="the run's own test set, read once",
        ),
    ] = None,
    report: Annotated[
        bool, typer.Option("--report", help="Precision, recall and F1 of each class.")
    ] = False,
    report_to: Annotated[
        Path | None,
        typer.Option(help="With --data: write report.json and confusion.png to this folder."),
    ] = None,
    bad_files: Annotated[
        str | None,
        typer.Option(
            help="With --data: fail or skip, as in training.", show_default="the run's own"
        ),
    ] = None,
    backbone: Moved = None,
    moved_data: MovedData = None,
    threads: Threads = None,
    workers: Workers = None,
    device: Device = "cpu",
) -> None:
    """Accuracy of a run: on its own test set (measured once, then remembered) or on other data."""
    set_up(threads, device)
    bench = Workbench(device, workers, image_cache=0)  # every image is read once
    if data is None:
        if not run.is_dir():
            load_run(run)
            raise UserError(f"{run}: is a checkpoint file; name the run's folder, or add --data")
        if report_to is not None:
            raise UserError(f"--report-to: a run's own report is written to {run}; add --data")
        if backbone is not None or bad_files is not None:
            raise UserError("--backbone and --bad-files: go with --data; add it")
        figures = Run.open(run, bench=bench, moved_data=moved_data).measure()["test"]
        classes = read_report(run / REPORT) if report else {}
        where = "the run's test set"
    else:
        if moved_data is not None:
            raise UserError("--moved-data: is about the run's own data; leave it or --data out")
        if report_to is not None:  # before an hour of images
            make_folder(report_to)
        loaded = _load(run, backbone)
        loaded.model.to(device)
        predicted: list[Tensor] = []
        figures, truth = evaluate_on(loaded, data, predicted, bad_files, bench.images)
        _warn_of_training_images(run, loaded, data)
        classes = class_report(loaded.classes, truth, torch.cat(predicted)) if (
            report or report_to) else {}  # fmt: skip
        where = data
    out.print(
        f"accuracy {100 * figures['accuracy']:.2f}%, cross-entropy {figures['loss']:.4f} "
        f"nats over {figures['images']} images of {where}",
        highlight=False,
    )
    if report:
        out.print(_report_table(classes))
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
        typer.echo(
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
        table.add_row(escape(row["class"]), *shares, str(row["support"]))
    return table


def predict_command(
    run: Annotated[Path, typer.Argument(help="A run's folder or checkpoint.")],
    paths: Annotated[list[Path], typer.Argument(help="Images, or folders of images.")],
    form: Annotated[
        str | None,
        typer.Option(
            "--format", help="table, csv or json.", show_default="table; by --output's name"
        ),
    ] = None,
    output: Annotated[Path | None, typer.Option("--output", help="Write csv or json here.")] = None,
    unreadable: Annotated[
        str, typer.Option(help="Files that are no whole images: fail, or skip (and name them).")
    ] = "fail",
    backbone: Moved = None,
    threads: Threads = None,
    device: Device = "cpu",
) -> None:
    """Class and probability of images."""
    set_up(threads, device)
    if form is None:
        form = "table" if output is None else _form_of(output)
    choose("--format", form, ["csv", "json"] if output is not None else ["table", "csv", "json"])
    choose("--unreadable", unreadable, UNREADABLE)
    if output is not None and not output.resolve().parent.is_dir():
        raise UserError(f"--output: folder {output.parent} does not exist; create it first")
    images = gather_images(paths)
    loaded = _load(run, backbone)
    loaded.model.to(device)
    skipped: list[str] = []

    def readable() -> Iterator[Prediction]:
        # The bar is for people: it shows on a terminal alone.
        for one in tqdm(
            predict(loaded, images, unreadable), total=len(images), unit="image", disable=None
        ):
            if one.error:
                skipped.append(one.error)
            else:
                yield one

    if output is not None:
        with replacing(output, "w") as file:
            count = write_predictions(file, form, loaded.classes, readable())
        out.print(f"wrote {count} predictions to {output}", soft_wrap=True)
    elif form == "table":
        table = Table("file", "class", "probability")
        for one in readable():
            name, chance = loaded.classes[one.best], one.probabilities[one.best]
            table.add_row(escape(str(one.path)), escape(name), f"{chance:.3f}")
        out.print(table)
    else:
        write_predictions(sys.stdout, form, loaded.classes, readable())
    for error in skipped:
        typer.echo(f"skipped: {error}", err=True)
    if skipped:
        typer.echo(f"skipped {len(skipped)} of {len(images)} files", err=True)


def _form_of(output: Path) -> str:
    form = output.suffix.lower().removeprefix(".")
    if form not in ("csv", "json"):
        raise UserError(
            f"--output: {output}: expected a name that ends with .csv or .json; change it, or add "
            "--format csv or --format json"
        )
    return form


def export(
    run: Annotated[Path, typer.Argument(help="A run's folder or checkpoint.")],
    form: Annotated[str, typer.Option("--format", help="torch-export or onnx.")] = "torch-export",
    steps: Annotated[
        int, typer.Option(help="lion: iterations that each implicit layer is unrolled to.")
    ] = 20,
    output: Annotated[
        Path | None, typer.Option("--output", show_default="RUN/model.pt2 or RUN/model.onnx")
    ] = None,
    images: Annotated[
        list[Path] | None,
        typer.Option(
            help="Images or folders to compare on.", show_default="the run's validation images"
        ),
    ] = None,
    backbone: Moved = None,
    moved_data: MovedData = None,
    threads: Threads = None,
) -> None:
    """Write a classifier as one file that needs no lion_models, and compare it on real images."""
    set_up(threads, "cpu")
    choose("--format", form, FORMATS)
    folder = run if run.is_dir() else run.parent
    output = folder / f"model.{FORMATS[form]}" if output is None else output
    if not output.resolve().parent.is_dir():
        raise UserError(f"--output: folder {output.parent} does not exist; create it first")
    loaded = _load(run, backbone)
    if images:
        if moved_data is not None:
            raise UserError("--moved-data: --images are compared on instead; leave one out")
        paths = gather_images(images)[:COMPARED_IMAGES]
        shape = loaded.model.backbone.channels, loaded.model.backbone.image_size
        decoded = [decode_image(path, *shape, loaded.config.data.transform) for path in paths]
        pixels = torch.stack(decoded * (1 if len(decoded) > 1 else 2))
    else:
        own = Run(folder, loaded.config, moved_data=moved_data)
        pixels = own.validation_images(COMPARED_IMAGES)
    written = export_run(loaded, pixels, output, form, steps)
    figures = written.metadata
    size = written.path.stat().st_size
    out.print(f"wrote {written.path}, {size:,} bytes", highlight=False, soft_wrap=True)
    out.print(
        f"largest difference of a logit over {figures['compared_images']} images: "
        f"{figures['difference']:.2g} from the trained model, of which the file's own runtime "
        f"makes {figures['difference_of_export']:.2g}",
        highlight=False,
    )
    changed = figures["classes_changed_by_unrolling"]
    if changed:
        out.print(
            f"[bold yellow]warning:[/] {changed} of these images get another class with "
            f"{steps} plain iterations than at the equilibrium; raise --steps, and if that does "
            "not help, the trained layer does not contract"
        )


def info(
    run: Annotated[
        Path | None,
        typer.Argument(help="A run's folder or checkpoint.", show_default="the backbone alone"),
    ] = None,
    backbone: Backbone = TINY_VIT,
) -> None:
    """What a run or a backbone is: parameters, licence, memory of a step, solver steps."""
    facts = _backbone_facts(backbone) if run is None else _run_facts(run)
    table = Table(show_header=False)
    table.add_column()
    table.add_column(overflow="fold")
    for key, value in facts.items():
        table.add_row(key, escape(str(value)))
    out.print(table)


def _backbone_facts(name: str) -> dict[str, Any]:
    facts = load_backbone(name).describe()
    if name == TINY_VIT:
        facts |= read_vit(tiny_vit_path())[1]["training"]
    return facts


def _run_facts(run: Path) -> dict[str, Any]:
    loaded = load_run(run)
    model, config = loaded.model, loaded.config
    facts: dict[str, Any] = {
        "classes": ", ".join(loaded.classes),
        "weights sha256": loaded.weights,
        **config.to_dict(),
    }
    result = run / "result.json"
    if result.is_file():
        figures = json.loads(result.read_text())
        facts |= figures["parameters"]
        facts |= {key: figures.get(key) for key in ("best_epoch", "validation_accuracy", "test")}
        for side, solve in figures["solver"].items():
            shown = ", ".join(f"{name} {value:.4g}" for name, value in solve.items())
            facts[f"solver, {side}"] = shown
    side = model.backbone.image_size
    images = torch.rand(config.training.batch, model.backbone.channels, side, side)
    facts[f"memory, batch of {config.training.batch}"] = (
        f"{kept_bytes(model, images) / 2**20:.2f} MiB kept for the backward pass"
    )
    return facts
