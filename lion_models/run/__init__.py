"""Configuration, trainer, checkpoints and run folders."""

from lion_models.run.checkpoint import LoadedRun, load_run, save_checkpoint
from lion_models.run.config import RunConfig, build_model
from lion_models.run.run import Run
from lion_models.run.trainer import FitState, fit

__all__ = [
    "FitState",
    "LoadedRun",
    "Run",
    "RunConfig",
    "build_model",
    "fit",
    "load_run",
    "save_checkpoint",
]
