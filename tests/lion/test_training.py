"""The trainer, checkpoints, run folders and resuming, below the command line."""

from __future__ import annotations

import copy
from itertools import product
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from lion_models.backbones import FrozenBackbone
from lion_models.base.errors import UserError
from lion_models.data import Task
from lion_models.methods import METHODS, SHOWN_METHODS
from lion_models.methods.base import trained_state
from lion_models.run import (
    FitState,
    Run,
    RunConfig,
    build_model,
    load_run,
)
from lion_models.run.checkpoint import read_checkpoint
from lion_models.run.config import owners_of
from lion_models.run.seeding import seed_all
from lion_models.run.trainer import solver_figures
from tests.support.small import fit_run


@pytest.fixture
def config(config: RunConfig) -> RunConfig:
    return config.but(epochs=4, batch=8)


@pytest.mark.parametrize("method", METHODS)
def test_training_changes_what_is_trained_and_no_bit_of_the_backbone(
    method: str, config: RunConfig, frozen: FrozenBackbone, task: Task
):
    config = config.but(method=method, epochs=15, lr=0.1)
    before = copy.deepcopy(frozen.module.state_dict())
    seed_all(config.training.seed)
    model = build_model(config, frozen, 3)
    start = trained_state(model)
    state = fit_run(model, task, config)
    after = frozen.module.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert all(not torch.equal(start[name], state.weights[name]) for name in start)
    assert not any(name.startswith("backbone") for name in state.weights)
    assert state.history[-1]["loss"] < state.history[0]["loss"]


def test_fit_ends_with_the_weights_that_validation_chose(
    config: RunConfig, frozen: FrozenBackbone, task: Task
):
    seed_all(config.training.seed)
    model = build_model(config, frozen, 3)
    kept: dict[int, dict[str, torch.Tensor]] = {}

    def keep(state: FitState) -> None:
        kept[len(state.history)] = state.weights

    state = fit_run(model, task, config, on_epoch=keep)
    ranks = [(row["validation_accuracy"], -row["validation_loss"]) for row in state.history]
    assert state.best_epoch == 1 + max(range(len(ranks)), key=ranks.__getitem__)
    for name, value in trained_state(model).items():
        assert torch.equal(value, kept[state.best_epoch][name])


def test_solver_figures_cover_both_layers_and_both_directions(
    config: RunConfig, frozen: FrozenBackbone, task: Task
):
    model = build_model(config, frozen, 3)
    state = fit_run(model, task, config)
    assert set(state.history[0]["solver"]) == {"input", "output"}
    for figures in state.history[0]["solver"].values():
        assert figures["converged"] == 1
        assert figures["steps"] > 0
        assert figures["backward_steps"] > 0
    assert solver_figures(build_model(config.but(method="linear"), frozen, 3)) == {}


class KilledError(Exception):
    """Stands for a process that ends without warning."""


@pytest.mark.parametrize(
    ("method", "optimizer"),
    [*product(SHOWN_METHODS, ("adamw", "sgd")), ("full", "adamw"), ("lora", "sgd")],
)
def test_resumed_run_gives_the_same_weights_bit_for_bit(
    method: str, optimizer: str, config: RunConfig, tmp_path: Path
):
    config = config.but(method=method, optimizer=optimizer)

    def die(state: FitState) -> None:
        if len(state.history) == 2:
            raise KilledError

    whole, broken = tmp_path / "whole", tmp_path / "broken"
    expected = Run(whole, config).train()
    with pytest.raises(KilledError):
        Run(broken, config).train(on_epoch=die)
    result = Run(broken, config).train()
    first, second = (load_file(f / "checkpoint.safetensors") for f in (whole, broken))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert result["test"] == expected["test"]
    lines = [(f / "metrics.jsonl").read_text().count("\n") for f in (whole, broken)]
    assert lines == [4, 4]


def test_checkpoint_holds_what_was_trained_and_nothing_else(trained: Path):
    weights, metadata = read_checkpoint(trained / "checkpoint.safetensors")
    layer = {"strength", "layer.cell.down.weight", "layer.cell.norm.weight",
             "layer.cell.norm.bias", "layer.cell.up.weight", "layer.cell.up.bias"}  # fmt: skip
    sides = {f"{side}_prompt.{name}" for side in ("input", "output") for name in layer}
    assert set(weights) == sides | {"head.weight", "head.bias"}
    assert metadata["method"] == "lion"
    assert metadata["classes"] == '["dark", "light", "middle"]'
    assert len(metadata["backbone_sha256"]) == 64
    assert set(metadata) == {"format", "method", "config", "backbone", "backbone_sha256", "classes",
                             "normalisation", "sha256"}  # fmt: skip


def test_loaded_run_predicts_like_the_trained_one(
    config: RunConfig, frozen: FrozenBackbone, task: Task, tmp_path: Path
):
    Run(tmp_path / "run", config).train(test=False)
    seed_all(config.training.seed)
    model = build_model(config, frozen, 3)
    fit_run(model, task, config)
    images = task.validation_images.float() / 255
    with torch.no_grad():
        assert torch.equal(load_run(tmp_path / "run").model(images), model(images))


def test_checkpoint_cut_in_half_is_named(trained: Path):
    path = trained / "checkpoint.safetensors"
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(UserError, match=r"checkpoint\.safetensors: cut off or not a safetensors"):
        load_run(trained)


def test_checkpoint_of_another_backbone_is_named(trained: Path, backbone: FrozenBackbone):
    with torch.no_grad():
        backbone.module.norm.bias.add_(1)
    other = FrozenBackbone(
        backbone.module, embed=backbone.embed, encode=backbone.encode, name="other",
        channels=1, image_size=12, token_dim=8, feature_dim=8,
    )  # fmt: skip
    with pytest.raises(UserError, match=r"was trained on backbone .* but 'other' has weights"):
        load_run(trained, other)


def test_other_safetensors_file_is_named(tmp_path: Path):
    save_file({"x": torch.zeros(2)}, tmp_path / "x.safetensors")
    with pytest.raises(UserError, match="not a checkpoint of 'lion train'"):
        load_run(tmp_path / "x.safetensors")


def test_damaged_training_state_is_named(config: RunConfig, tmp_path: Path):
    Run(tmp_path / "run", config).prepare()
    (tmp_path / "run" / "training_state.pt").write_bytes(b"PK\x03\x04 cut")
    with pytest.raises(UserError, match=r"training_state\.pt: damaged"):
        Run(tmp_path / "run", config).train()


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("method", "loin", r"`method`: expected one of .*'loin'; did you mean 'lion'\?"),
        ("sides", "booth", "did you mean 'both'"),
        ("solver", "andersen", "did you mean 'anderson'"),
        ("optimizer", "adam", "did you mean 'adamw'"),
        ("shots", 0, "`shots`: expected 1 or more, got 0"),
        ("epochs", -1, "`epochs`: expected 1 or more, got -1"),
        ("lr", 0.0, "`lr`: expected a number above 0 and below 1,000, got 0.0"),
        ("lr", float("nan"), "`lr`: expected a number above 0 and below 1,000, got nan"),
        ("weight_decay", -1.0, "`weight_decay`: expected 0 or more"),
        ("prompt_dropout", 1.0, "`prompt_dropout`: expected 0 <= p < 1"),
    ],
)
def test_bad_option_values_are_named(option: str, value: object, message: str):
    method = owners_of().get(option, ["lion"])[-1]
    with pytest.raises(UserError, match=message):
        RunConfig.of(**{"data": "digits", "method": method, option: value})


def test_configuration_round_trip_is_strict():
    config = RunConfig.of(data="digits", hidden=3)
    assert RunConfig.from_dict(config.to_dict()) == config
    with pytest.raises(UserError, match="unknown keys hiden"):
        RunConfig.from_dict(config.to_dict() | {"hiden": 3})
