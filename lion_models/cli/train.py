"""Train one method; writes RUNS/NAME. Under torchrun, processes share every batch.

With --folds, each image is tested once: RUNS/NAME has a run for each fold, and what they came to.
"""

from __future__ import annotations

import os
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import rich_click as click

from lion_models.base.errors import UserError
from lion_models.cli import options
from lion_models.cli.compare import compare
from lion_models.cli.console import out
from lion_models.cli.fitting import AUTO, fitted
from lion_models.cli.progress import ProgressBars
from lion_models.cli.summary import summary
from lion_models.cli.text import folder_in, short_name
from lion_models.run import Run, RunConfig
from lion_models.run.balance import accuracy_text
from lion_models.run.config import check_felt, run_of
from lion_models.run.data_record import stored_name
from lion_models.run.folder import check_begun, read_config
from lion_models.run.ranks import joined_ranks
from lion_models.run.workbench import Workbench
from lion_models.study.runner import TrialRunner

__all__ = ["command"]


@click.command("train", help=__doc__)
@options.METHOD
@click.option("--name", show_default="DATA-METHOD-sSEED", help="Of the run's folder in --runs.")
@options.run_options(optional=["data"], defaults={"backbone": AUTO})
@options.RUNS
@click.option("--resume", is_flag=True, help="Continue an interrupted run.")
@options.MOVED_DATA
@options.CHANGED_DATA
@options.OVERWRITE
@click.option(
    "--test/--no-test", default=True, show_default=True, help="Read the test set at the end."
)
@click.option("--tensorboard", is_flag=True, help="Write scalars to RUNS/NAME/tensorboard.")
@options.machine_options()
def command(
    given: options.Given,
    method: str,
    name: str | None,
    runs: Path,
    resume: bool,
    moved_data: str | None,
    changed_data: bool,
    overwrite: bool,
    test: bool,
    tensorboard: bool,
    machine: options.Machine,
) -> None:
    data = given.values["data"] or _remembered_data(runs, name, resume)
    given = given._replace(values=given.values | {"data": data})
    if given.values["folds"] and given.values["fold"] is None:
        _cross_validate(given, method, name, runs, overwrite, machine)
        return
    config = run_of(given.values, method=method).resolved()
    part = config.data.held_out
    fold = f"-fold{part[0]}" if part else ""
    folder = folder_in(runs, name, f"{short_name(data)}-{method}-s{config.training.seed}{fold}")
    if moved_data is not None and not resume:
        raise UserError("--moved-data: goes with --resume; name a new run's data with --data")
    if changed_data and not resume:
        raise UserError("--changed-data: goes with --resume; a new run takes its data as it is")
    if resume:
        check_begun(folder)
        config = _resumed(folder, given, method, moved_data)
    check_felt(given.names, [config])
    bench = Workbench(machine.device, machine.workers, machine.image_cache)
    if not resume:
        config = config.but(**fitted(config.options(), given.names, [method], bench))
    run = Run(folder, config, bench=bench, moved_data=moved_data, changed_data=changed_data)
    with ExitStack() as held, joined_ranks(machine.device) as ranks:
        if ranks.first:
            held.enter_context(run.held(resume=resume, overwrite=overwrite))
            out.print(summary(run), highlight=False, soft_wrap=True)
        with ProgressBars() as bars:
            result = run.train(
                test=test,
                on_epoch=lambda state: bars.update(config, state),
                tensorboard=tensorboard,
                ranks=ranks,
            )
    if ranks.first:
        _show_result(folder, result)
        if result.get("diverged"):
            _say_diverged(config, result)
            raise SystemExit(1)


def _cross_validate(
    given: options.Given,
    method: str,
    name: str | None,
    runs: Path,
    overwrite: bool,
    machine: options.Machine,
) -> None:
    """A comparison of one method's folds."""
    refused = options.written(["moved_data", "changed_data", "test", "tensorboard"])
    if refused:
        shown = refused[0].replace("_", "-")
        raise UserError(f"--folds: runs a study, which has no --{shown}; leave one of them out")
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UserError("--folds: not under torchrun; 'lion compare --folds --jobs' shares runs")
    base = given.values
    check_felt(given.names, [run_of(base, method=method, fold=1)])
    seed, folds = base["seed"], base["folds"]
    folder = folder_in(runs, name, f"{short_name(base['data'])}-{method}-s{seed}-{folds}folds")
    runner = TrialRunner(1, machine.threads, options.trials_on(machine))
    base |= fitted(base, given.names, [method], runner.bench)
    compare(folder, base, [method], [seed], [], overwrite, runner)


def _remembered_data(runs: Path, name: str | None, resume: bool) -> str:
    """The data of the run that is resumed.

    Raises:
        UserError: none is, or it has no name.
    """
    if not resume:
        raise click.UsageError("Missing option '--data'.")
    if name is None:
        raise UserError("--resume: which run? Name it with --name, or its data with --data")
    return read_config(folder_in(runs, name, "")).data.data


def _say_diverged(config: RunConfig, result: dict[str, Any]) -> None:
    click.echo(
        f"error: training diverged: its loss ended at {result['last_loss']:.3g}, far above that "
        f"of guessing; the weights are those of epoch {result['best_epoch']}; lower --lr (it was "
        f"{config.training.lr:g}) and train again with --overwrite",
        err=True,
    )


def _resumed(folder: Path, given: options.Given, method: str, moved_data: str | None) -> RunConfig:
    """The stored configuration, with what the user wrote out again (so that it is compared)."""
    stored = read_config(folder)
    names = [*given.names, *options.written(["method"])]
    values = given.values | {"method": method}
    values["data"] = stored_name(folder, stored.data.data, values["data"], moved_data)
    return RunConfig.from_dict(stored.options() | {name: values[name] for name in names})


def _show_result(folder: Path, result: dict[str, Any]) -> None:
    counts = result["parameters"]
    out.print(
        f"chosen epoch {result['best_epoch']}: validation accuracy "
        f"{accuracy_text(result, 'validation_')}"
    )
    if "test" in result:
        out.print(
            f"test accuracy {accuracy_text(result['test'])} "
            f"({result['test']['images']} images, read once)"
        )
    out.print(
        f"trained {counts['trained']:,} parameters ({counts['without_head']:,} without the "
        f"head), frozen {counts['frozen']:,}; {result['seconds']:.1f} s"
    )
    if counts.get("kept", counts["trained"]) < counts["trained"]:
        out.print(
            f"pruned to {counts['kept']:,} parameters ({counts['kept_without_head']:,} without "
            f"the head, of which {counts['nonzero_without_head']:,} are not zero)"
        )
    out.print(f"wrote {folder}/checkpoint.safetensors and {folder}/report.html", soft_wrap=True)
