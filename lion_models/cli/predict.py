"""Class and probability of images."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import rich_click as click
from rich.table import Table
from tqdm import tqdm

from lion_models.backbones import load_backbone
from lion_models.base.errors import UserError, choose
from lion_models.base.files import replacing
from lion_models.cli import options
from lion_models.cli.console import out
from lion_models.cli.text import dashed
from lion_models.run import load_run
from lion_models.run.predict import (
    UNREADABLE,
    UNSURE,
    Answers,
    Prediction,
    gather_images,
    predict,
    write_predictions,
)

__all__ = ["command"]


@click.command("predict", help=__doc__)
@options.path_argument("run", "A run's folder or checkpoint.")
@options.path_argument("paths", "Images, or folders of images.", nargs=-1)
@click.option(
    "--format",
    "form",
    type=options.Names("table", "csv", "json"),
    show_default="table; by --output's name",
    help="Of what is written.",
)
@options.path_option("--output", "Write csv or json here.")
@click.option("--top", default=1, show_default=True, help="Classes to name, most probable first.")
@click.option(
    "--threshold",
    default=0.0,
    show_default="every answer is told",
    help=f"Where the most probable class has less, the answer is '{UNSURE}'.",
)
@click.option(
    "--unreadable",
    type=options.Names(*UNREADABLE),
    default="fail",
    show_default=True,
    help="Files that are no whole images: fail, or skip (and name them).",
)
@options.BACKBONE_PLACE
@options.machine_options("threads", "device")
def command(
    run: Path,
    paths: tuple[Path, ...],
    form: str | None,
    output: Path | None,
    top: int,
    threshold: float,
    unreadable: str,
    backbone: str | None,
    machine: options.Machine,
) -> None:
    if form is None:
        form = "table" if output is None else _form_of(output)
    choose("format", form, ["csv", "json"] if output is not None else ["table", "csv", "json"])
    choose("--unreadable", unreadable, UNREADABLE)
    if output is not None and not output.resolve().parent.is_dir():
        raise UserError(f"--output: folder {output.parent} does not exist; create it first")
    images = gather_images(paths)
    loaded = load_run(run, None if backbone is None else load_backbone(backbone))
    loaded.model.to(machine.device)
    answers = Answers(loaded.classes, top, threshold)
    skipped: list[str] = []
    count = unsure = 0

    def readable() -> Iterator[Prediction]:
        nonlocal count, unsure
        # The bar is for people: it shows on a terminal alone.
        for one in tqdm(
            predict(loaded, images, unreadable), total=len(images), unit="image", disable=None
        ):
            if one.error:
                skipped.append(one.error)
            else:
                count += 1
                unsure += one.probabilities[one.best] < threshold
                yield one

    if output is not None:
        with replacing(output, "w") as file:
            write_predictions(file, form, answers, readable())
        out.print(f"wrote {count} predictions to {output}", soft_wrap=True)
    elif form == "table":
        table = Table()
        table.add_column("file", overflow="fold")
        table.add_column("class", overflow="fold")
        table.add_column("probability")
        for one in readable():
            ranked = [(name, f"{chance:.3f}") for name, chance in answers.ranked(one)]
            if answers.name(one) == UNSURE:
                chance = "" if top > 1 else f"{one.probabilities[one.best]:.3f}"
                ranked = [(UNSURE, chance), *(ranked if top > 1 else ())]
            for at, cells in enumerate(ranked):
                table.add_row("" if at else str(one.path), *cells)
        out.print(table)
    else:
        write_predictions(sys.stdout, form, answers, readable())
    if unsure:
        click.echo(f"unsure of {unsure} of {count}: no class has {threshold:g}", err=True)
    for error in skipped:
        click.echo(dashed(f"skipped: {error}"), err=True)
    if skipped:
        click.echo(f"skipped {len(skipped)} of {len(images)} files", err=True)


def _form_of(output: Path) -> str:
    form = output.suffix.lower().removeprefix(".")
    if form not in ("csv", "json"):
        raise UserError(
            f"--output: {output}: expected a name that ends with .csv or .json; change it, or add "
            "--format csv or --format json"
        )
    return form
