"""The options of training, whatever is trained."""

from __future__ import annotations

from dataclasses import dataclass

from lion_models.base.options import Need, Options, option
from lion_models.data.augment import AUGMENTATIONS
from lion_models.methods.registry import Recipe

__all__ = ["AMP", "CLASS_WEIGHTS", "TrainingConfig"]

AMP = ("none", "bf16", "fp16")
CLASS_WEIGHTS = ("none", "balanced", "balanced-softmax")
# torch's generators take 64 bits, and a seed is multiplied by about a million for its epochs.
MOST_SEED = 2**32 - 1

_WHOLE = Need(
    lambda run: run.training.accumulate <= run.training.batch,
    "{accumulate} parts are more than the {batch} images of `batch`; lower it",
)


@dataclass(frozen=True)
class TrainingConfig(Options):
    """Seed, budget, optimizer and loss.

    The learning rate rises over the first tenth of the epochs, and falls to zero in half a cosine.
    """

    seed: int = option(
        42,
        "Of the split, the weights, the batches and the dropout.",
        low=-MOST_SEED,
        high=MOST_SEED,
        expected=f"a whole number within ±{MOST_SEED}",
    )
    epochs: int = option(100, "Passes over the training images.", low=1)
    batch: int = option(64, "Images per step.", low=1)
    optimizer: str = option(
        "adamw", "Of the steps; sgd has a momentum of 0.9.", choices=("adamw", "sgd")
    )
    lr: float | None = option(
        None, "Peak learning rate.", above=0, below=1000, unset="the method's"
    )
    weight_decay: float | None = option(None, "Of matrices alone.", low=0, unset="the method's")
    augment: str | None = option(
        None,
        "Small random maps of the training images.",
        choices=AUGMENTATIONS,
        unset="the method's",
    )
    amp: str = option("none", "Mixed precision of the training step.", choices=AMP)
    accumulate: int = option(
        1,
        "Compute a batch in this many parts; the step stays that of the whole.",
        low=1,
        needs=(_WHOLE,),
    )
    ema: float | None = option(
        None,
        "Decay of an average of the weights, which is then validated and kept: 0.999.",
        above=0,
        below=1,
        expected="a decay such as 0.999",
        unset="no average",
    )
    patience: int | None = option(
        None, "Stop after this many epochs without a better one.", low=1, unset="all epochs"
    )
    class_weights: str = option("none", "Of the training loss.", choices=CLASS_WEIGHTS)

    def recipe(self, default: Recipe, transform: str = "square") -> Recipe:
        """Learning rate, weight decay and augmentation, those left open from a method's own.

        Args:
            default: the method's.
            transform: of the images; those that are protocols of others have an augmentation of
                their own or none, the same for every method.
        """
        augment = default.augment if transform == "square" else "none"
        return Recipe(
            default.lr if self.lr is None else self.lr,
            default.weight_decay if self.weight_decay is None else self.weight_decay,
            augment if self.augment is None else self.augment,
        )
