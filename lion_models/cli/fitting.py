"""What commands choose by the data where the user has not."""

from __future__ import annotations

from collections.abc import Sequence

import rich_click as click

from lion_models.data.splits import fitting_shots
from lion_models.run import RunConfig
from lion_models.run.workbench import Workbench

__all__ = ["fitted_shots"]


def fitted_shots(configs: Sequence[RunConfig], bench: Workbench) -> int | None:
    """The default number of training images a class, or as many as the smallest class has.

    Where no number fits it stays, and the split says why.

    Args:
        configs: of runs that all have that default.
        bench: opens their data.
    """
    wanted = configs[0].data.shots
    if wanted is None:
        return None
    kinds = {
        (config.data, config.backbone.backbone)
        for config in configs
        if config.data.imbalance is None
    }
    found = [
        fitting_shots(bench.source(data, bench.backbone(name)), wanted, data.validation_shots)
        for data, name in kinds
    ]
    shots = min((count for count in found if count), default=wanted)
    if shots < wanted:
        click.echo(
            f"training on {shots} images a class, not {wanted}: the smallest class has no more "
            "(--shots sets it; --shots all takes 70% of every class)",
            err=True,
        )
    return shots
