"""The `lion sweep` command."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from lion_models.base.errors import UserError, choose
from lion_models.cli.options import (
    Data,
    Device,
    ImageCache,
    Jobs,
    Overwrite,
    Runs,
    Shots,
    Threads,
    Workers,
    distinct,
    folder_in,
    given_run_options,
    numbers,
    options_of,
    set_up,
    short_name,
)
from lion_models.cli.progress import TrialBars
from lion_models.data.loader import IMAGE_CACHE
from lion_models.methods import METHODS, SHOWN_METHODS
from lion_models.run.config import check_felt
from lion_models.study.plan import Plan, parse_axis
from lion_models.study.presets import run_sweep
from lion_models.study.report import sweep_tables
from lion_models.study.runner import TrialRunner
from lion_models.study.trial import TrialOptions

__all__ = ["sweep"]

out = Console()


def sweep(
    ctx: typer.Context,
    data: Data,
    grid: Annotated[
        list[str] | None,
        typer.Option(help="OPTION=VALUE,VALUE to choose from; METHOD.OPTION for one method alone."),
    ] = None,
    over: Annotated[
        list[str] | None,
        typer.Option(help="OPTION=VALUE,VALUE: a separate choice for each, such as shots=5,20."),
    ] = None,
    methods: Annotated[
        str, typer.Option(help=f"Comma-separated, of {', '.join(METHODS)}; or all.")
    ] = ",".join(SHOWN_METHODS),
    seeds: Annotated[str, typer.Option(help="Comma-separated; their mean chooses.")] = "42",
    test_best: Annotated[
        bool, typer.Option("--test-best", help="Read the test set with what was chosen.")
    ] = False,
    test_seeds: Annotated[
        str,
        typer.Option(help="Seeds of the tested runs, comma-separated.", show_default="--seeds"),
    ] = "",
    name: Annotated[str | None, typer.Option(show_default="sweep-DATA")] = None,
    shots: Shots = "20",
    runs: Runs = Path("runs"),
    overwrite: Overwrite = False,
    jobs: Jobs = 1,
    threads: Threads = None,
    workers: Workers = None,
    image_cache: ImageCache = IMAGE_CACHE,
    device: Device = "cpu",
) -> None:
    """A grid of options, chosen on validation data: sweep.json, sweep.png. Continues by itself.

    The test set is not read without --test-best, which adds tested.md and tested.png. Several
    commands may share a folder.
    """
    set_up(threads, device)
    if test_seeds and not test_best:
        raise UserError("--test-seeds: goes with --test-best, which is not there")
    names = METHODS if methods == "all" else methods.split(",")
    plan = Plan(
        options_of(ctx),
        tuple(
            distinct("--methods", [choose("--methods", part.strip(), METHODS) for part in names])
        ),
        tuple(distinct("--seeds", numbers("--seeds", seeds, int))),
        tuple(parse_axis("grid", text) for text in grid or ()),
        tuple(parse_axis("over", text) for text in over or ()),
    )
    tested = (
        distinct("--test-seeds", numbers("--test-seeds", test_seeds, int)) if test_seeds else []
    )
    check_felt(given_run_options(ctx), plan.configs())
    folder = folder_in(runs, name, f"sweep-{short_name(data)}")
    options = TrialOptions(device, plot=False, workers=workers, image_cache=image_cache)
    with TrialBars(jobs) as bars, TrialRunner(jobs, threads, options) as runner:
        content = run_sweep(
            folder,
            plan,
            runner,
            test_best=test_best,
            test_seeds=tested,
            overwrite=overwrite,
            on_trials=bars.together,
        )
    plural = "seed" if len(plan.seeds) == 1 else "seeds"
    marked = "what was chosen" if plan.over else "* is chosen"
    where = "" if any(axis.key == "data" for axis in plan.over) else f"{data}, "
    for table in sweep_tables(content, f"{where}{len(plan.seeds)} {plural}; {marked}"):
        out.print(table)
    wrote = ["sweep.json", "sweep.png"] + ["tested.md", "tested.png"] * bool(content["tested"])
    out.print(f"wrote {', '.join(wrote)} in {folder}", soft_wrap=True)
    if content["failed"]:
        shown = "; ".join(f"{run}: {why}" for run, why in list(content["failed"].items())[:3])
        raise UserError(
            f"{len(content['failed'])} of the runs failed, and nothing was tested that depends on "
            f"them; the same command tries them again. {shown}"
        )
