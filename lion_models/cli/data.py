"""Named data sets: list them, fetch them."""

from __future__ import annotations

from pathlib import Path

import rich_click as click
from rich.table import Table

from lion_models.base.errors import UserError, choose
from lion_models.cli import console
from lion_models.cli.console import Plain
from lion_models.cli.text import fit_table
from lion_models.data.named.catalogue import CATALOGUE, find_files
from lion_models.data.named.prepare import prepare

__all__ = ["command"]

out = Plain(soft_wrap=True)


@click.group("data", help=__doc__)
def command() -> None:
    pass


@command.command("list")
def list_data() -> None:
    """Names, sizes and licences, and what is on this machine."""
    table = Table()
    for heading in ("--data", "classes", "images", "here", "licence", "what"):
        right = heading in ("classes", "images")
        table.add_column(heading, justify="right" if right else "left")
    for entry in CATALOGUE.values():
        here = "yes" if find_files(entry) else "no"
        counts = f"{entry.classes}", f"{entry.images:,}"
        table.add_row(entry.name, *counts, here, entry.licence, entry.what)
    console.out.print(fit_table(table, console.out))
    out.print(
        "'lion data prepare NAME' fetches what is not here. Also: torchvision:NAME, hf:NAME, and "
        "folders (a sub-folder per class, IDX, VTAB-1k, saved Hugging Face data sets)."
    )


@command.command("prepare")
@click.argument("name", help="A name of 'lion data list', or torchvision:NAME.")
@click.option(
    "--folder",
    type=click.Path(path_type=Path),
    show_default="$LION_DATA, else a cache",
    help="Where data sets are kept.",
)
def prepare_data(name: str, folder: Path | None) -> None:
    """Fetch a data set and say where it comes from and under which licence."""
    kind, _, rest = name.partition(":")
    if kind == "torchvision" and rest:
        _prepare_torchvision(rest, folder)
        return
    if kind == "hf":
        raise UserError(
            f"lion data prepare {name}: the package 'datasets' fetches and keeps it by itself; "
            f"use --data {name}"
        )
    entry = CATALOGUE[choose("lion data prepare", name, CATALOGUE)]
    out.print(f"{entry.name}: {entry.what}", highlight=False)
    out.print(f"source: {entry.source}", highlight=False)
    out.print(f"licence: {entry.licence}", highlight=False)
    files, fetched = prepare(entry, folder)
    folders = list(dict.fromkeys(path.parent for path in files))
    where = ", ".join(map(str, files if len(files) <= len(folders) else folders))
    out.print(f"{'fetched to' if fetched else 'already here:'} {where}", highlight=False)
    used = entry.name if folder is None else f"{entry.name}:{folder / entry.name}"
    out.print(f"use it with: --data {used}", highlight=False)


def _prepare_torchvision(name: str, folder: Path | None) -> None:
    # Imported here: they load torch, which the catalogue does not need.
    from lion_models.data.hub import open_torchvision, torchvision_folder
    from lion_models.data.transforms import Geometry

    source = open_torchvision(name, Geometry(3, 32), download=True, root=folder)
    out.print(
        f"{len(source):,} images in {len(source.classes)} classes, in "
        f"{torchvision_folder(name, folder)}; "
        "torchvision does not record the licence: see the data set's own page",
        highlight=False,
    )
    setting = f"LION_DATA={folder} " if folder is not None else ""
    out.print(f"use it with: {setting}--data torchvision:{name}", highlight=False)
