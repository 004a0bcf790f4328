"""A grid of options, chosen on validation data: sweep.json, sweep.png. Continues by itself.

The test set is not read without --test-best, which adds tested.md and tested.png. Several
commands may share a folder.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import rich_click as click

from lion_models.base.errors import UserError
from lion_models.cli import options
from lion_models.cli.console import out
from lion_models.cli.fitting import AUTO, fitted_shots
from lion_models.cli.progress import TrialBars
from lion_models.cli.summary import announced
from lion_models.cli.text import fit_table, folder_in, listed, numbers, short_name
from lion_models.methods import METHODS, SHOWN_METHODS
from lion_models.run.config import check_felt
from lion_models.study.plan import Plan, parse_axis
from lion_models.study.presets import run_sweep
from lion_models.study.report import sweep_tables
from lion_models.study.runner import TrialRunner

__all__ = ["command"]


@click.command("sweep", help=__doc__)
@click.option(
    "--grid",
    multiple=True,
    help="OPTION=VALUE,VALUE to choose from; METHOD.OPTION for one method alone.",
)
@click.option(
    "--over",
    multiple=True,
    help="OPTION=VALUE,VALUE: a separate choice for each, such as shots=5,20.",
)
@options.methods_option(",".join(SHOWN_METHODS))
@click.option(
    "--seeds", default="42", show_default=True, help="Comma-separated; their mean chooses."
)
@click.option("--test-best", is_flag=True, help="Read the test set with what was chosen.")
@click.option(
    "--test-seeds",
    default="",
    show_default="--seeds",
    help="Seeds of the tested runs, comma-separated.",
)
@click.option("--name", show_default="sweep-DATA", help="Of the folder in --runs.")
@options.run_options("seed", "folds", "fold")
@options.RUNS
@options.OVERWRITE
@options.JOBS
@options.machine_options()
def command(
    given: options.Given,
    grid: tuple[str, ...],
    over: tuple[str, ...],
    methods: str,
    seeds: str,
    test_best: bool,
    test_seeds: str,
    name: str | None,
    runs: Path,
    overwrite: bool,
    jobs: int,
    machine: options.Machine,
) -> None:
    if test_seeds and not test_best:
        raise UserError("--test-seeds: goes with --test-best, which is not there")
    if given.values["backbone"] == AUTO:
        raise UserError("--backbone auto: a sweep's backbones are named; name it")
    plan = Plan(
        given.values,
        tuple(listed("--methods", methods, METHODS)),
        tuple(numbers("--seeds", seeds, int)),
        tuple(parse_axis("grid", text) for text in grid),
        tuple(parse_axis("over", text) for text in over),
    )
    tested = numbers("--test-seeds", test_seeds, int)
    configs = plan.configs()
    check_felt(given.names, configs)
    data = given.values["data"]
    folder = folder_in(runs, name, f"sweep-{short_name(data)}")
    trials = options.trials_on(machine, plot=False)
    with TrialBars(jobs) as bars, TrialRunner(jobs, machine.threads, trials) as runner:
        if "shots" not in {*given.names, *(axis.key for axis in (*plan.grid, *plan.over))}:
            plan = replace(plan, base={**plan.base, "shots": fitted_shots(configs, runner.bench)})
        content = run_sweep(
            folder,
            plan,
            runner,
            test_best=test_best,
            test_seeds=tested,
            overwrite=overwrite,
            on_trials=announced(bars.together, runner.bench),
        )
    plural = "seed" if len(plan.seeds) == 1 else "seeds"
    marked = "what was chosen" if plan.over else "* is chosen"
    where = "" if any(axis.key == "data" for axis in plan.over) else f"{data}, "
    for table in sweep_tables(content, f"{where}{len(plan.seeds)} {plural}; {marked}"):
        out.print(fit_table(table, out))
    wrote = ["sweep.json", "sweep.png"] + ["tested.md", "tested.png"] * bool(content["tested"])
    out.print(f"wrote {', '.join(wrote)} in {folder}", soft_wrap=True)
    if content["failed"]:
        shown = "; ".join(f"{run}: {why}" for run, why in list(content["failed"].items())[:3])
        raise UserError(
            f"{len(content['failed'])} of the runs failed, and nothing was tested that depends on "
            f"them; the same command tries them again. {shown}"
        )
