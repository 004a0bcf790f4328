"""What version 0.1.0 wrote is read, continued and predicted with by the present code."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch.testing import assert_close

from lion_models import load_run
from lion_models.data import open_source
from lion_models.run import RunConfig
from tests.support.command import Lion

OLD = Path(__file__).parent / "fixtures" / "v0_1_0"
SMALL = ("--data", "digits", "--shots", 3, "--validation-shots", 2, "--threads", 1)
# In version 0.1.0 every run wrote down the options of all methods.
OWN = {
    "lion": {
        *("sides", "hidden", "strength", "solver", "rtol", "max_steps", "iterations", "space"),
        *("output_input", "sparsity", "prune_at"),
    },
    "vpt-shallow": {"prompts"},
    "vpt-deep": {"prompts", "prompt_dropout"},
    "vpt-pad": {"pad"},
    "adapter": {"adapter_hidden", "adapter_place"},
    "lora": {"lora_rank", "lora_alpha"},
}


def stored(*parts: str) -> dict[str, Any]:
    return json.loads(OLD.joinpath(*parts).read_text())


def copied(name: str, to: Path) -> Path:
    """A folder of version 0.1.0 that the test may write to."""
    return Path(shutil.copytree(OLD / name, to / name))


def weights_below(folder: Path) -> dict[str, bytes]:
    files = sorted(folder.rglob("checkpoint.safetensors"))
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


@pytest.mark.parametrize("path", sorted((OLD / "configs").iterdir()), ids=lambda path: path.stem)
def test_configurations_keep_every_option_of_their_method(path: Path):
    then = json.loads(path.read_text())
    now = RunConfig.from_dict(then).to_dict()
    of_others = set().union(*OWN.values()) - OWN.get(then["method"], set())
    assert {key: now.get(key) for key in now.keys() & then.keys()} == {
        key: value for key, value in then.items() if key in now
    }
    assert then.keys() - now.keys() <= of_others


@pytest.mark.parametrize("name", ["lion", "pruned"])
def test_logits_are_those_of_then(name: str):
    then = load_file(OLD / "logits.safetensors")
    run = load_run(OLD / name)
    with torch.no_grad():
        now = run.model(then["images"].float() / 255)
    assert_close(now, then[name], rtol=0, atol=1e-6)
    assert run.classes == tuple("0123456789")


def test_images_are_resized_to_the_pixels_of_then():
    then = load_file(OLD / "logits.safetensors")
    assert torch.equal(open_source("digits", 1, 28).load(then["rows"]), then["images"])


@pytest.mark.parametrize("name", ["lion", "pruned"])
def test_a_measured_run_is_shown_and_not_measured_again(lion: Lion, name: str, tmp_path: Path):
    folder = copied(name, tmp_path)
    shown = lion("eval", folder)
    assert shown.code == 0, shown.err
    assert f"{stored(name, 'result.json')['test']['accuracy']:.2%}" in shown.out
    assert (folder / "test.json").read_bytes() == (OLD / name / "test.json").read_bytes()
    facts = lion("info", folder)
    assert facts.code == 0, facts.err


def test_an_interrupted_run_goes_on_to_what_it_would_have_become(lion: Lion, tmp_path: Path):
    folder = copied("interrupted", tmp_path)
    done = lion("train", *SMALL, "--method", "linear", "--epochs", 4, "--runs", tmp_path,
                "--name", "interrupted", "--resume")  # fmt: skip
    assert done.code == 0, done.err
    whole = load_file(OLD / "whole" / "checkpoint.safetensors")
    # Not byte for byte: another processor or torch may round differently.
    assert_close(load_file(folder / "checkpoint.safetensors"), whole, rtol=1e-5, atol=1e-6)
    then, now = stored("whole", "result.json"), json.loads((folder / "result.json").read_text())
    assert now["best_epoch"] == then["best_epoch"]
    alike = {"weights": now["test"]["weights"], "loss": pytest.approx(then["test"]["loss"])}
    assert now["test"] == then["test"] | alike


@pytest.mark.parametrize(
    ("command", "options"),
    [
        ("compare", ("--methods", "linear,vpt-deep", "--seeds", "1,2")),
        ("sweep", ("--methods", "linear", "--grid", "lr=0.01,0.1", "--test-best")),
    ],
)
def test_a_study_of_finished_runs_trains_nothing(
    lion: Lion, command: str, options: tuple[str, ...], tmp_path: Path
):
    folder = copied(command, tmp_path)
    before = weights_below(folder)
    done = lion(command, *SMALL, "--epochs", 3, *options, "--runs", tmp_path, "--name", command)
    assert done.code == 0, done.err
    assert weights_below(folder) == before
    assert len(before) > 1
    now = json.loads((folder / f"{command}.json").read_text())
    for cell in now["cells"]:  # 0.1.0 left them in result.json alone
        if "test_images" in cell:
            assert (
                cell.pop("test_images")
                == stored(command, cell["run"], "result.json")["test"]["images"]
            )
    then = stored(command, f"{command}.json")
    assert then["options"].pop("strength") == 1.0
    assert now["options"].pop("strength") is None  # each form has its own now; no run here has it
    assert now == then
