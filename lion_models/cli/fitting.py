"""What commands choose by the data where the user has not."""

from __future__ import annotations

import rich_click as click

from lion_models.data.splits import fitting_shots
from lion_models.run import RunConfig
from lion_models.run.workbench import Workbench

__all__ = ["fitted_shots"]


def fitted_shots(config: RunConfig, bench: Workbench) -> int | None:
    """The default number of training images a class, or as many as the smallest class has.

    Where no number fits it stays, and the split says why.
    """
    data = config.data
    if data.shots is None or data.imbalance is not None:
        return data.shots
    source = bench.source(data, bench.backbone(config.backbone.backbone))
    shots = fitting_shots(source, data.shots, data.validation_shots)
    if not shots or shots == data.shots:
        return data.shots
    click.echo(
        f"training on {shots} images a class, not {data.shots}: the smallest class has no more "
        "(--shots sets it; --shots all takes 70% of every class)",
        err=True,
    )
    return shots
