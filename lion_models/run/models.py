"""The model and the solver that a configuration names."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import deqcore
from lion_models.backbones import FrozenBackbone
from lion_models.backbones.blocks import checkpoint_blocks
from lion_models.backbones.normalisation import with_normalisation
from lion_models.base.errors import UserError
from lion_models.methods import (
    Adapters,
    FineTune,
    LinearProbe,
    LoRA,
    VPTDeep,
    VPTPad,
    VPTShallow,
)
from lion_models.methods.base import TunedClassifier
from lion_models.methods.lion import Lion
from lion_models.prompts.implicit_prompt import Solver
from lion_models.prompts.pruning import check_prunable
from lion_models.run.config import RunConfig

__all__ = ["build_model", "check_model", "make_solver"]


class _Method(NamedTuple):
    """A class of classifiers, and what else than backbone and classes it is made with."""

    kind: type[TunedClassifier]
    options: Callable[[RunConfig], dict[str, Any]]


_METHODS = {
    "linear": _Method(LinearProbe, lambda c: {}),
    "full": _Method(FineTune, lambda c: {}),
    "bias": _Method(FineTune, lambda c: {"part": "bias"}),
    "adapter": _Method(Adapters, lambda c: {"hidden": c.adapter_hidden, "place": c.adapter_place}),
    "lora": _Method(LoRA, lambda c: {"rank": c.lora_rank, "alpha": c.lora_alpha}),
    "vpt-shallow": _Method(VPTShallow, lambda c: {"prompts": c.prompts}),
    "vpt-deep": _Method(VPTDeep, lambda c: {"prompts": c.prompts, "dropout": c.prompt_dropout}),
    "vpt-pad": _Method(VPTPad, lambda c: {"pad": c.pad}),
    "lion": _Method(
        Lion,
        lambda c: {
            "sides": c.sides,
            "hidden": c.hidden,
            "strength": c.strength,
            "solver": make_solver(c),
            "iterations": c.iterations,
            "space": c.space,
            "output_input": c.output_input,
        },
    ),
}


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
    """The classifier that a configuration names, freshly initialised from torch's generator.

    Raises:
        UserError: the backbone is not one that the method or an option can work with.
    """
    backbone = with_normalisation(backbone, config.normalisation)
    if config.checkpoint_backbone:
        if config.method in ("full", "bias"):
            raise UserError(
                f"`checkpoint_backbone`: saves the activations of frozen blocks; '{config.method}' "
                "trains them; leave the option out"
            )
        backbone = checkpoint_blocks(backbone)
    method = _METHODS[config.method]
    model = method.kind(backbone, classes, **method.options(config))
    if isinstance(model, Lion) and config.sparsity:
        check_prunable(model)
    return model


def check_model(model: TunedClassifier, config: RunConfig, classes: int) -> None:
    """Raise UserError where a model is not one of the method and number of classes.

    A class of the user's own may go by any method's recipe.
    """
    made = model.head.out_features
    if made != classes:
        raise UserError(
            f"expected a model of {classes} classes, as the task has, got {made}; build it with "
            "classes=len(task.classes)"
        )
    own = [name for name, method in _METHODS.items() if type(model) is method.kind]
    if own and config.method not in own:
        raise UserError(
            f"expected a model of `method` {config.method}, got a {type(model).__name__}; use "
            f"RunConfig(..., method='{own[0]}'), or build_model"
        )
