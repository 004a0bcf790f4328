"""Methods x seeds on one data set: table, compare.json, compare.png. Continues by itself.

With --folds, each image is tested once: methods x folds, by default with one seed and all images.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import rich_click as click

from lion_models.cli import options
from lion_models.cli.console import out
from lion_models.cli.fitting import fitted
from lion_models.cli.progress import TrialBars
from lion_models.cli.summary import announced
from lion_models.cli.text import fit_table, folder_in, listed, numbers, short_name
from lion_models.methods import METHODS, SHOWN_METHODS
from lion_models.run.config import check_felt, run_of
from lion_models.study.presets import draws_text, run_comparison
from lion_models.study.report import comparison_table, folds_table
from lion_models.study.runner import TrialRunner

__all__ = ["command", "compare"]

SEEDS, ONE_SEED = "42,44,82,100,800", "42"


@click.command("compare", help=__doc__)
@options.methods_option(",".join(SHOWN_METHODS))
@click.option(
    "--seeds", show_default=f"{SEEDS}; 42 with --folds", default=None, help="Comma-separated."
)
@click.option(
    "--lrs",
    default="",
    show_default="each method's",
    help="Comma-separated learning rates; validation chooses one per run.",
)
@click.option("--name", show_default="compare-DATA-SHOTS", help="Of the folder in --runs.")
@options.run_options("seed", "lr", "weight_decay", "fold")
@options.RUNS
@options.OVERWRITE
@options.JOBS
@options.machine_options()
def command(
    given: options.Given,
    methods: str,
    seeds: str | None,
    lrs: str,
    name: str | None,
    runs: Path,
    overwrite: bool,
    jobs: int,
    machine: options.Machine,
) -> None:
    base, names = given.values, listed("--methods", methods, METHODS)
    first = {"fold": 1} if base["folds"] else {}
    check_felt(given.names, [run_of(base, method=each, **first) for each in names])
    runner = TrialRunner(jobs, machine.threads, options.trials_on(machine))
    if seeds is None:
        seeds = ONE_SEED if base["folds"] else SEEDS
    base |= fitted(base, given.names, names, runner.bench)
    shots = "all" if base["shots"] is None else base["shots"]
    folds = f"-{base['folds']}folds" if base["folds"] else ""
    folder = folder_in(runs, name, f"compare-{short_name(base['data'])}-{shots}{folds}")
    rates = numbers("--lrs", lrs, float)
    compare(folder, base, names, numbers("--seeds", seeds, int), rates, overwrite, runner, jobs)


def compare(
    folder: Path,
    base: dict[str, Any],
    methods: Sequence[str],
    seeds: Sequence[int],
    rates: Sequence[float],
    overwrite: bool,
    runner: TrialRunner,
    jobs: int = 1,
) -> None:
    """Run a comparison and show its table; see `run_comparison`."""
    with TrialBars(jobs) as bars, runner:
        result = run_comparison(
            folder,
            base,
            methods,
            seeds,
            rates,
            runner=runner,
            overwrite=overwrite,
            on_trials=announced(bars.one_by_one, runner.bench),
        )
    shots = f"{base['shots']} images a class" if base["shots"] else "all images"
    folds = base.get("folds")
    spread = ", mean ± sd" if len(seeds) > 1 or folds else ""
    title = f"{base['data']}, {shots}, {draws_text(seeds, folds)}{spread}"
    if folds:
        out.print(fit_table(folds_table(result["cells"], "test accuracy (%) of each fold"), out))
    out.print(fit_table(comparison_table(result["summary"], title), out))
    out.print(f"wrote {folder}/compare.json and {folder}/compare.png", soft_wrap=True)
