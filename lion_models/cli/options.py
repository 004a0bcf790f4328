"""Options that several commands of `lion` share, and how their text becomes values."""

from __future__ import annotations

import functools
import inspect
import os
import re
import typing
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from lion_models.backbones.frozen import SPACES
from lion_models.backbones.normalisation import NORMALISATIONS
from lion_models.base.errors import UserError, choose
from lion_models.data.augment import AUGMENTATIONS
from lion_models.data.transforms import TRANSFORMS
from lion_models.data.verify import BAD_FILES, VERIFY
from lion_models.methods.lion import _SOLVERS, OUTPUT_INPUTS
from lion_models.prompts.cdr import THRESHOLDS
from lion_models.run.config import all_options, owners_of
from lion_models.run.training import AMP, CLASS_WEIGHTS

Data = Annotated[
    str,
    typer.Option(
        help="A name of 'lion data list', torchvision:NAME, hf:NAME, or a folder: a sub-folder of "
        "images per class, IDX files, VTAB-1k lists, or a saved Hugging Face data set."
    ),
]
MovedData = Annotated[
    str | None,
    typer.Option(
        help="Where the run's own data lies now, as --data would name it.",
        show_default="where it lay in training",
    ),
]
Imbalance = Annotated[
    float | None,
    typer.Option(
        help="Training images of the first class over those of the last, exponential between.",
        show_default="balanced",
    ),
]
Transform = Annotated[
    str,
    typer.Option(
        help=f"One of {', '.join(TRANSFORMS)}: how pictures are fitted to the backbone's square."
    ),
]
Normalisation = Annotated[str, typer.Option(help=f"Of pixels: {', '.join(NORMALISATIONS)}.")]
BadFiles = Annotated[
    str, typer.Option(help=f"Missing and damaged image files: {' or '.join(BAD_FILES)}.")
]
Verify = Annotated[
    str,
    typer.Option(
        help=f"{' or '.join(VERIFY)}: decode every image file once before the start, or read its "
        "beginning only."
    ),
]
Backbone = Annotated[
    str,
    typer.Option(
        help="tiny-vit, vit-s14-focus, efficientnet-lite0, timm:NAME, torchvision:NAME, hf:NAME, "
        "or a file of tools/pretrain_tiny_vit.py; options: NAME,image_size=112,readout=11,"
        "weights=FILE."
    ),
]
Shots = Annotated[str, typer.Option(help="Training images per class, or 'all'.")]
ValidationShots = Annotated[
    int | None, typer.Option(help="Validation images per class.", show_default="as many as --shots")
]
Epochs = Annotated[int, typer.Option(help="Passes over the training images.")]
Batch = Annotated[int, typer.Option(help="Images per step.")]
Optimizer = Annotated[str, typer.Option(help=f"One of {', '.join(('adamw', 'sgd'))}.")]
Augment = Annotated[
    str | None,
    typer.Option(
        help=f"One of {', '.join(AUGMENTATIONS)}: small random maps of the training images.",
        show_default="the method's",
    ),
]
Sides = Annotated[str, typer.Option(help="lion: both, input or output.")]
Hidden = Annotated[int, typer.Option(help="lion: bottleneck width.")]
Strength = Annotated[float, typer.Option(help="lion: initial lambda of both layers.")]
SolverName = Annotated[str, typer.Option(help=f"lion: one of {', '.join(_SOLVERS)}.")]
Rtol = Annotated[
    float | None,
    typer.Option(help="lion: relative tolerance of the solver.", show_default="deqcore's, 1e-4"),
]
MaxSteps = Annotated[int, typer.Option(help="lion: most evaluations of the cell per solve.")]
Iterations = Annotated[
    int | None,
    typer.Option(
        help="lion: this many explicit layers instead of an equilibrium.",
        show_default="equilibrium",
    ),
]
Space = Annotated[
    str | None,
    typer.Option(
        help=f"lion: {' or '.join(SPACES)}, where the input layer acts.",
        show_default="token where the backbone has tokens",
    ),
]
OutputInput = Annotated[
    str, typer.Option(help=f"lion: {' or '.join(OUTPUT_INPUTS)}, what drives the output layer.")
]
Robust = Annotated[
    str,
    typer.Option(
        help=f"{' or '.join(('none', 'cdr'))}: drive weights that are not critical to zero."
    ),
]
Tau = Annotated[float, typer.Option(help="cdr: share of the weights that is not critical.")]
RobustSet = Annotated[
    str, typer.Option(help="cdr: choose the critical set anew at every step, or a fixed one.")
]
RobustScope = Annotated[
    str, typer.Option(help=f"cdr: {' or '.join(THRESHOLDS)}, what the share is taken of.")
]
RobustDecay = Annotated[
    float, typer.Option(help="cdr: pull towards zero, per unit of learning rate.")
]
RobustRamp = Annotated[int, typer.Option(help="cdr: epochs over which tau rises from 0.")]
RobustOn = Annotated[
    str,
    typer.Option(help="cdr: implicit (lion's layers), or all trained matrices of any method."),
]
Sparsity = Annotated[
    float, typer.Option(help="lion: share of the implicit layers' weights that is pruned.")
]
PruneAt = Annotated[
    int | None, typer.Option(help="lion: epoch that ends with pruning.", show_default="the last")
]
CheckpointBackbone = Annotated[
    bool,
    typer.Option("--checkpoint-backbone", help="Recompute the frozen blocks: less memory, slower."),
]
Prompts = Annotated[int, typer.Option(help="vpt-deep: tokens per block; vpt-shallow: tokens.")]
Pad = Annotated[int, typer.Option(help="vpt-pad: width of the learned frame in pixels.")]
AdapterHidden = Annotated[int, typer.Option(help="adapter: bottleneck width.")]
AdapterPlace = Annotated[str, typer.Option(help="adapter: both (behind attention and MLP) or mlp.")]
LoraRank = Annotated[int, typer.Option(help="lora: rank.")]
LoraAlpha = Annotated[
    float | None,
    typer.Option(help="lora: the scale is alpha / rank.", show_default="the rank"),
]
Amp = Annotated[
    str, typer.Option(help=f"One of {', '.join(AMP)}: mixed precision of the training step.")
]
Accumulate = Annotated[
    int, typer.Option(help="Compute a batch in this many parts; the step stays that of the whole.")
]
Ema = Annotated[
    float | None,
    typer.Option(
        help="Decay of an average of the weights, which is then validated and kept: 0.999.",
        show_default="off",
    ),
]
Patience = Annotated[
    int | None,
    typer.Option(help="Stop after this many epochs without a better one.", show_default="off"),
]
ClassWeights = Annotated[
    str, typer.Option(help=f"Of the training loss: one of {', '.join(CLASS_WEIGHTS)}.")
]
Jobs = Annotated[int, typer.Option(help="Processes that share the runs.")]
Runs = Annotated[Path, typer.Option(help="Folder of all runs.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace an existing run.")]
Threads = Annotated[int | None, typer.Option(help="CPU threads.", show_default="all cores")]
Workers = Annotated[
    int | None,
    typer.Option(
        help="Processes that decode images ahead of their use.",
        show_default="none on the CPU, else as many as threads, 8 at most",
    ),
]
ImageCache = Annotated[
    float, typer.Option(help="GiB of decoded images to keep in memory; of each job.")
]
Device = Annotated[str, typer.Option(help="cpu or cuda.")]


def options_of(ctx: typer.Context) -> dict[str, Any]:
    """The options of runs among a command's; an option and its field share a name."""
    values = {name: ctx.params[name] for name in owners_of() if name in ctx.params}
    return all_options(**values | {"shots": _shots(values["shots"])})


def given_options(ctx: typer.Context) -> list[str]:
    """Names of the options that the user wrote."""
    return [
        name
        for name in ctx.params
        if getattr(ctx.get_parameter_source(name), "name", "") == "COMMANDLINE"
    ]


def given_run_options(ctx: typer.Context) -> list[str]:
    """Names of the options of runs that the user wrote."""
    return [name for name in given_options(ctx) if name in owners_of()]


def with_run_options(
    source: Callable[..., None], *omitted: str
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Give a command the options of `source` that are fields of a run, `omitted` ones excepted.

    The command finds their values with `options_of`; it is called with its own options alone.
    """

    def decorate(function: Callable[..., None]) -> Callable[..., None]:
        own = inspect.signature(function).parameters
        known = {*owners_of(), "method"} - set(omitted) - set(own)
        shared = [p for name, p in inspect.signature(source).parameters.items() if name in known]
        hints = typing.get_type_hints(source, include_extras=True)
        hints |= typing.get_type_hints(function, include_extras=True)
        # An option without a default has to stand before those with one.
        parameters = sorted([*own.values(), *shared], key=lambda p: p.default is not p.empty)

        @functools.wraps(function)
        def command(**values: Any) -> None:
            function(**{name: values[name] for name in own})

        signature = inspect.Signature([p.replace(annotation=hints[p.name]) for p in parameters])
        command.__dict__["__signature__"] = signature
        command.__annotations__ = {p.name: hints[p.name] for p in parameters}
        return command

    return decorate


def dashed(message: str) -> str:
    """A message with the options that it names, `robust_on`, as the command line spells them."""
    return re.sub(r"`([a-z]\w*)`", lambda name: f"--{name[1].replace('_', '-')}", message)


def set_up(threads: int | None, device: str) -> None:
    """Check the device and set the number of threads (None leaves it)."""
    choose("--device", device, ["cpu", "cuda"])
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: this torch sees no GPU; use --device cpu")
    if threads is not None and threads < 1:
        raise UserError(f"--threads: expected 1 or more, got {threads}; leave it out for all cores")
    if threads is not None:
        torch.set_num_threads(threads)


def _shots(text: str) -> int | None:
    if text == "all":
        return None
    if not text.isdigit():
        raise UserError(f"--shots: expected a whole number or 'all', got '{text}'")
    return int(text)


def numbers(option: str, text: str, kind: Callable[[str], Any]) -> list[Any]:
    """A comma-separated list of numbers."""
    try:
        return [kind(part) for part in text.split(",")]
    except ValueError:
        raise UserError(f"{option}: expected numbers separated by commas, got '{text}'") from None


def distinct(option: str, values: list[Any]) -> list[Any]:
    """The values; UserError where one is there twice, which would count one run as two."""
    twice = next((value for value in values if values.count(value) > 1), None)
    if twice is not None:
        raise UserError(f"{option}: {twice} is there twice; leave one out")
    return values


def short_name(data: str) -> str:
    """The data's part of a run's name: the last part of a path, no colon."""
    # Not resolved: a link has the name that the user gave it.
    return Path(os.path.abspath(data)).name.replace(":", "-") or "data"


def folder_in(runs: Path, name: str | None, default: str) -> Path:
    """The folder that `--name` stands for, always below that of all runs.

    Raises:
        UserError: the name is empty or leads elsewhere.
    """
    if name is None:
        return runs / default
    parts = Path(name).parts
    if not parts or ".." in parts or Path(name).is_absolute():
        raise UserError(
            f"--name: expected a name such as first or study/first, got '{name}'; choose another "
            "folder with --runs"
        )
    return runs / name
