"""torchrun with two processes gives what one process gives, and fails as a whole."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from lion_models.run.ranks import ALONE, Ranks
from tests.support.command import Lion

# Nine training images in batches of five: the parts are uneven, the last batch too.
OPTIONS = ("--shots", 3, "--validation-shots", 3, "--epochs", 3, "--batch", 5, "--hidden", 4,
           "--lr", 0.02, "--augment", "affine", "--ema", 0.9, "--accumulate", 2,
           "--class-weights", "balanced")  # fmt: skip


def torchrun(
    *arguments: object, program: tuple[object, ...] = ("-m", "lion_models")
) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node",
               "2", *map(str, (*program, "train", *arguments))]  # fmt: skip
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)


def test_two_processes_train_what_one_trains(
    lion: Lion, image_folder: Path, backbone_file: Path, tmp_path: Path
):
    shared = ("--data", image_folder, "--backbone", backbone_file, *OPTIONS, "--runs", tmp_path)
    alone = lion("train", *shared, "--name", "one")
    assert alone.code == 0, alone.err
    done = torchrun(*shared, "--name", "two")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("chosen epoch") == 1
    one, two = (load_file(tmp_path / name / "checkpoint.safetensors") for name in ("one", "two"))
    assert one.keys() == two.keys()
    for name in one:
        torch.testing.assert_close(two[name], one[name], rtol=1e-4, atol=1e-5)
    rows = [[json.loads(line) for line in (tmp_path / name / "metrics.jsonl").open()]
            for name in ("one", "two")]  # fmt: skip
    assert len(rows[0]) == len(rows[1]) == 3
    for first, second in zip(*rows, strict=True):
        for key in ("loss", "validation_loss", "train_accuracy", "validation_accuracy", "lr"):
            assert second[key] == pytest.approx(first[key], rel=1e-4), key
        assert second["solver"].keys() == first["solver"].keys()
    results = [json.loads((tmp_path / name / "result.json").read_text()) for name in ("one", "two")]
    assert results[0]["test"]["accuracy"] == results[1]["test"]["accuracy"]
    files = [{path.name for path in (tmp_path / name).iterdir()} for name in ("one", "two")]
    assert files[0] == files[1]


FAILING = """
import os
from lion_models import cli
from lion_models.base.errors import UserError
from lion_models.run.loss import TrainingLoss

def fail(*_):
    raise UserError("the second process has no room")

if os.environ["RANK"] == "1":
    TrainingLoss.sum = fail
cli.main()
"""


def test_error_of_one_process_ends_all(image_folder: Path, backbone_file: Path, tmp_path: Path):
    (tmp_path / "failing.py").write_text(FAILING)
    done = torchrun("--data", image_folder, "--backbone", backbone_file, *OPTIONS, "--runs",
                    tmp_path, "--name", "x", program=(tmp_path / "failing.py",))  # fmt: skip
    assert done.returncode != 0
    assert "the second process has no room" in done.stderr
    names = {path.name for path in (tmp_path / "x").iterdir()}
    assert names == {"config.json", "data.json", "metrics.jsonl"}


@pytest.mark.parametrize("count", [0, 1, 2, 5, 64])
@pytest.mark.parametrize("world", [1, 2, 3])
def test_parts_of_a_batch_are_the_batch(count: int, world: int):
    rows = torch.arange(count)
    parts = [rows[Ranks(rank, world).part(count)] for rank in range(world)]
    assert torch.equal(torch.cat(parts), rows)
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


def test_one_process_exchanges_nothing():
    parameter = torch.nn.Parameter(torch.ones(2))
    ALONE.add_gradients([parameter])
    assert parameter.grad is None
    assert ALONE.share("x") == "x"
    assert ALONE.gather(1) == [1]
    assert ALONE.add({"a": 1.5}) == {"a": 1.5}
