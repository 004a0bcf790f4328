"""Killed training goes on to the same checkpoint, byte for byte; a full disk is named."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from lion_models.errors import UserError
from lion_models.training import RunConfig, prepare_folder, train_run
from lion_models.training.progress import STATE, read_state

# Trains as `lion train` does, with a state every epoch, and kills itself at a moment that the
# parent names: after an epoch, while the n-th file's bytes are synced (the temporary file is
# whole, the name is still the old file's), in the middle of the n-th file's bytes, or just after
# the n-th rename.
VICTIM = """
import json, os, signal, sys
from pathlib import Path
from lion_models.training import RunConfig, train_run

folder, moment, count = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
seen = 0

def die(*_):
    os.kill(os.getpid(), signal.SIGKILL)

def reached():
    global seen
    seen += 1
    return seen == count

real_sync, real_replace = os.fsync, Path.replace

def sync(descriptor):
    name = os.readlink(f"/proc/self/fd/{descriptor}")
    if name.endswith(".part") and moment in ("sync", "half") and reached():
        if moment == "half":
            os.truncate(name, os.path.getsize(name) // 2)
        die()
    real_sync(descriptor)

def rename(self, target):
    result = real_replace(self, target)
    if moment == "rename" and reached():
        die()
    return result

os.fsync, Path.replace = sync, rename
config = RunConfig.from_dict(json.loads((folder / "config.json").read_text()))
train_run(folder, config, test=False, plot=False, state_seconds=0,
          on_epoch=lambda state: die() if moment == "epoch" and len(state.history) == count else 0)
"""


@pytest.fixture
def config(image_folder: Path, backbone_file: Path) -> RunConfig:
    """Everything that a state has to hold: an average, early stopping, parts, augmentation."""
    return RunConfig(
        data=str(image_folder),
        backbone=str(backbone_file),
        shots=4,
        validation_shots=3,
        epochs=6,
        batch=5,
        hidden=4,
        lr=0.05,
        augment="affine",
        ema=0.9,
        accumulate=2,
        patience=4,
        class_weights="balanced",
        amp="bf16",
    )


def train(folder: Path, config: RunConfig, *moment: object) -> int:
    """Train in a process of its own; its exit status."""
    if not folder.exists():
        prepare_folder(folder, config, resume=False, overwrite=False)
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", VICTIM, str(folder), *map(str, moment or ("none", 0))]
    return subprocess.run(command, env=environment, timeout=300).returncode


def finish(folder: Path, config: RunConfig) -> bytes:
    train_run(folder, config, test=False, plot=False)
    return (folder / "checkpoint.safetensors").read_bytes()


def test_run_that_is_killed_again_and_again_ends_with_the_same_bytes(
    config: RunConfig, tmp_path: Path
):
    prepare_folder(tmp_path / "whole", config, resume=False, overwrite=False)
    expected = finish(tmp_path / "whole", config)
    # Files synced by a process: metrics.jsonl, then a state an epoch.
    moments = [("epoch", 1), ("half", 2), ("sync", 3), ("rename", 2)]
    reached = []
    for moment in moments:
        assert train(tmp_path / "run", config, *moment) == -signal.SIGKILL
        state = read_state(tmp_path / "run" / STATE)
        reached.append(len(state.history) if state else 0)
    # After epoch 1 with its state; epoch 2's state cut off; epoch 2's whole and 3's not yet named;
    # epoch 3's renamed.
    assert reached == [1, 1, 2, 3]
    assert finish(tmp_path / "run", config) == expected
    names = {path.name for path in (tmp_path / "run").iterdir()}
    assert names == {"config.json", "metrics.jsonl", "checkpoint.safetensors", "result.json"}
    whole, broken = ((tmp_path / name / "metrics.jsonl").read_text().splitlines()
                     for name in ("whole", "run"))  # fmt: skip
    assert len(whole) == len(broken) == 6


def test_run_killed_while_its_checkpoint_is_written_ends_with_the_same_bytes(
    config: RunConfig, tmp_path: Path
):
    config = replace(config, epochs=3)
    # metrics.jsonl, three states, then the checkpoint and result.json.
    assert train(tmp_path / "run", config, "half", 5) == -signal.SIGKILL
    assert not (tmp_path / "run" / "checkpoint.safetensors").exists()
    assert not (tmp_path / "run" / "result.json").exists()
    first = finish(tmp_path / "run", config)
    prepare_folder(tmp_path / "whole", config, resume=False, overwrite=False)
    assert first == finish(tmp_path / "whole", config)


@pytest.mark.parametrize("method", ["linear", "vpt-deep", "lion"])
def test_state_of_every_method_continues_bit_for_bit(
    method: str, config: RunConfig, tmp_path: Path
):
    class Stop(Exception):  # noqa: N818
        pass

    def stop(state: object) -> None:
        if len(state.history) == 3:  # type: ignore[attr-defined]
            raise Stop

    config = replace(config, method=method, prompts=2, amp="none")
    for name in ("whole", "run"):
        prepare_folder(tmp_path / name, config, resume=False, overwrite=False)
    with pytest.raises(Stop):
        train_run(tmp_path / "run", config, test=False, on_epoch=stop, state_seconds=0)
    assert finish(tmp_path / "run", config) == finish(tmp_path / "whole", config)


def test_run_that_had_stopped_early_does_not_go_on(config: RunConfig, tmp_path: Path):
    config = replace(config, patience=1, epochs=50, lr=1e-6, ema=None)
    prepare_folder(tmp_path / "run", config, resume=False, overwrite=False)
    result = train_run(tmp_path / "run", config, test=False, plot=False, state_seconds=0)
    assert result["epochs"] < 50
    assert result["epochs"] == result["best_epoch"] + 1
    # Killed between its last state and its checkpoint.
    (tmp_path / "run" / "result.json").unlink()
    lines = (tmp_path / "run" / "metrics.jsonl").read_text()
    again = train_run(tmp_path / "run", config, test=False, plot=False, state_seconds=0)
    assert again["epochs"] == result["epochs"]
    assert len((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()) == len(
        lines.splitlines()
    )


FULL = """
import json, resource, sys
from pathlib import Path
from lion_models.errors import UserError
from lion_models.training import RunConfig, train_run
folder, limit = Path(sys.argv[1]), int(sys.argv[2])
resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
config = RunConfig.from_dict(json.loads((folder / "config.json").read_text()))
try:
    train_run(folder, config, test=False, state_seconds=0)
except UserError as error:
    print(error)
    sys.exit(2)
"""


@pytest.mark.parametrize(("limit", "named"), [(100, "metrics.jsonl"), (3000, "training_state.pt")])
def test_full_disk_is_named_and_the_run_goes_on_when_there_is_room(
    limit: int, named: str, config: RunConfig, tmp_path: Path
):
    config = replace(config, epochs=3, amp="none")
    folder = tmp_path / "run"
    prepare_folder(folder, config, resume=False, overwrite=False)
    done = subprocess.run(
        [sys.executable, "-c", FULL, str(folder), str(limit)], capture_output=True, text=True,
        timeout=300,
    )  # fmt: skip
    assert done.returncode == 2, done.stderr
    assert f"{named}: cannot be written, no space is left for it (File too large)" in done.stdout
    assert "continue with --resume" in done.stdout
    assert {path.name for path in folder.iterdir()} <= {"config.json", "metrics.jsonl"}
    prepare_folder(tmp_path / "whole", config, resume=False, overwrite=False)
    assert finish(folder, config) == finish(tmp_path / "whole", config)


def test_damaged_and_foreign_states_are_named(config: RunConfig, tmp_path: Path):
    path = tmp_path / STATE
    for content in (b"", b"PK\x03\x04 cut", b"\x80\x04K\x01."):
        path.write_bytes(content)
        with pytest.raises(UserError, match=r"training_state\.pt: damaged"):
            read_state(path)
