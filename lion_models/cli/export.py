"""Write a classifier as one file that needs no lion_models, and compare it on real images."""

from __future__ import annotations

from pathlib import Path

import rich_click as click
import torch

from lion_models.backbones import load_backbone
from lion_models.base.errors import UserError, choose
from lion_models.cli import options
from lion_models.cli.console import out
from lion_models.data.images import decode_file
from lion_models.run import Run, load_run
from lion_models.run.export import FORMATS, TOLERANCE, beside, export_run
from lion_models.run.feeding import example
from lion_models.run.predict import gather_images

__all__ = ["command"]

COMPARED_IMAGES = 64


@click.command("export", help=__doc__)
@options.path_argument("run", "A run's folder or checkpoint.")
@click.option(
    "--format",
    "form",
    type=options.Names(*FORMATS),
    default="torch-export",
    show_default=True,
    help="Of the file.",
)
@click.option(
    "--steps",
    type=int,
    show_default="as few as keep within --tolerance",
    help="lion: iterations that each implicit layer is unrolled to.",
)
@click.option(
    "--tolerance",
    default=TOLERANCE,
    show_default=True,
    help="Largest difference of a logit that needs no warning.",
)
@options.path_option("--output", "The file.", "RUN/model.pt2 or RUN/model.onnx")
@options.path_option(
    "--images",
    "Images or folders to compare on.",
    "the run's validation images",
    multiple=True,
)
@options.BACKBONE_PLACE
@options.MOVED_DATA
@options.machine_options("threads")
def command(
    run: Path,
    form: str,
    steps: int | None,
    tolerance: float,
    output: Path | None,
    images: tuple[Path, ...],
    backbone: str | None,
    moved_data: str | None,
    machine: options.Machine,
) -> None:
    choose("format", form, FORMATS)
    folder = run if run.is_dir() else run.parent
    output = folder / f"model.{FORMATS[form]}" if output is None else output
    if not output.resolve().parent.is_dir():
        raise UserError(f"--output: folder {output.parent} does not exist; create it first")
    loaded = load_run(run, None if backbone is None else load_backbone(backbone))
    if images:
        if moved_data is not None:
            raise UserError("--moved-data: --images are compared on instead; leave one out")
        paths = gather_images(images)[:COMPARED_IMAGES]
        decoded = [decode_file(path, loaded.geometry) for path in paths]
        pixels = torch.stack(decoded * (1 if len(decoded) > 1 else 2))
    else:
        own = Run(folder, loaded.config, moved_data=moved_data)
        pixels = own.validation_images(COMPARED_IMAGES)
    written = export_run(loaded, pixels, output, form, steps, tolerance)
    figures = written.metadata
    size = written.path.stat().st_size
    out.print(f"wrote {written.path}, {size:,} bytes", highlight=False, soft_wrap=True)
    out.print(f"wrote {beside(written.path)}: classes, preprocessing", soft_wrap=True)
    unrolled = f", {figures['steps']} plain iterations a layer" if figures["steps"] else ""
    out.print(
        f"largest difference of a logit over {figures['compared_images']} images: "
        f"{figures['difference']:.2g} from the trained model, of which the file's own runtime "
        f"makes {figures['difference_of_export']:.2g}{unrolled}",
        highlight=False,
    )
    click.echo(f"\nto use it, with numpy, Pillow and the runtime alone:\n\n{example(output, form)}")
