"""The `lion` command."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.markup import escape
from typer.core import TyperGroup

import deqcore
from lion_models.base.errors import UserError, choose
from lion_models.cli import data as cli_data
from lion_models.cli.options import (
    Accumulate,
    AdapterHidden,
    AdapterPlace,
    Amp,
    Augment,
    Backbone,
    BadFiles,
    Batch,
    CheckpointBackbone,
    ClassWeights,
    Data,
    Device,
    Ema,
    Epochs,
    Hidden,
    ImageCache,
    Imbalance,
    Iterations,
    Jobs,
    LoraAlpha,
    LoraRank,
    MaxSteps,
    MovedData,
    Normalisation,
    Optimizer,
    OutputInput,
    Overwrite,
    Pad,
    Patience,
    Prompts,
    PruneAt,
    Robust,
    RobustDecay,
    RobustOn,
    RobustRamp,
    RobustScope,
    RobustSet,
    Rtol,
    Runs,
    Shots,
    Sides,
    SolverName,
    Space,
    Sparsity,
    Strength,
    Tau,
    Threads,
    Transform,
    ValidationShots,
    Verify,
    Workers,
    dashed,
    distinct,
    folder_in,
    given_options,
    given_run_options,
    numbers,
    options_of,
    set_up,
    short_name,
    with_run_options,
)
from lion_models.cli.progress import ProgressBars, TrialBars
from lion_models.cli.runs import evaluate, export, info, predict_command
from lion_models.cli.sweep import sweep
from lion_models.data.loader import IMAGE_CACHE
from lion_models.methods import METHODS, SHOWN_METHODS
from lion_models.run import Run, RunConfig
from lion_models.run.config import all_options, check_felt, run_of
from lion_models.run.data_record import stored_name
from lion_models.run.folder import read_config
from lion_models.run.ranks import joined_ranks
from lion_models.run.workbench import Workbench
from lion_models.study.presets import run_comparison
from lion_models.study.report import comparison_table
from lion_models.study.runner import TrialRunner
from lion_models.study.trial import TrialOptions

__all__ = ["app", "main"]

OPTIONS = all_options()
# 84 pixels and 20 epochs, so that two cores need minutes: a step goes through 11 blocks twice.
VIT_DEMO = all_options(
    data="tuxpaint",
    backbone="vit-s14-focus,image_size=84,readout=11",
    shots=5,
    epochs=20,
    batch=20,
    strength=0.1,
)

out = Console()
err = Console(stderr=True, soft_wrap=True)


class _Commands(TyperGroup):
    """Shows what the user can put right as one message, with exit code 2."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except UserError as error:
            err.print(f"[bold red]error:[/] {escape(dashed(str(error)))}", highlight=False)
            raise typer.Exit(2) from None
        except KeyboardInterrupt:
            err.print(
                "interrupted; the same command continues: train with --resume, "
                "compare, sweep and demo by themselves"
            )
            raise typer.Exit(130) from None


app = typer.Typer(
    cls=_Commands,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

app.add_typer(cli_data.app, name="data")


def _show_version(asked: bool) -> None:
    if asked:
        out.print(f"deqcore {deqcore.__version__}, torch {torch.__version__}", highlight=False)
        raise typer.Exit


@app.callback()
def _lion(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_show_version, is_eager=True, help="Show it and exit."),
    ] = False,
) -> None:
    """Tune a frozen vision backbone with implicit prompts (LION)."""


@app.command()
def train(
    ctx: typer.Context,
    data: Data,
    method: Annotated[str, typer.Option(help=f"One of {', '.join(METHODS)}.")] = "lion",
    name: Annotated[str | None, typer.Option(show_default="DATA-METHOD-sSEED")] = None,
    backbone: Backbone = "tiny-vit",
    shots: Shots = "20",
    validation_shots: ValidationShots = None,
    seed: Annotated[int, typer.Option(help="Of the split, the weights and the batches.")] = 42,
    epochs: Epochs = 100,
    batch: Batch = 64,
    optimizer: Optimizer = "adamw",
    lr: Annotated[float | None, typer.Option(show_default="the method's")] = None,
    weight_decay: Annotated[float | None, typer.Option(show_default="the method's")] = None,
    augment: Augment = None,
    imbalance: Imbalance = None,
    transform: Transform = "square",
    normalisation: Normalisation = "backbone",
    bad_files: BadFiles = "fail",
    verify: Verify = "full",
    sides: Sides = OPTIONS["sides"],
    hidden: Hidden = OPTIONS["hidden"],
    strength: Strength = OPTIONS["strength"],
    solver: SolverName = "anderson",
    rtol: Rtol = None,
    max_steps: MaxSteps = 50,
    iterations: Iterations = None,
    space: Space = None,
    output_input: OutputInput = OPTIONS["output_input"],
    robust: Robust = OPTIONS["robust"],
    tau: Tau = OPTIONS["tau"],
    robust_set: RobustSet = OPTIONS["robust_set"],
    robust_scope: RobustScope = OPTIONS["robust_scope"],
    robust_decay: RobustDecay = OPTIONS["robust_decay"],
    robust_ramp: RobustRamp = OPTIONS["robust_ramp"],
    robust_on: RobustOn = OPTIONS["robust_on"],
    sparsity: Sparsity = OPTIONS["sparsity"],
    prune_at: PruneAt = None,
    checkpoint_backbone: CheckpointBackbone = False,
    prompts: Prompts = OPTIONS["prompts"],
    pad: Pad = OPTIONS["pad"],
    adapter_hidden: AdapterHidden = OPTIONS["adapter_hidden"],
    adapter_place: AdapterPlace = OPTIONS["adapter_place"],
    lora_rank: LoraRank = OPTIONS["lora_rank"],
    lora_alpha: LoraAlpha = None,
    amp: Amp = "none",
    accumulate: Accumulate = 1,
    ema: Ema = None,
    patience: Patience = None,
    class_weights: ClassWeights = "none",
    runs: Runs = Path("runs"),
    resume: Annotated[bool, typer.Option("--resume", help="Continue an interrupted run.")] = False,
    moved_data: MovedData = None,
    overwrite: Overwrite = False,
    test: Annotated[bool, typer.Option(help="Read the test set at the end.")] = True,
    tensorboard: Annotated[
        bool, typer.Option("--tensorboard", help="Write scalars to RUNS/NAME/tensorboard.")
    ] = False,
    threads: Threads = None,
    workers: Workers = None,
    image_cache: ImageCache = IMAGE_CACHE,
    device: Device = "cpu",
) -> None:
    """Train one method; writes RUNS/NAME. Under torchrun, processes share every batch."""
    set_up(threads, device)
    config = run_of(options_of(ctx), method=method).resolved()
    folder = folder_in(runs, name, f"{short_name(data)}-{method}-s{seed}")
    if moved_data is not None and not resume:
        raise UserError("--moved-data: goes with --resume; name a new run's data with --data")
    if resume and (folder / "config.json").is_file():
        stored = read_config(folder)
        asked = config.but(data=stored_name(folder, stored.data.data, data, moved_data))
        config = _resumed(ctx, stored, asked)
    check_felt(given_run_options(ctx), [config])
    run = Run(
        folder,
        config,
        bench=Workbench(device, workers, image_cache),
        moved_data=moved_data,
    )
    with ExitStack() as held, joined_ranks(device) as ranks:
        if ranks.first:
            held.enter_context(run.held(resume=resume, overwrite=overwrite))
        with ProgressBars() as bars:
            result = run.train(
                test=test,
                on_epoch=lambda state: bars.update(config, state),
                tensorboard=tensorboard,
                ranks=ranks,
            )
    if ranks.first:
        _show_result(folder, result)


def _show_result(folder: Path, result: dict[str, Any]) -> None:
    counts = result["parameters"]
    out.print(
        f"chosen epoch {result['best_epoch']}: validation accuracy "
        f"{100 * result['validation_accuracy']:.1f}%"
    )
    if "test" in result:
        out.print(
            f"test accuracy {100 * result['test']['accuracy']:.1f}% "
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
    out.print(f"wrote {folder}/checkpoint.safetensors and {folder}/curves.png", soft_wrap=True)


@app.command()
@with_run_options(train, "method", "seed", "lr", "weight_decay")
def compare(
    ctx: typer.Context,
    data: Data,
    methods: Annotated[
        str, typer.Option(help=f"Comma-separated, of {', '.join(METHODS)}; or all.")
    ] = ",".join(SHOWN_METHODS),
    seeds: Annotated[str, typer.Option(help="Comma-separated.")] = "42,44,82,100,800",
    lrs: Annotated[
        str,
        typer.Option(
            help="Comma-separated learning rates; validation chooses one per run.",
            show_default="each method's",
        ),
    ] = "",
    name: Annotated[str | None, typer.Option(show_default="compare-DATA-SHOTS")] = None,
    shots: Shots = "20",
    runs: Runs = Path("runs"),
    overwrite: Overwrite = False,
    jobs: Jobs = 1,
    threads: Threads = None,
    workers: Workers = None,
    image_cache: ImageCache = IMAGE_CACHE,
    device: Device = "cpu",
) -> None:
    """Methods x seeds on one data set: table, compare.json, compare.png. Continues by itself."""
    set_up(threads, device)
    parts = METHODS if methods == "all" else methods.split(",")
    names = distinct("--methods", [choose("--methods", p.strip(), METHODS) for p in parts])
    base = options_of(ctx)
    check_felt(given_run_options(ctx), [run_of(base, method=each) for each in names])
    folder = folder_in(runs, name, f"compare-{short_name(data)}-{shots}")
    rates = distinct("--lrs", numbers("--lrs", lrs, float)) if lrs else []
    _compare(
        folder,
        base,
        names,
        distinct("--seeds", numbers("--seeds", seeds, int)),
        rates,
        overwrite,
        TrialRunner(jobs, threads, TrialOptions(device, workers=workers, image_cache=image_cache)),
        jobs,
    )


@app.command()
def demo(
    runs: Runs = Path("runs"),
    vit: Annotated[
        bool,
        typer.Option("--vit", help="ViT-S/14 on the photographs of Tux Paint instead (minutes)."),
    ] = False,
    data: Annotated[
        str | None, typer.Option(help="Other data.", show_default="mnist5k; tuxpaint with --vit")
    ] = None,
    overwrite: Overwrite = False,
    threads: Threads = None,
    workers: Workers = None,
    image_cache: ImageCache = IMAGE_CACHE,
) -> None:
    """Linear probe, VPT-deep and LION on few images: MNIST on the embedded tiny ViT, or --vit."""
    set_up(threads, "cpu")
    base = VIT_DEMO if vit else all_options(data="mnist5k", shots=20, epochs=100)
    base = base if data is None else base | {"data": data}
    folder = runs / ("demo-vit" if vit else "demo")
    options = TrialOptions(workers=workers, image_cache=image_cache)
    _compare(folder, base, list(SHOWN_METHODS), [42], [], overwrite, TrialRunner(options=options))


def _compare(
    folder: Path,
    base: dict[str, Any],
    methods: list[str],
    seeds: list[int],
    rates: list[float],
    overwrite: bool,
    runner: TrialRunner,
    jobs: int = 1,
) -> None:
    with TrialBars(jobs) as bars, runner:
        result = run_comparison(
            folder,
            base,
            methods,
            seeds,
            rates,
            runner=runner,
            overwrite=overwrite,
            on_trials=bars.one_by_one,
        )
    shots = f"{base['shots']} images a class" if base["shots"] else "all images"
    seed_text = f"seed {seeds[0]}" if len(seeds) == 1 else f"{len(seeds)} seeds, mean ± sd"
    out.print(comparison_table(result["summary"], f"{base['data']}, {shots}, {seed_text}"))
    out.print(f"wrote {folder}/compare.json and {folder}/compare.png", soft_wrap=True)


def _resumed(ctx: typer.Context, stored: RunConfig, asked: RunConfig) -> RunConfig:
    """The stored configuration, with what the user wrote out again (so that it is compared)."""
    asked_for = given_options(ctx)
    given = {key: value for key, value in asked.to_dict().items() if key in asked_for}
    return RunConfig.from_dict(stored.to_dict() | given)


for _name, _command in (
    ("sweep", with_run_options(train, "method", "seed")(sweep)),
    ("eval", evaluate),
    ("predict", predict_command),
    ("export", export),
    ("info", info),
):
    app.command(_name)(_command)


def main() -> None:
    """Entry point of the `lion` script."""
    app()


if __name__ == "__main__":
    main()
