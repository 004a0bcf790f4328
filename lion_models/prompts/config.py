"""The options of robust training."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from lion_models.base.options import Need, Options, option
from lion_models.prompts.cdr import THRESHOLDS

__all__ = ["CDR_OPTIONS", "RobustConfig"]

# Those that mean nothing without robust training.
CDR_OPTIONS = ("tau", "robust_set", "robust_scope", "robust_decay", "robust_ramp", "robust_on")

_CDR = Need(
    lambda run: run.robust.robust == "cdr",
    "belongs to `robust` cdr, which is not there; add it, or leave `{name}` out",
)
_MATRICES = Need(
    lambda run: run.robust.robust == "none" or run.robust.acts_on(run.method),
    "cdr leaves {method} alone; add `robust_on` all to act on every trained matrix, or leave it "
    "out",
)
_REACHED = Need(
    lambda run: run.robust.robust_ramp <= run.training.epochs,
    "{robust_ramp} epochs are more than the {epochs} of `epochs`; lower it",
)


@dataclass(frozen=True)
class RobustConfig(Options):
    """Critical weights learn, the others are driven to zero; see `CDR`."""

    robust: str = option(
        "none",
        "Drive weights that are not critical to zero.",
        choices=("none", "cdr"),
        needs=(_MATRICES,),
    )
    tau: float = option(
        0.5,
        "Share of the weights that is not critical.",
        low=0,
        below=1,
        expected="a share from 0 to below 1",
        needs=(_CDR,),
    )
    robust_set: str = option(
        "step",
        "Choose the critical set anew at every step, or a fixed one, by the scores of the first "
        "tenth of the epochs.",
        choices=("step", "fixed"),
        needs=(_CDR,),
    )
    robust_scope: str = option(
        "layer",
        "Take the share of each matrix, or of all together.",
        choices=THRESHOLDS,
        needs=(_CDR,),
    )
    robust_decay: float = option(
        0.03, "Pull towards zero, in weight per unit of learning rate.", low=0, needs=(_CDR,)
    )
    robust_ramp: int = option(
        0, "Epochs over which tau rises from 0.", low=0, needs=(_CDR, _REACHED)
    )
    robust_on: str = option(
        "implicit",
        "Act on the matrices of implicit layers (LION's) and leave other methods alone, or on all "
        "trained matrices of any method, the head's included.",
        choices=("implicit", "all"),
        needs=(_CDR,),
    )

    def acts_on(self, method: Any) -> bool:
        """Whether a method has weights that robust training would act on."""
        return self.robust_on == "all" or method.implicit
