"""Everything that defines a run, validated when it is made."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, NamedTuple

from lion_models.backbones.frozen import SPACES
from lion_models.backbones.normalisation import NORMALISATIONS
from lion_models.base.errors import UserError, check_types, choose
from lion_models.data.augment import AUGMENTATIONS
from lion_models.data.transforms import TRANSFORMS
from lion_models.data.verify import BAD_FILES, VERIFY
from lion_models.methods import ADAPTER_PLACES
from lion_models.methods.lion import OUTPUT_INPUTS, SIDES
from lion_models.prompts.cdr import THRESHOLDS

__all__ = [
    "AMP",
    "CDR_OPTIONS",
    "CLASS_WEIGHTS",
    "DEFAULTS",
    "METHODS",
    "ONLY_FOR",
    "OPTIMIZERS",
    "ROBUST",
    "ROBUST_ON",
    "ROBUST_SETS",
    "SHOWN_METHODS",
    "SOLVERS",
    "SOLVER_OPTIONS",
    "RunConfig",
]

METHODS = (
    "linear",
    "full",
    "bias",
    "adapter",
    "lora",
    "vpt-shallow",
    "vpt-deep",
    "vpt-pad",
    "lion",
)
# What `lion demo` and, unless told otherwise, `lion compare` run.
SHOWN_METHODS = ("linear", "vpt-deep", "lion")
OPTIMIZERS = ("adamw", "sgd")
SOLVERS = ("anderson", "broyden", "picard")
ROBUST = ("none", "cdr")
ROBUST_SETS = ("step", "fixed")
ROBUST_ON = ("implicit", "all")
AMP = ("none", "bf16", "fp16")
# torch's generators take 64 bits, and a seed is multiplied by about a million for its epochs.
MOST_SEED = 2**32 - 1
CLASS_WEIGHTS = ("none", "balanced", "balanced-softmax")

# Options that mean something to these methods alone, so that a grid does not repeat the others.
ONLY_FOR = {
    **dict.fromkeys(
        (
            "sides",
            "hidden",
            "strength",
            "solver",
            "rtol",
            "max_steps",
            "iterations",
            "space",
            "output_input",
            "sparsity",
            "prune_at",
        ),
        ("lion",),
    ),
    "prompts": ("vpt-shallow", "vpt-deep"),
    "prompt_dropout": ("vpt-deep",),
    "pad": ("vpt-pad",),
    "adapter_hidden": ("adapter",),
    "adapter_place": ("adapter",),
    "lora_rank": ("lora",),
    "lora_alpha": ("lora",),
}


# Options of `robust` cdr, which mean nothing without it.
CDR_OPTIONS = ("tau", "robust_set", "robust_scope", "robust_decay", "robust_ramp", "robust_on")
# Options of the equilibrium's solver, which explicit layers (`iterations`) have none of.
SOLVER_OPTIONS = ("solver", "rtol", "max_steps")


class Recipe(NamedTuple):
    """What each method chooses for itself on validation data."""

    lr: float
    weight_decay: float
    augment: str


# Chosen from one grid by validation data, but for that of full, which lies below it; docs/lion.md.
DEFAULTS = {
    "linear": Recipe(0.03, 0.01, "none"),
    "full": Recipe(0.001, 0.01, "none"),
    "bias": Recipe(0.01, 0.01, "none"),
    "adapter": Recipe(0.03, 0.01, "none"),
    "lora": Recipe(0.03, 0.01, "affine"),
    "vpt-shallow": Recipe(0.03, 0.01, "affine"),
    "vpt-deep": Recipe(0.03, 0.01, "none"),
    "vpt-pad": Recipe(0.03, 0.01, "none"),
    "lion": Recipe(0.03, 0.01, "affine"),
}


@dataclass(frozen=True)
class RunConfig:
    """One training run.

    Args:
        data: what `open_source` takes: a name of `lion data list`, a folder, and others.
        method: one of METHODS.
        backbone: what `load_backbone` takes: `tiny-vit`, `vit-s14-focus`, ...
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
        space: lion: `token` or `pixel`; None means `token` where the backbone has tokens.
        output_input: lion: what drives the output layer, `pooled` or `embedding`; see `Lion`.
        robust: `none` or `cdr`: critical weights learn, the others are driven to zero.
        tau: cdr: share of the weights that is not critical.
        robust_set: cdr: `step` chooses the critical set anew at every step, `fixed` once, by the
            scores of the first tenth of the epochs.
        robust_scope: cdr: `layer` takes the share of each matrix, `global` of all together.
        robust_decay: cdr: pull towards zero, in weight per unit of learning rate.
        robust_ramp: cdr: epochs over which tau rises from 0.
        robust_on: cdr: `implicit` acts on the matrices of lion's implicit layers and leaves other
            methods alone, `all` on every trained matrix of every method, the head's included.
        sparsity: lion: share of each matrix of the implicit layers that is pruned; 0 for none.
        prune_at: lion: the epoch after whose training that happens, and before its validation;
            None means the last. Later epochs train the kept weights, without `robust`.
        checkpoint_backbone: compute the activations of the frozen blocks again in the backward
            pass instead of keeping them; not for `full` and `bias`.
        prompts: vpt-deep: tokens per block; vpt-shallow: tokens.
        prompt_dropout: vpt-deep: dropout on the prompts.
        pad: vpt-pad: width of the learned frame in pixels.
        adapter_hidden: adapter: bottleneck width.
        adapter_place: adapter: `both` (behind attention and MLP) or `mlp`.
        lora_rank: lora: rank r.
        lora_alpha: lora: the scale is alpha / r; None means a scale of one.
        amp: `none`, `bf16` or `fp16` (CUDA alone): what the training step's forward pass computes
            in. Weights, losses and every measurement stay float32.
        accumulate: parts that a batch is computed in, one after the other; the step is that of the
            whole batch within rounding (a dropout draws one mask for each part).
        ema: decay of an exponential moving average of the trained weights, which validation, test
            and the checkpoint then use; None means no average. Pruning starts it anew.
        patience: epochs without a better one on validation data after which training ends, and
            never before pruning; None trains for all `epochs`.
        class_weights: of the training loss: `none`, `balanced` (inverse class frequency) or
            `balanced-softmax` (logits shifted by the log of the class frequency).
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
    space: str | None = None
    output_input: str = "pooled"
    robust: str = "none"
    tau: float = 0.5
    robust_set: str = "step"
    robust_scope: str = "layer"
    robust_decay: float = 0.03
    robust_ramp: int = 0
    robust_on: str = "implicit"
    sparsity: float = 0.0
    prune_at: int | None = None
    checkpoint_backbone: bool = False
    prompts: int = 10
    prompt_dropout: float = 0.1
    pad: int = 2
    adapter_hidden: int = 2
    adapter_place: str = "both"
    lora_rank: int = 2
    lora_alpha: float | None = None
    amp: str = "none"
    accumulate: int = 1
    ema: float | None = None
    patience: int | None = None
    class_weights: str = "none"

    def __post_init__(self) -> None:
        check_types(self)
        choose("method", self.method, METHODS)
        choose("optimizer", self.optimizer, OPTIMIZERS)
        if self.augment is not None:
            choose("augment", self.augment, AUGMENTATIONS)
        choose("transform", self.transform, TRANSFORMS)
        choose("normalisation", self.normalisation, NORMALISATIONS)
        choose("bad_files", self.bad_files, BAD_FILES)
        choose("verify", self.verify, VERIFY)
        choose("sides", self.sides, SIDES)
        choose("solver", self.solver, SOLVERS)
        if self.space is not None:
            choose("space", self.space, SPACES)
        choose("output_input", self.output_input, OUTPUT_INPUTS)
        self._check_robust()
        choose("adapter_place", self.adapter_place, ADAPTER_PLACES)
        choose("amp", self.amp, AMP)
        choose("class_weights", self.class_weights, CLASS_WEIGHTS)
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
            "pad",
            "adapter_hidden",
            "lora_rank",
            "accumulate",
            "patience",
        )
        for name in counts:
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UserError(f"`{name}`: expected 1 or more, got {value}")
        for name in ("lr", "rtol", "lora_alpha"):
            value = getattr(self, name)
            if value is not None and not 0 < value < 1000:
                raise UserError(f"`{name}`: expected a number above 0 and below 1,000, got {value}")
        if self.imbalance is not None and not 1 <= self.imbalance < 1e6:
            raise UserError(
                f"`imbalance`: expected 1 or more and below 1,000,000, got {self.imbalance}"
            )
        if abs(self.seed) > MOST_SEED:
            raise UserError(f"`seed`: expected a whole number within ±{MOST_SEED}, got {self.seed}")
        if self.weight_decay is not None and not 0 <= self.weight_decay < math.inf:
            raise UserError(f"`weight_decay`: expected 0 or more, got {self.weight_decay}")
        if not math.isfinite(self.strength):
            raise UserError(f"`strength`: expected a number such as 1.0, got {self.strength}")
        if not 0 <= self.prompt_dropout < 1:
            raise UserError(f"`prompt_dropout`: expected 0 <= p < 1, got {self.prompt_dropout}")
        if self.ema is not None and not 0 < self.ema < 1:
            raise UserError(f"`ema`: expected a decay such as 0.999, got {self.ema}")

    def _check_robust(self) -> None:
        choose("robust", self.robust, ROBUST)
        choose("robust_set", self.robust_set, ROBUST_SETS)
        choose("robust_scope", self.robust_scope, THRESHOLDS)
        choose("robust_on", self.robust_on, ROBUST_ON)
        for name in ("tau", "sparsity"):
            value = getattr(self, name)
            if not 0 <= value < 1:
                raise UserError(f"`{name}`: expected a share from 0 to below 1, got {value}")
        for name in ("robust_decay", "robust_ramp"):
            value = getattr(self, name)
            if not 0 <= value < math.inf:
                raise UserError(f"`{name}`: expected 0 or more, got {value}")
        if self.prune_at is None:
            return
        if not self.sparsity:
            raise UserError("`prune_at`: says when to prune; say how much with `sparsity`, too")
        if not 1 <= self.prune_at <= self.epochs:
            raise UserError(
                f"`prune_at`: expected an epoch from 1 to {self.epochs}, got {self.prune_at}"
            )

    @property
    def prune_epoch(self) -> int | None:
        """The epoch after whose training the model is pruned; None if it is not."""
        if self.method != "lion" or not self.sparsity:
            return None
        return self.epochs if self.prune_at is None else self.prune_at

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
