"""The commands for what is trained already: eval, predict, info."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from lion_models.backbones import load_backbone, read_vit, tiny_vit_path
from lion_models.cli_options import Device, Threads, set_up
from lion_models.errors import UserError, choose
from lion_models.predict import evaluate_on, format_predictions, gather_images, predict
from lion_models.training import load_run, measure_run
from lion_models.training.workbench import Workbench

__all__ = ["evaluate", "info", "predict_command"]

out = Console()


def evaluate(
    run: Annotated[Path, typer.Argument(help="A run's folder, or its checkpoint with --data.")],
    data: Annotated[
        str | None,
        typer.Option(
            help="Other data with the same classes; every image of it is used.",
            show_default="the run's own test set, read once",
        ),
    ] = None,
    threads: Threads = 0,
    device: Device = "cpu",
) -> None:
    """Accuracy of a run: on its own test set (measured once, then remembered) or on other data."""
    set_up(threads, device)
    if data is None:
        if not run.is_dir():
            load_run(run)
            raise UserError(f"{run}: is a checkpoint file; name the run's folder, or add --data")
        figures = measure_run(run, bench=Workbench(device))["test"]
        where = "the run's test set"
    else:
        loaded = load_run(run)
        loaded.model.to(device)
        figures = evaluate_on(loaded, data)
        where = data
    out.print(
        f"accuracy {100 * figures['accuracy']:.2f}%, cross-entropy {figures['loss']:.4f} "
        f"nats over {figures['images']} images of {where}",
        highlight=False,
    )


def predict_command(
    run: Annotated[Path, typer.Argument(help="A run's folder or checkpoint.")],
    paths: Annotated[list[Path], typer.Argument(help="Images, or folders of images.")],
    form: Annotated[str, typer.Option("--format", help="table, csv or json.")] = "table",
    output: Annotated[Path | None, typer.Option("--output", help="Write csv or json here.")] = None,
    threads: Threads = 0,
    device: Device = "cpu",
) -> None:
    """Class and probability of images."""
    set_up(threads, device)
    choose("--format", form, ["table", "csv", "json"])
    if output is not None and not output.resolve().parent.is_dir():
        raise UserError(f"--output: folder {output.parent} does not exist; create it first")
    images = gather_images(paths)
    loaded = load_run(run)
    loaded.model.to(device)
    rows = predict(loaded, images)
    if output is not None:
        kind = "json" if form == "json" or output.suffix == ".json" else "csv"
        output.write_text(format_predictions(rows, kind) + "\n")
        out.print(f"wrote {len(rows)} predictions to {output}")
    elif form == "table":
        table = Table("file", "class", "probability")
        for row in rows:
            table.add_row(_escape(row["file"]), _escape(row["class"]), f"{row['probability']:.3f}")
        out.print(table)
    else:
        typer.echo(format_predictions(rows, form))


def info(
    run: Annotated[
        Path | None,
        typer.Argument(help="A run's folder or checkpoint.", show_default="the embedded backbone"),
    ] = None,
) -> None:
    """What a run or the embedded backbone is: parameters, fingerprint, figures."""
    if run is None:
        backbone = load_backbone("tiny-vit")
        training = read_vit(tiny_vit_path())[1]["training"]
        facts: dict[str, Any] = {
            "backbone": backbone.name,
            "sha256": backbone.fingerprint,
            "parameters": sum(p.numel() for p in backbone.parameters()),
            **training,
        }
    else:
        loaded = load_run(run)
        result = run / "result.json"
        facts = {
            "classes": ", ".join(loaded.classes),
            "weights sha256": loaded.weights,
            **loaded.config.to_dict(),
        }
        if result.is_file():
            figures = json.loads(result.read_text())
            facts |= figures["parameters"] | {
                key: figures.get(key) for key in ("best_epoch", "validation_accuracy", "test")
            }
    table = Table("", "", show_header=False)
    for key, value in facts.items():
        table.add_row(key, _escape(str(value)))
    out.print(table)


def _escape(text: str) -> str:
    return text.replace("[", "\\[")
