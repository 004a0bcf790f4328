"""Everything that defines a run, validated when it is made."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, NamedTuple

import deqcore
from lion_models.backbones import FrozenBackbone
from lion_models.baselines import LinearProbe, VPTDeep
from lion_models.classifier import TunedClassifier
from lion_models.data.augment import AUGMENTATIONS
from lion_models.errors import UserError, choose
from lion_models.implicit_prompt import Solver
from lion_models.lion import SIDES, Lion

__all__ = [
    "AMP",
    "CLASS_WEIGHTS",
    "DEFAULTS",
    "METHODS",
    "ONLY_FOR",
    "OPTIMIZERS",
    "SOLVERS",
    "RunConfig",
    "build_model",
    "make_solver",
]

METHODS = ("linear", "vpt-deep", "lion")
OPTIMIZERS = ("adamw", "sgd")
SOLVERS = ("anderson", "broyden", "picard")
AMP = ("none", "bf16", "fp16")
CLASS_WEIGHTS = ("none", "balanced", "balanced-softmax")

# Options that mean something to these methods alone, so that a grid does not repeat the others.
_VPT = ("vpt-shallow", "vpt-deep", "vpt-pad")
ONLY_FOR = {
    "sides": ("lion",),
    "hidden": ("lion",),
    "strength": ("lion",),
    "solver": ("lion",),
    "rtol": ("lion",),
    "max_steps": ("lion",),
    "iterations": ("lion",),
    "prompts": _VPT,
    "prompt_dropout": _VPT,
}


class Recipe(NamedTuple):
    """What each method chooses for itself on validation data."""

    lr: float
    weight_decay: float
    augment: str


# Chosen from the same grid for every method; docs/lion.md shows it.
DEFAULTS = {
    "linear": Recipe(0.03, 0.01, "none"),
    "vpt-deep": Recipe(0.03, 0.01, "none"),
    "lion": Recipe(0.03, 0.01, "affine"),
}


@dataclass(frozen=True)
class RunConfig:
    """One training run.

    Args:
        data: `mnist5k`, `digits` or an image folder.
        method: `linear`, `vpt-deep` or `lion`.
        backbone: `tiny-vit` or a file of `lion_models.pretrain`.
        shots: training images per class; None uses all (70/10/20 split).
        validation_shots: validation images per class; None means as many as `shots`.
        test_cap: most test images per class; None means all that are left.
        seed: of the split, the initial weights, the order of batches and the dropout.
        epochs: passes over the training images.
        batch: images per step.
        optimizer: `adamw` or `sgd` (momentum 0.9).
        lr: peak learning rate; None means the method's default. Linear warm-up over the first
            tenth of the epochs, then half a cosine to zero.
        weight_decay: None means the method's default.
        augment: `none` or `affine` (small random maps of the training images); None means the
            method's default.
        sides: lion: `both`, `input` or `output`.
        hidden: lion: bottleneck width.
        strength: lion: initial lambda.
        solver: lion: `anderson`, `broyden` or `picard`.
        rtol: lion: relative tolerance of the solver; None means deqcore's default.
        max_steps: lion: most evaluations of the cell per solve.
        iterations: lion: None for the equilibrium, k for k explicit layers.
        prompts: vpt-deep: tokens per block.
        prompt_dropout: vpt-deep: dropout on the prompts.
        amp: `none`, `bf16` or `fp16` (CUDA alone): what the training step's forward pass computes
            in. Weights, losses and every measurement stay float32.
        accumulate: parts that a batch is computed in, one after the other; the step is that of the
            whole batch within rounding (a dropout draws one mask for each part).
        ema: decay of an exponential moving average of the trained weights, which validation, test
            and the checkpoint then use; None means no average.
        patience: epochs without a better one on validation data after which training ends; None
            trains for all `epochs`.
        class_weights: of the training loss: `none`, `balanced` (inverse class frequency) or
            `balanced-softmax` (logits shifted by the log of the class frequency).
    """

    data: str
    method: str = "lion"
    backbone: str = "tiny-vit"
    shots: int | None = 20
    validation_shots: int | None = None
    test_cap: int | None = None
    seed: int = 42
    epochs: int = 100
    batch: int = 64
    optimizer: str = "adamw"
    lr: float | None = None
    weight_decay: float | None = None
    augment: str | None = None
    sides: str = "both"
    hidden: int = 8
    strength: float = 1.0
    solver: str = "anderson"
    rtol: float | None = None
    max_steps: int = 50
    iterations: int | None = None
    prompts: int = 10
    prompt_dropout: float = 0.1
    amp: str = "none"
    accumulate: int = 1
    ema: float | None = None
    patience: int | None = None
    class_weights: str = "none"

    def __post_init__(self) -> None:
        choose("--method", self.method, METHODS)
        choose("--optimizer", self.optimizer, OPTIMIZERS)
        if self.augment is not None:
            choose("--augment", self.augment, AUGMENTATIONS)
        choose("--sides", self.sides, SIDES)
        choose("--solver", self.solver, SOLVERS)
        choose("--amp", self.amp, AMP)
        choose("--class-weights", self.class_weights, CLASS_WEIGHTS)
        counts = (
            "shots",
            "validation_shots",
            "test_cap",
            "epochs",
            "batch",
            "hidden",
            "max_steps",
            "iterations",
            "prompts",
            "accumulate",
            "patience",
        )
        for name in counts:
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UserError(f"--{name.replace('_', '-')}: expected 1 or more, got {value}")
        for name in ("lr", "rtol"):
            value = getattr(self, name)
            if value is not None and not 0 < value < 1000:
                raise UserError(f"--{name}: expected a positive number, got {value}")
        if self.weight_decay is not None and self.weight_decay < 0:
            raise UserError(f"--weight-decay: expected 0 or more, got {self.weight_decay}")
        if not 0 <= self.prompt_dropout < 1:
            raise UserError(f"--prompt-dropout: expected 0 <= p < 1, got {self.prompt_dropout}")
        if self.ema is not None and not 0 < self.ema < 1:
            raise UserError(f"--ema: expected a decay such as 0.999, got {self.ema}")

    @property
    def recipe(self) -> Recipe:
        """Learning rate, weight decay and augmentation, with the method's defaults filled in."""
        default = DEFAULTS[self.method]
        return Recipe(
            default.lr if self.lr is None else self.lr,
            default.weight_decay if self.weight_decay is None else self.weight_decay,
            default.augment if self.augment is None else self.augment,
        )

    def resolved(self) -> RunConfig:
        """The same run with its recipe written out, so that later defaults do not change it."""
        return replace(self, **self.recipe._asdict())

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> RunConfig:
        """The inverse of `to_dict`; an unknown key is an error."""
        unknown = sorted(set(values) - {field.name for field in fields(cls)})
        if unknown:
            raise UserError(
                f"run configuration: unknown keys {', '.join(unknown)}; the run was "
                "written by another version"
            )
        return cls(**values)


def make_solver(config: RunConfig, record_trace: bool = False) -> Solver:
    """The equilibrium solver that a configuration names."""
    kinds: dict[str, Callable[..., Solver]] = {
        "anderson": deqcore.Anderson,
        "broyden": deqcore.Broyden,
        "picard": deqcore.Picard,
    }
    return kinds[config.solver](
        rtol=config.rtol, max_steps=config.max_steps, record_trace=record_trace
    )


def build_model(config: RunConfig, backbone: FrozenBackbone, classes: int) -> TunedClassifier:
    """The classifier that a configuration names, freshly initialised from torch's generator."""
    if config.method == "linear":
        return LinearProbe(backbone, classes)
    if config.method == "vpt-deep":
        return VPTDeep(backbone, classes, config.prompts, config.prompt_dropout)
    return Lion(
        backbone,
        classes,
        sides=config.sides,
        hidden=config.hidden,
        strength=config.strength,
        solver=make_solver(config),
        iterations=config.iterations,
    )
