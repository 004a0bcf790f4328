"""Where in a picture a run finds its answer: a PNG of the gradient over the picture."""

from __future__ import annotations

from pathlib import Path

import rich_click as click
import torch

from lion_models.backbones import load_backbone
from lion_models.base.errors import UserError, choose
from lion_models.cli import options
from lion_models.cli.console import out
from lion_models.data.images import decode_file
from lion_models.run import load_run
from lion_models.run.explain import draw_saliency, saliency

__all__ = ["command"]


@click.command("explain", help=__doc__)
@options.path_argument("run", "A run's folder or checkpoint.")
@options.path_argument("image", "A picture.")
@click.option("--class", "name", show_default="the most probable one", help="To explain.")
@options.path_option("--output", "The PNG.", "IMAGE-explained.png, in this folder")
@options.BACKBONE_PLACE
@options.machine_options("threads", "device")
def command(
    run: Path,
    image: Path,
    name: str | None,
    output: Path | None,
    backbone: str | None,
    machine: options.Machine,
) -> None:
    output = Path(f"{image.stem}-explained.png") if output is None else output
    if not output.resolve().parent.is_dir():
        raise UserError(f"--output: folder {output.parent} does not exist; create it first")
    if output.exists() and output.samefile(image):
        raise UserError(f"--output: {output} is the picture itself; choose another name")
    loaded = load_run(run, None if backbone is None else load_backbone(backbone))
    model = loaded.model.to(machine.device)
    pixels = decode_file(image, loaded.geometry)
    inputs = pixels.to(machine.device).float() / 255
    with torch.no_grad():
        chances = model(inputs[None]).softmax(1)[0]
    best = int(chances.argmax())
    label = best
    if name is not None:
        label = loaded.classes.index(choose("--class", name, loaded.classes))
    answer = f"{loaded.classes[label]}, probability {chances[label]:.3f}"
    draw_saliency(output, pixels, saliency(model, inputs, label), f"{image.name}: {answer}")
    out.print(answer, highlight=False)
    out.print(f"wrote {output}", soft_wrap=True)
