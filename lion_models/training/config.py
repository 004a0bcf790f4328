"""Everything that defines a run, validated when it is made."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, NamedTuple

import deqcore
from lion_models.backbones import FrozenBackbone
from lion_models.backbones.normalisation import NORMALISATIONS, with_normalisation
from lion_models.baselines import LinearProbe, VPTDeep
from lion_models.classifier import TunedClassifier
from lion_models.data.augment import AUGMENTATIONS
from lion_models.data.transforms import TRANSFORMS
from lion_models.data.verify import BAD_FILES, VERIFY
from lion_models.errors import UserError, choose
from lion_models.implicit_prompt import Solver
from lion_models.lion import SIDES, Lion

__all__ = [
    "DEFAULTS",
    "METHODS",
    "OPTIMIZERS",
    "SOLVERS",
    "RunConfig",
    "build_model",
    "make_solver",
]

METHODS = ("linear", "vpt-deep", "lion")
OPTIMIZERS = ("adamw", "sgd")
SOLVERS = ("anderson", "broyden", "picard")


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
        data: what `open_source` takes: a name of `lion data list`, a folder, and others.
        method: `linear`, `vpt-deep` or `lion`.
        backbone: what `load_backbone` takes: `tiny-vit`, `vit-s14-focus,readout=11`, ...
        shots: training images per class; None uses all (70/10/20 split).
        validation_shots: validation images per class; None means as many as `shots`.
        test_cap: most test images per class; None means all that are left.
        imbalance: training images of the first class over those of the last, with an exponential
            profile between; None for as many of each. Validation and test are not changed.
        seed: of the split, the initial weights, the order of batches and the dropout.
        epochs: passes over the training images.
        batch: images per step.
        optimizer: `adamw` or `sgd` (momentum 0.9).
        lr: peak learning rate; None means the method's default. Linear warm-up over the first
            tenth of the epochs, then half a cosine to zero.
        weight_decay: None means the method's default.
        augment: `none` or `affine` (small random maps of the training images); None means the
            method's default, which is `none` for every method unless `transform` is `square`.
        transform: `square`, `vtab`, `fgvc` or `fgvc-resized`; see `lion_models.data.Geometry`.
        normalisation: `backbone` (its own), `imagenet` or `half` (mean and deviation 0.5).
        bad_files: `fail` on missing and damaged image files, or `skip` them with a warning.
        verify: `full` decodes every image file once before anything starts; `header` does not.
        sides: lion: `both`, `input` or `output`.
        hidden: lion: bottleneck width.
        strength: lion: initial lambda.
        solver: lion: `anderson`, `broyden` or `picard`.
        rtol: lion: relative tolerance of the solver; None means deqcore's default.
        max_steps: lion: most evaluations of the cell per solve.
        iterations: lion: None for the equilibrium, k for k explicit layers.
        prompts: vpt-deep: tokens per block.
        prompt_dropout: vpt-deep: dropout on the prompts.
    """

    data: str
    method: str = "lion"
    backbone: str = "tiny-vit"
    shots: int | None = 20
    validation_shots: int | None = None
    test_cap: int | None = None
    imbalance: float | None = None
    seed: int = 42
    epochs: int = 100
    batch: int = 64
    optimizer: str = "adamw"
    lr: float | None = None
    weight_decay: float | None = None
    augment: str | None = None
    transform: str = "square"
    normalisation: str = "backbone"
    bad_files: str = "fail"
    verify: str = "full"
    sides: str = "both"
    hidden: int = 8
    strength: float = 1.0
    solver: str = "anderson"
    rtol: float | None = None
    max_steps: int = 50
    iterations: int | None = None
    prompts: int = 10
    prompt_dropout: float = 0.1

    def __post_init__(self) -> None:
        choose("--method", self.method, METHODS)
        choose("--optimizer", self.optimizer, OPTIMIZERS)
        if self.augment is not None:
            choose("--augment", self.augment, AUGMENTATIONS)
        choose("--transform", self.transform, TRANSFORMS)
        choose("--normalisation", self.normalisation, NORMALISATIONS)
        choose("--bad-files", self.bad_files, BAD_FILES)
        choose("--verify", self.verify, VERIFY)
        choose("--sides", self.sides, SIDES)
        choose("--solver", self.solver, SOLVERS)
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
        )
        for name in counts:
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UserError(f"--{name.replace('_', '-')}: expected 1 or more, got {value}")
        for name in ("lr", "rtol"):
            value = getattr(self, name)
            if value is not None and not 0 < value < 1000:
                raise UserError(f"--{name}: expected a positive number, got {value}")
        if self.imbalance is not None and not 1 <= self.imbalance < 1e6:
            raise UserError(f"--imbalance: expected 1 or more, got {self.imbalance}")
        if self.weight_decay is not None and self.weight_decay < 0:
            raise UserError(f"--weight-decay: expected 0 or more, got {self.weight_decay}")
        if not 0 <= self.prompt_dropout < 1:
            raise UserError(f"--prompt-dropout: expected 0 <= p < 1, got {self.prompt_dropout}")

    @property
    def recipe(self) -> Recipe:
        """Learning rate, weight decay and augmentation, with the method's defaults filled in."""
        default = DEFAULTS[self.method]
        if self.transform != "square":
            # A protocol of others, with an augmentation of its own or none: the same for all.
            default = default._replace(augment="none")
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
    backbone = with_normalisation(backbone, config.normalisation)
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
