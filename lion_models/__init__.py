"""Implicit vision prompt tuning (LION) on frozen backbones, built on `deqcore`."""

from lion_models.backbones import FrozenBackbone, load_backbone
from lion_models.base.errors import UserError
from lion_models.data import make_task, open_source
from lion_models.methods import (
    Adapters,
    FineTune,
    LinearProbe,
    LoRA,
    VPTDeep,
    VPTPad,
    VPTShallow,
)
from lion_models.methods.base import count_parameters
from lion_models.methods.lion import Lion
from lion_models.prompts.cdr import CDR, RobustOptimizer
from lion_models.prompts.implicit_prompt import ImplicitPrompt
from lion_models.run import RunConfig, build_model, fit, load_run

__all__ = [
    "CDR",
    "Adapters",
    "FineTune",
    "FrozenBackbone",
    "ImplicitPrompt",
    "LinearProbe",
    "Lion",
    "LoRA",
    "RobustOptimizer",
    "RunConfig",
    "UserError",
    "VPTDeep",
    "VPTPad",
    "VPTShallow",
    "build_model",
    "count_parameters",
    "fit",
    "load_backbone",
    "load_run",
    "make_task",
    "open_source",
]
