"""Configuration, trainer, checkpoints and run folders."""

from lion_models.run.checkpoint import LoadedRun, load_run, save_checkpoint
from lion_models.run.config import RunConfig
from lion_models.run.models import build_model
from lion_models.run.runs import measure_run, prepare_folder, train_run
from lion_models.run.trainer import FitState, fit

__all__ = [
    "FitState",
    "LoadedRun",
    "RunConfig",
    "build_model",
    "fit",
    "load_run",
    "measure_run",
    "prepare_folder",
    "save_checkpoint",
    "train_run",
]
