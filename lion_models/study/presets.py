"""The two studies that the command line knows: a comparison of methods, and a sweep of options."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lion_models.base.errors import UserError
from lion_models.base.files import write_bytes, write_json
from lion_models.study.plan import Axis, Plan
from lion_models.study.report import (
    comparison_content,
    measured_markdown,
    measured_methods,
    sweep_content,
)
from lion_models.study.runner import TrialRunner
from lion_models.study.study import OnTrials, Study, run_study

__all__ = ["draws_text", "run_comparison", "run_sweep", "write_measured"]


def run_comparison(
    folder: Path,
    base: Mapping[str, Any],
    methods: Sequence[str],
    seeds: Sequence[int],
    rates: Sequence[float] = (),
    *,
    runner: TrialRunner,
    overwrite: bool = False,
    on_trials: OnTrials = lambda trials: lambda event: None,
) -> dict[str, Any]:
    """Train every method with every seed, test each once, and write compare.json and compare.png.

    Args:
        folder: holds one run per trial, `METHOD-sSEED` (and `-lrRATE` where rates are given).
        base: options that all runs share; their method and seed are replaced. With `folds`, each
            fold is tested in a run of its own, `METHOD-sSEED-foldN`.
        methods: names of methods.
        seeds: one run per method and seed.
        rates: learning rates to try for each of them; validation chooses, and only the chosen one
            is tested. Empty means each method's default.
        runner, overwrite, on_trials: see `run_study`.

    Returns:
        The content of compare.json; see `comparison_content`.

    Raises:
        UserError: a folder holds something else, or a run failed.
    """
    from lion_models.study.plot import plot_comparison  # drawing takes long to load

    grid = (Axis("lr", tuple(rates)),) if rates else ()
    folds = base.get("folds")
    over = (Axis("fold", tuple(range(1, folds + 1))),) if folds else ()
    plan = Plan(base, tuple(methods), tuple(seeds), grid, over, each_seed=True)
    study = run_study(folder, plan, runner, test=True, overwrite=overwrite, on_trials=on_trials)
    if study.failed:
        run, message = next(iter(study.failed.items()))
        others = f" (and {len(study.failed) - 1} more)" if len(study.failed) > 1 else ""
        raise UserError(f"{run}: {message}{others}")
    content = comparison_content(study)
    write_json(folder / "compare.json", content)
    shots = f"{base['shots']} images a class" if base["shots"] else "all images"
    draws = draws_text(seeds, folds)
    title = f"{base['data']}, {shots}, frozen {base['backbone']}, {draws}"
    plot_comparison(folder / "compare.png", title, content["cells"])
    return content


def draws_text(seeds: Sequence[int], folds: int | None) -> str:
    """What the runs of a method differ in: `seed 42`, `5 seeds`, `5 folds`, `2 seeds x 5 folds`."""
    one = f"{len(seeds)} seeds" if len(seeds) > 1 else f"seed {seeds[0]}"
    if not folds:
        return one
    return f"{folds} folds" if len(seeds) == 1 else f"{one} x {folds} folds"


def run_sweep(
    folder: Path,
    plan: Plan,
    runner: TrialRunner,
    *,
    test_best: bool = False,
    test_seeds: Sequence[int] = (),
    overwrite: bool = False,
    on_trials: OnTrials = lambda trials: lambda event: None,
) -> dict[str, Any]:
    """Run what is missing of a grid, choose by validation, and write what came out.

    That is sweep.json and sweep.png, and once the test set has been read tested.md and tested.png.

    Args:
        folder: holds one run for each trial; several commands, on several machines, may share it.
        plan: the grid.
        test_best: read the test set with what was chosen.
        test_seeds, runner, overwrite, on_trials: see `run_study`.

    Returns:
        The content of sweep.json; see `sweep_content`.
    """

    from lion_models.study.plot import plot_sweep

    content: dict[str, Any] = {}

    def keep(study: Study) -> None:
        content.update(sweep_content(study))
        write_json(folder / "sweep.json", content)
        plot_sweep(folder / "sweep.png", content)
        write_measured(folder, content)

    run_study(
        folder,
        plan,
        runner,
        test=test_best,
        test_seeds=test_seeds,
        overwrite=overwrite,
        on_trials=on_trials,
        keep=keep,
    )
    return content


def write_measured(folder: Path, content: dict[str, Any]) -> None:
    """Write tested.md and tested.png, if the test set has been read.

    Args:
        folder: of the sweep.
        content: of sweep.json.
    """
    from lion_models.study.plot import plot_tested

    tested = measured_methods(content)
    if tested:
        write_bytes(folder / "tested.md", measured_markdown(content).encode())
        shown = {one.method: (one.without_head, one.accuracies) for one in tested}
        plot_tested(folder / "tested.png", shown)
