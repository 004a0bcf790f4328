"""Linear probe, VPT-deep and LION on few images: MNIST on the embedded tiny ViT, or --vit."""

from __future__ import annotations

from pathlib import Path

import rich_click as click

from lion_models.cli import options
from lion_models.cli.compare import compare
from lion_models.cli.fitting import fitted
from lion_models.methods import SHOWN_METHODS
from lion_models.run.config import all_options
from lion_models.study.runner import TrialRunner

__all__ = ["command"]

# 84 pixels and 20 epochs, so that two cores need minutes: VPT-deep goes through 11 blocks twice.
VIT_DEMO = all_options(
    data="tuxpaint",
    backbone="vit-s14-focus,image_size=84,readout=11",
    shots=5,
    epochs=20,
    batch=20,
)


@click.command("demo", help=__doc__)
@options.RUNS
@click.option(
    "--vit", is_flag=True, help="ViT-S/14 on the photographs of Tux Paint instead (minutes)."
)
@click.option("--data", show_default="mnist5k; tuxpaint with --vit", help="Other data.")
@options.OVERWRITE
@options.machine_options("threads", "workers", "image_cache")
def command(
    runs: Path,
    vit: bool,
    data: str | None,
    overwrite: bool,
    machine: options.Machine,
) -> None:
    base = VIT_DEMO if vit else all_options(data="mnist5k")
    base = base if data is None else base | {"data": data}
    folder = runs / ("demo-vit" if vit else "demo")
    runner = TrialRunner(options=options.trials_on(machine))
    if data is not None:
        base |= fitted(base, (), SHOWN_METHODS, runner.bench)
    compare(folder, base, SHOWN_METHODS, [42], [], overwrite, runner)
