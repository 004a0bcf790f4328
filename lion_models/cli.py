"""The `lion` command."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Column, Table
from typer.core import TyperGroup

from lion_models import cli_data
from lion_models.backbones import TINY_VIT, load_backbone, read_vit, tiny_vit_path
from lion_models.cli_options import (
    AdapterHidden,
    AdapterPlace,
    Augment,
    Backbone,
    BadFiles,
    Batch,
    CheckpointBackbone,
    Data,
    Device,
    Epochs,
    Hidden,
    Imbalance,
    Iterations,
    LoraAlpha,
    LoraRank,
    MaxSteps,
    Normalisation,
    Optimizer,
    OutputInput,
    Overwrite,
    Pad,
    Prompts,
    PruneAt,
    Readout,
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
    config_of,
    numbers,
    set_up,
    short_name,
)
from lion_models.cli_progress import ProgressBars
from lion_models.compare import comparison_table, run_comparison
from lion_models.errors import UserError, choose
from lion_models.predict import evaluate_on, format_predictions, gather_images, predict
from lion_models.training import (
    RunConfig,
    build_model,
    load_run,
    measure_run,
    prepare_folder,
    train_run,
)
from lion_models.training.config import METHODS, SHOWN_METHODS
from lion_models.training.run_data import open_data, split_data
from lion_models.training.runs import read_config

__all__ = ["app", "main"]

# 112 pixels and 20 epochs, so that two cores need minutes: a step goes through 11 blocks twice.
VIT_DEMO = RunConfig(
    data="tuxpaint",
    backbone="vit-s14-focus,image_size=112,readout=11",
    shots=5,
    epochs=20,
    batch=20,
)

out = Console()
err = Console(stderr=True, soft_wrap=True)


class _Commands(TyperGroup):
    """Shows what the user can put right as one message, with exit code 2."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except UserError as error:
            err.print(f"[bold red]error:[/] {_escape(str(error))}", highlight=False)
            raise typer.Exit(2) from None
        except KeyboardInterrupt:
            err.print(
                "interrupted; the same command continues with --resume "
                "(compare and demo continue by themselves)"
            )
            raise typer.Exit(130) from None


app = typer.Typer(
    cls=_Commands,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Tune a frozen vision backbone with implicit prompts (LION).",
)

app.add_typer(cli_data.app, name="data")


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
    sides: Sides = RunConfig.sides,
    hidden: Hidden = RunConfig.hidden,
    strength: Strength = RunConfig.strength,
    solver: SolverName = "anderson",
    rtol: Rtol = None,
    max_steps: MaxSteps = 50,
    iterations: Iterations = None,
    space: Space = None,
    output_input: OutputInput = RunConfig.output_input,
    robust: Robust = RunConfig.robust,
    tau: Tau = RunConfig.tau,
    robust_set: RobustSet = RunConfig.robust_set,
    robust_scope: RobustScope = RunConfig.robust_scope,
    robust_decay: RobustDecay = RunConfig.robust_decay,
    robust_ramp: RobustRamp = RunConfig.robust_ramp,
    robust_on: RobustOn = RunConfig.robust_on,
    sparsity: Sparsity = RunConfig.sparsity,
    prune_at: PruneAt = None,
    readout: Readout = None,
    checkpoint_backbone: CheckpointBackbone = False,
    prompts: Prompts = RunConfig.prompts,
    pad: Pad = RunConfig.pad,
    adapter_hidden: AdapterHidden = RunConfig.adapter_hidden,
    adapter_place: AdapterPlace = RunConfig.adapter_place,
    lora_rank: LoraRank = RunConfig.lora_rank,
    lora_alpha: LoraAlpha = None,
    runs: Runs = Path("runs"),
    resume: Annotated[bool, typer.Option("--resume", help="Continue an interrupted run.")] = False,
    overwrite: Overwrite = False,
    test: Annotated[bool, typer.Option(help="Read the test set at the end.")] = True,
    threads: Threads = 0,
    device: Device = "cpu",
) -> None:
    """Train one method; writes RUNS/NAME."""
    set_up(threads, device)
    config = config_of(ctx).resolved()
    folder = runs / (name or f"{short_name(data)}-{method}-s{seed}")
    if resume and (folder / "config.json").is_file():
        config = _resumed(ctx, read_config(folder), config)
    _check_data(config)
    prepare_folder(folder, config, resume, overwrite)
    with ProgressBars() as bars:
        result = train_run(
            folder,
            config,
            test=test,
            device=device,
            on_epoch=lambda state: bars.update(config, state),
        )
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
    out.print(f"wrote {folder}/checkpoint.safetensors and {folder}/curves.png")


@app.command("eval")
def evaluate(
    run: Annotated[Path, typer.Argument(help="A run's folder, or its checkpoint with --data.")],
    data: Annotated[
        str | None,
        typer.Option(
            help="Other data with the same classes; every image of it is used.",
            show_default="the run's own test set, read once",
        ),
    ] = None,
    threads: Threads = 0,
    device: Device = "cpu",
) -> None:
    """Accuracy of a run: on its own test set (measured once, then remembered) or on other data."""
    set_up(threads, device)
    if data is None:
        if not run.is_dir():
            load_run(run)
            raise UserError(f"{run}: is a checkpoint file; name the run's folder, or add --data")
        figures = measure_run(run, device=device)["test"]
        where = "the run's test set"
    else:
        loaded = load_run(run)
        loaded.model.to(device)
        figures = evaluate_on(loaded, data)
        where = data
    out.print(
        f"accuracy {100 * figures['accuracy']:.2f}%, cross-entropy {figures['loss']:.4f} "
        f"nats over {figures['images']} images of {where}",
        highlight=False,
    )


@app.command("predict")
def predict_command(
    run: Annotated[Path, typer.Argument(help="A run's folder or checkpoint.")],
    paths: Annotated[list[Path], typer.Argument(help="Images, or folders of images.")],
    form: Annotated[str, typer.Option("--format", help="table, csv or json.")] = "table",
    output: Annotated[Path | None, typer.Option("--output", help="Write csv or json here.")] = None,
    threads: Threads = 0,
    device: Device = "cpu",
) -> None:
    """Class and probability of images."""
    set_up(threads, device)
    choose("--format", form, ["table", "csv", "json"])
    if output is not None and not output.resolve().parent.is_dir():
        raise UserError(f"--output: folder {output.parent} does not exist; create it first")
    images = gather_images(paths)
    loaded = load_run(run)
    loaded.model.to(device)
    rows = predict(loaded, images)
    if output is not None:
        kind = "json" if form == "json" or output.suffix == ".json" else "csv"
        output.write_text(format_predictions(rows, kind) + "\n")
        out.print(f"wrote {len(rows)} predictions to {output}")
    elif form == "table":
        table = Table("file", "class", "probability")
        for row in rows:
            table.add_row(_escape(row["file"]), _escape(row["class"]), f"{row['probability']:.3f}")
        out.print(table)
    else:
        typer.echo(format_predictions(rows, form))


@app.command()
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
    backbone: Backbone = "tiny-vit",
    shots: Shots = "20",
    validation_shots: ValidationShots = None,
    epochs: Epochs = 100,
    batch: Batch = 64,
    optimizer: Optimizer = "adamw",
    augment: Augment = None,
    imbalance: Imbalance = None,
    transform: Transform = "square",
    normalisation: Normalisation = "backbone",
    bad_files: BadFiles = "fail",
    verify: Verify = "full",
    sides: Sides = RunConfig.sides,
    hidden: Hidden = RunConfig.hidden,
    strength: Strength = RunConfig.strength,
    solver: SolverName = "anderson",
    rtol: Rtol = None,
    max_steps: MaxSteps = 50,
    iterations: Iterations = None,
    space: Space = None,
    output_input: OutputInput = RunConfig.output_input,
    robust: Robust = RunConfig.robust,
    tau: Tau = RunConfig.tau,
    robust_set: RobustSet = RunConfig.robust_set,
    robust_scope: RobustScope = RunConfig.robust_scope,
    robust_decay: RobustDecay = RunConfig.robust_decay,
    robust_ramp: RobustRamp = RunConfig.robust_ramp,
    robust_on: RobustOn = RunConfig.robust_on,
    sparsity: Sparsity = RunConfig.sparsity,
    prune_at: PruneAt = None,
    readout: Readout = None,
    checkpoint_backbone: CheckpointBackbone = False,
    prompts: Prompts = RunConfig.prompts,
    pad: Pad = RunConfig.pad,
    adapter_hidden: AdapterHidden = RunConfig.adapter_hidden,
    adapter_place: AdapterPlace = RunConfig.adapter_place,
    lora_rank: LoraRank = RunConfig.lora_rank,
    lora_alpha: LoraAlpha = None,
    runs: Runs = Path("runs"),
    overwrite: Overwrite = False,
    threads: Threads = 0,
    device: Device = "cpu",
) -> None:
    """Methods x seeds on one data set: table, compare.json, compare.png. Continues by itself."""
    set_up(threads, device)
    parts = METHODS if methods == "all" else methods.split(",")
    names = [choose("--methods", part.strip(), METHODS) for part in parts]
    base = config_of(ctx)
    folder = runs / (name or f"compare-{short_name(data)}-{shots}")
    _compare(
        folder,
        base,
        names,
        numbers("--seeds", seeds, int),
        numbers("--lrs", lrs, float) if lrs else [],
        overwrite,
        device,
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
    threads: Threads = 0,
) -> None:
    """Linear probe, VPT-deep and LION on few images: MNIST on the embedded tiny ViT, or --vit."""
    set_up(threads, "cpu")
    base = VIT_DEMO if vit else RunConfig(data="mnist5k", shots=20, epochs=100)
    base = base if data is None else replace(base, data=data)
    folder = runs / ("demo-vit" if vit else "demo")
    _compare(folder, base, list(SHOWN_METHODS), [42], [], overwrite, "cpu")


@app.command()
def info(
    run: Annotated[
        Path | None,
        typer.Argument(help="A run's folder or checkpoint.", show_default="the backbone alone"),
    ] = None,
    backbone: Backbone = TINY_VIT,
) -> None:
    """What a run or a backbone is: parameters, fingerprint, licence, figures."""
    if run is None:
        facts = load_backbone(backbone).describe()
        if backbone == TINY_VIT:
            facts |= read_vit(tiny_vit_path())[1]["training"]
    else:
        loaded = load_run(run)
        result = run / "result.json"
        facts = {
            "classes": ", ".join(loaded.classes),
            "weights sha256": loaded.weights,
            **loaded.config.to_dict(),
        }
        if result.is_file():
            figures = json.loads(result.read_text())
            facts |= figures["parameters"] | {
                key: figures.get(key) for key in ("best_epoch", "validation_accuracy", "test")
            }
    table = Table("", Column(overflow="fold"), show_header=False)
    for key, value in facts.items():
        table.add_row(key, _escape(str(value)))
    out.print(table)


def _compare(
    folder: Path,
    base: RunConfig,
    methods: list[str],
    seeds: list[int],
    rates: list[float],
    overwrite: bool,
    device: str,
) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    with ProgressBars() as bars:
        result = run_comparison(
            folder,
            base,
            methods,
            seeds,
            rates,
            overwrite=overwrite,
            device=device,
            on_epoch=bars.update,
        )
    shots = f"{base.shots} images a class" if base.shots else "all images"
    seed_text = f"seed {seeds[0]}" if len(seeds) == 1 else f"{len(seeds)} seeds, mean ± sd"
    out.print(comparison_table(result["summary"], f"{base.data}, {shots}, {seed_text}"))
    out.print(f"wrote {folder}/compare.json and {folder}/compare.png")


def _resumed(ctx: typer.Context, stored: RunConfig, asked: RunConfig) -> RunConfig:
    """The stored configuration, with what the user wrote out again (so that it is compared)."""
    given = {
        key: value
        for key, value in asked.to_dict().items()
        if getattr(ctx.get_parameter_source(key), "name", "") == "COMMANDLINE"
    }
    return RunConfig.from_dict(stored.to_dict() | given)


def _check_data(config: RunConfig) -> None:
    """Fail on bad data, or a method that does not go with the backbone, before a folder is made."""
    backbone = load_backbone(config.backbone)
    source = open_data(config, backbone)
    split_data(source, config)
    build_model(config, backbone, len(source.classes))


def _escape(text: str) -> str:
    return text.replace("[", "\\[")


def main() -> None:
    """Entry point of the `lion` script."""
    app()


if __name__ == "__main__":
    main()
