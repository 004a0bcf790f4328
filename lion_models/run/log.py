"""What a run writes while it trains: metrics, a state to resume from, TensorBoard scalars."""

from __future__ import annotations

import io
import json
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from lion_models.base.errors import UserError
from lion_models.base.files import append_line, replacing, write_bytes
from lion_models.base.optional import require
from lion_models.base.torch_files import DamagedError, load_torch
from lion_models.run.trainer import FitState

__all__ = ["METRICS", "STATE", "STATE_SECONDS", "RunLog", "read_state"]

METRICS = "metrics.jsonl"
STATE = "training_state.pt"
# A state is synced to the disk, which may take longer than an epoch on cached features does. What
# a kill costs is this and the epoch it falls into; the final weights do not depend on it.
STATE_SECONDS = 2.0


class RunLog:
    """Writes a run's progress, an epoch at a time.

    Args:
        folder: the run's.
        state: what the run continues from; None is its start.
        state_seconds: seconds between two states.
        tensorboard: write scalars to `folder/tensorboard` too.

    Raises:
        UserError: a file cannot be written, or TensorBoard is asked for and not installed.
    """

    def __init__(
        self, folder: Path, state: FitState | None, state_seconds: float, tensorboard: bool
    ) -> None:
        self._metrics, self._state = folder / METRICS, folder / STATE
        self._state_seconds = state_seconds
        self._saved = time.monotonic()
        history = state.history if state else []
        # Epochs after the state are trained again, and written again.
        with replacing(self._metrics, "w") as file:
            file.writelines(json.dumps(row) + "\n" for row in history)
        self._board = _board(folder / "tensorboard", len(history) + 1) if tensorboard else None

    def add(self, state: FitState) -> None:
        """Write down an epoch that has ended."""
        row = state.history[-1]
        append_line(self._metrics, json.dumps(row))
        if time.monotonic() - self._saved >= self._state_seconds:
            write_state(self._state, state)
            self._saved = time.monotonic()
        if self._board is not None:
            for name, value in scalars(row).items():
                self._board.add_scalar(name, value, row["epoch"])
            self._board.flush()

    def close(self) -> None:
        if self._board is not None:
            self._board.close()


def scalars(row: dict[str, Any]) -> dict[str, float]:
    """TensorBoard's scalars of a row of metrics.jsonl, by tag."""
    figures = {
        "loss/train": row["loss"],
        "loss/validation": row["validation_loss"],
        "accuracy/train": row["train_accuracy"],
        "accuracy/validation": row["validation_accuracy"],
        "lr": row["lr"],
    }
    for side, solve in row["solver"].items():
        figures |= {f"solver_{name}/{side}": value for name, value in solve.items()}
    return figures


def write_state(path: Path, state: FitState) -> None:
    """Write a state whole, or leave the one before."""
    buffer = io.BytesIO()
    torch.save(asdict(state), buffer)
    write_bytes(path, buffer.getvalue())


def read_state(path: Path) -> FitState | None:
    """The state of an interrupted fit; None where there is none.

    Raises:
        UserError: damaged, or of another version.
    """
    if not path.exists():
        return None
    try:
        return FitState(**load_torch(path))
    except (DamagedError, TypeError) as error:
        raise UserError(f"{path}: damaged ({error}); start again with `overwrite`") from error


def _board(folder: Path, first_epoch: int) -> Any:
    require("tensorboard", "`tensorboard`", "lion")
    from torch.utils.tensorboard import SummaryWriter

    # What an interrupted run wrote from this epoch on is hidden, not shown twice.
    return SummaryWriter(str(folder), purge_step=first_epoch)
