"""Killed training goes on to the same checkpoint, byte for byte; a full disk is named."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from lion_models.base.errors import UserError
from lion_models.run import Run, RunConfig
from lion_models.run.log import STATE, read_state

# Trains as `lion train` does, with a state every epoch, in a process for each moment: "epoch n"
# kills itself after an epoch; "sync n" while its n-th file is synced (the temporary file is whole,
# the name is still the old file's); "half n" with half of the n-th file's bytes there; "rename n"
# just after the n-th rename; "full n" has a disk that takes files of n bytes. One interpreter forks
# them all, before it computes anything: loading torch takes longer than the training.
VICTIMS = """
import json, os, resource, signal, sys
from pathlib import Path
import torch
from lion_models.base.errors import UserError
from lion_models.run import Run, RunConfig
from lion_models.run.log import STATE, read_state

torch.set_num_threads(1)
real_sync, real_replace = os.fsync, Path.replace

def train(folder, moment, count):
    seen = 0

    def die(*_):
        os.kill(os.getpid(), signal.SIGKILL)

    def reached():
        nonlocal seen
        seen += 1
        return seen == count

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

    def on_epoch(state):
        if moment == "epoch" and len(state.history) == count:
            die()

    os.fsync, Path.replace = sync, rename
    if moment == "full":
        resource.setrlimit(resource.RLIMIT_FSIZE, (count, count))
    config = RunConfig.from_dict(json.loads((folder / "config.json").read_text()))
    Run(folder, config).train(test=False, plot=False, state_seconds=0, on_epoch=on_epoch)

told = []
for folder, moment, count in json.loads(sys.argv[1]):
    folder = Path(folder)
    read_end, write_end = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            train(folder, moment, count)
        except UserError as error:
            os.write(write_end, str(error).encode())
            os._exit(2)
        os._exit(0)
    os.close(write_end)
    message = b""
    while part := os.read(read_end, 4096):
        message += part
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    state = read_state(folder / STATE) if (folder / STATE).exists() else None
    told.append({
        "status": status,
        "epochs": len(state.history) if state else 0,
        "message": message.decode(),
        "files": sorted(path.name for path in folder.iterdir()),
    })
print(json.dumps(told))
"""
# metrics.jsonl is the first file of a process that is synced (before it data.json where a run is
# new), then a state an epoch.
MOMENTS = [
    ("again", "epoch", 1),
    ("again", "half", 2),
    ("again", "sync", 3),
    ("again", "rename", 2),
    ("checkpoint", "half", 9),
    ("full metrics", "full", 300),
    ("full state", "full", 3000),
]


@pytest.fixture(scope="module")
def config(image_folder: Path, backbone_file: Path) -> RunConfig:
    """Everything that a state has to hold: an average, early stopping, parts, augmentation."""
    return RunConfig.of(
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
        patience=6,
        class_weights="balanced",
        amp="bf16",
    )


@dataclass(frozen=True)
class Victims:
    folder: Path
    told: dict[tuple[str, str, int], dict[str, Any]]
    whole: bytes


@pytest.fixture(scope="module")
def victims(config: RunConfig, tmp_path_factory: pytest.TempPathFactory) -> Victims:
    """Runs that were killed or ran out of room, and the checkpoint of one that was not."""
    folder = tmp_path_factory.mktemp("victims")
    for name in {name for name, _, _ in MOMENTS} | {"whole"}:
        Run(folder / name, config).prepare()
    asked = json.dumps([(str(folder / name), moment, count) for name, moment, count in MOMENTS])
    done = subprocess.run(
        [sys.executable, "-c", VICTIMS, asked], capture_output=True, text=True, timeout=300,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    told = dict(zip(MOMENTS, json.loads(done.stdout), strict=True))
    return Victims(folder, told, finish(folder / "whole", config))


def finish(folder: Path, config: RunConfig) -> bytes:
    Run(folder, config).train(test=False, plot=False)
    return (folder / "checkpoint.safetensors").read_bytes()


def test_run_that_is_killed_again_and_again_ends_with_the_same_bytes(
    victims: Victims, config: RunConfig
):
    told = [victims.told[moment] for moment in MOMENTS[:4]]
    assert [one["status"] for one in told] == [-signal.SIGKILL] * 4
    # After epoch 1 with its state; epoch 2's state cut off; epoch 2's whole and 3's not yet named;
    # epoch 3's renamed.
    assert [one["epochs"] for one in told] == [1, 1, 2, 3]
    folder = victims.folder / "again"
    assert finish(folder, config) == victims.whole
    names = {path.name for path in folder.iterdir()}
    assert names == {"config.json", "data.json", "metrics.jsonl", "checkpoint.safetensors",
                     "result.json"}  # fmt: skip
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [row["epoch"] for row in rows] == [1, 2, 3, 4, 5, 6]


def test_run_killed_while_its_checkpoint_is_written_ends_with_the_same_bytes(
    victims: Victims, config: RunConfig
):
    told = victims.told["checkpoint", "half", 9]
    assert told["status"] == -signal.SIGKILL
    assert [name for name in told["files"] if name.startswith("checkpoint")] != [
        "checkpoint.safetensors"
    ]
    assert any(name.startswith("checkpoint.safetensors.") for name in told["files"])
    assert finish(victims.folder / "checkpoint", config) == victims.whole


@pytest.mark.parametrize(("limit", "named"), [(300, "metrics.jsonl"), (3000, "training_state.pt")])
def test_full_disk_is_named_and_the_run_goes_on_when_there_is_room(
    limit: int, named: str, victims: Victims, config: RunConfig
):
    name = f"full {named.removeprefix('training_').split('.')[0]}"
    told = victims.told[name, "full", limit]
    assert told["status"] == 2
    assert f"{named}: cannot be written, no space is left" in told["message"]
    assert "(File too large)" in told["message"]
    assert "continue with `resume`" in told["message"]
    assert set(told["files"]) == {"config.json", "data.json", "metrics.jsonl"}
    assert finish(victims.folder / name, config) == victims.whole


@pytest.mark.parametrize("method", ["linear", "vpt-deep", "lion"])
def test_state_of_every_method_continues_bit_for_bit(
    method: str, config: RunConfig, tmp_path: Path
):
    class StopError(Exception):
        pass

    def stop(state: object) -> None:
        if len(state.history) == 3:
            raise StopError

    config = config.but(method=method, amp="none")
    with pytest.raises(StopError):
        Run(tmp_path / "run", config).train(test=False, on_epoch=stop, state_seconds=0)
    assert finish(tmp_path / "run", config) == finish(tmp_path / "whole", config)


def test_run_that_had_stopped_early_does_not_go_on(config: RunConfig, tmp_path: Path):
    config = config.but(patience=1, epochs=50, lr=1e-6, ema=None)
    result = Run(tmp_path / "run", config).train(test=False, plot=False, state_seconds=0)
    assert result["epochs"] < 50
    assert result["epochs"] == result["best_epoch"] + 1
    # Killed between its last state and its checkpoint.
    (tmp_path / "run" / "result.json").unlink()
    lines = (tmp_path / "run" / "metrics.jsonl").read_text()
    again = Run(tmp_path / "run", config).train(test=False, plot=False, state_seconds=0)
    assert again["epochs"] == result["epochs"]
    assert len((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()) == len(
        lines.splitlines()
    )


def test_damaged_and_foreign_states_are_named(config: RunConfig, tmp_path: Path):
    path = tmp_path / STATE
    for content in (b"", b"PK\x03\x04 cut", b"\x80\x02K\x01."):
        path.write_bytes(content)
        with pytest.raises(UserError, match=r"training_state\.pt: damaged"):
            read_state(path)
