"""What commands choose by the data where the user has not."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from typing import Any

import rich_click as click

from lion_models.backbones import TINY_VIT
from lion_models.base.errors import UserError
from lion_models.data.splits import fitting_shots, split_source
from lion_models.run import RunConfig
from lion_models.run.config import build_model, run_of
from lion_models.run.suited import suited_here, unseen
from lion_models.run.workbench import Workbench

__all__ = ["AUTO", "fitted", "fitted_shots"]

AUTO = "auto"  # what `backbone` may be on the command line


def fitted(
    base: Mapping[str, Any], given: Collection[str], methods: Sequence[str], bench: Workbench
) -> dict[str, Any]:
    """What a command's runs take for options that the user has left open.

    Args:
        base: options that all of them share.
        given: names of those that the user wrote.
        methods: that all have to go together with the backbone.
        bench: opens their data.

    Returns:
        `backbone` and `shots`, chosen by the data where `backbone` is `auto` and `shots` not given.
    """
    chosen = {"backbone": base["backbone"], "shots": base["shots"]}
    auto = chosen["backbone"] == AUTO
    if auto:
        chosen["backbone"] = TINY_VIT
    if "shots" not in given:
        by_folds = bool(base.get("folds"))
        configs = [run_of({**base, **chosen}, method=methods[0])]
        chosen["shots"] = None if by_folds else fitted_shots(configs, bench)
    if auto:
        configs = [run_of({**base, **chosen}, method=method) for method in methods]
        chosen["backbone"] = _fitted_backbone(configs, bench)
    return chosen


def _fitted_backbone(configs: Sequence[RunConfig], bench: Workbench) -> str:
    """The embedded backbone, or one whose weights are on this machine and which sees more."""
    name, data, seed = TINY_VIT, configs[0].data, configs[0].training.seed
    here = suited_here()
    if not here:
        return name
    backbone = bench.backbone(name)
    source = bench.source(data, backbone)
    counts = data.shots, data.validation_shots, data.test_cap
    fold = (1, data.folds) if data.folds and not data.fold else data.held_out
    split = split_source(source, seed, *counts, data.imbalance, fold)
    reasons = unseen(source, split.train, backbone)
    if not reasons:
        return name
    classes = len(source.classes)
    fit = next((each for each in here if _goes_with(each, configs, classes, bench)), None)
    if fit is None:
        return name
    click.echo(
        f"using backbone {fit}, which is on this machine, and not {name}: "
        f"{' and '.join(reasons)} (--backbone sets it)",
        err=True,
    )
    return fit


def _goes_with(name: str, configs: Sequence[RunConfig], classes: int, bench: Workbench) -> bool:
    with suppress(UserError):
        for config in configs:
            build_model(config, bench.backbone(name), classes)
        return True
    return False


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
