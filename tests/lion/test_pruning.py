"""Pruned LION: what it computes, how it trains on, and that it survives disk and interruption."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import deqcore
from lion_models.backbones import FrozenBackbone, freeze_vit, load_backbone
from lion_models.base.errors import UserError
from lion_models.data import Task
from lion_models.methods.base import count_parameters, load_trained, trained_state
from lion_models.methods.lion import Lion
from lion_models.prompts.cdr import RobustOptimizer
from lion_models.prompts.pruning import prune_and_rebuild, prune_model
from lion_models.run import (
    FitState,
    Run,
    RunConfig,
    build_model,
    load_run,
)
from lion_models.run.checkpoint import read_checkpoint, save_checkpoint
from lion_models.run.seeding import seed_all
from tests.support.command import Lion as Command
from tests.support.small import SMALL, fit_run, optimizer_of, small_vit

D, H = SMALL.dim, 4
MATRICES = [
    f"{side}_prompt.layer.cell.{name}.weight"
    for side in ("input", "output")
    for name in ("down", "up")
]
EXACT = deqcore.Anderson(rtol=1e-12, atol=1e-13, max_steps=200)


@pytest.fixture
def config(image_folder: Path, backbone_file: Path) -> RunConfig:
    return RunConfig.of(
        data=str(image_folder), backbone=str(backbone_file), shots=4, validation_shots=3,
        epochs=4, batch=8, hidden=H, lr=0.02, sparsity=0.75, prune_at=2,
    )  # fmt: skip


def double_lion() -> Lion:
    backbone = freeze_vit(small_vit().double(), "small")
    torch.manual_seed(2)
    return Lion(backbone, 3, hidden=H, solver=EXACT).double()


def zero_outside(model: Lion, masks: dict[str, torch.Tensor]) -> None:
    with torch.no_grad():
        for name, mask in masks.items():
            model.get_parameter(name).mul_(mask)


def test_pruned_model_computes_what_the_masked_dense_one_does():
    dense, images = double_lion(), torch.rand(4, 1, 12, 12, dtype=torch.float64)
    pruned = copy.deepcopy(dense)
    patterns = prune_model(pruned, 0.75)
    assert set(patterns) == set(MATRICES)
    assert not torch.allclose(pruned(images), dense(images), atol=1e-4)
    zero_outside(dense, {name: pattern.mask() for name, pattern in patterns.items()})
    torch.testing.assert_close(pruned(images), dense(images), rtol=1e-9, atol=1e-11)


def test_the_largest_weights_are_kept_and_critical_ones_before_others():
    model = double_lion()
    weight = model.get_parameter(MATRICES[0])
    sizes = weight.detach().abs()
    patterns = prune_model(copy.deepcopy(model), 0.75)
    mask = patterns[MATRICES[0]].mask()
    assert int(mask.sum()) == D * H // 4
    assert sizes[mask].min() >= sizes[~mask].max()
    critical = sizes <= sizes.flatten().sort().values[D * H // 4 - 1]  # the smallest quarter
    patterns = prune_model(model, 0.75, lambda p: critical if p is weight else None)
    assert torch.equal(patterns[MATRICES[0]].mask(), critical)


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_training_goes_on_as_dense_training_with_masks_would(optimizer: str, config: RunConfig):
    """Momentum, moments, weight decay and rates of the kept weights are those they had."""
    config = config.but(optimizer=optimizer, weight_decay=0.1, lr=0.01)
    images = torch.rand(6, 1, 12, 12, dtype=torch.float64)
    labels = torch.tensor([0, 1, 2, 0, 1, 2])

    def step(model: Lion, tool: torch.optim.Optimizer) -> None:
        tool.zero_grad()
        nn.functional.cross_entropy(model(images), labels).backward()
        tool.step()

    dense = double_lion()
    dense_tool = optimizer_of(dense, config, 2)
    for _ in range(3):
        step(dense, dense_tool)
    pruned = copy.deepcopy(dense)
    tool = optimizer_of(pruned, config, 2)
    tool.load_state_dict(copy.deepcopy(dense_tool.state_dict()))
    tool = prune_and_rebuild(pruned, tool, 0.75, lambda: optimizer_of(pruned, config, 2))
    masks = {
        name: pruned.get_submodule(name.removesuffix(".weight")).pattern.mask() for name in MATRICES
    }
    for _ in range(4):
        step(pruned, tool)
        zero_outside(dense, masks)
        dense_tool.zero_grad()
        nn.functional.cross_entropy(dense(images), labels).backward()
        dense_tool.step()
        zero_outside(dense, masks)
    for name, mask in masks.items():
        layer = pruned.get_submodule(name.removesuffix(".weight"))
        torch.testing.assert_close(
            layer.weight, dense.get_parameter(name) * mask, rtol=1e-6, atol=1e-9
        )
    torch.testing.assert_close(pruned(images), dense(images), rtol=1e-6, atol=1e-8)


def test_counts_tell_dense_kept_and_nonzero_with_and_without_head():
    model = double_lion()
    before = count_parameters(model)
    assert before.trained == before.kept
    prune_model(model, 0.75)
    with torch.no_grad():
        model.input_prompt.layer.cell.down.values[:3] = 0
        model.head.weight[0, :2] = 0
    counts = count_parameters(model)
    assert counts.trained == before.trained
    assert counts.without_head - counts.kept_without_head == 4 * D * H * 3 // 4
    assert counts.kept == sum(p.numel() for p in model.parameters() if p.requires_grad)
    # Biases that start at zero: `up` and the norm of both layers, and the head.
    zeros = 2 * (D + H) + 3
    assert counts.kept_without_head - counts.nonzero_without_head == zeros
    assert counts.kept - counts.nonzero == zeros + 2 + 3
    assert counts.to_dict()["kept_without_head"] == counts.kept_without_head


def test_trained_state_carries_the_patterns():
    model, fresh = double_lion(), double_lion()
    prune_model(model, 0.75)
    load_trained(fresh, trained_state(model))
    images = torch.rand(2, 1, 12, 12, dtype=torch.float64)
    assert torch.equal(fresh(images), model(images))
    other = double_lion()
    prune_model(other, 0.5)
    load_trained(other, trained_state(model))
    assert torch.equal(other(images), model(images))


def test_fit_prunes_once_and_chooses_among_pruned_epochs(
    config: RunConfig, task: Task, backbone_file: Path
):
    seed_all(config.training.seed)
    model = build_model(config, load_backbone(str(backbone_file)), 3)
    dense, kept = count_parameters(model).kept, []
    state = fit_run(
        model, task, config, on_epoch=lambda state: kept.append(state.history[-1]["kept"])
    )
    assert kept == [dense, *[dense - 4 * D * H * 3 // 4] * 3]
    assert state.best_epoch >= 2
    assert isinstance(model.input_prompt.layer.cell.down, deqcore.MaskedLinear)
    assert sum(name.endswith(".pattern") for name in state.best) == 4


def test_average_goes_on_over_the_kept_weights(
    config: RunConfig, backbone: FrozenBackbone, task: Task
):
    def run(**options: object) -> tuple[nn.Module, FitState]:
        seed_all(3)
        model = build_model(config.but(**options), backbone, len(task.classes))
        return model, fit_run(model, task, config.but(**options))

    _, plain = run()
    model, state = run(ema=0.5)
    for name, value in plain.weights.items():  # the average changes nothing about the steps
        assert torch.equal(state.weights[name], value), name
    pruned = "input_prompt.layer.cell.down.values"
    assert state.average[pruned].shape == state.weights[pruned].shape
    assert not torch.equal(state.average[pruned], state.weights[pruned])
    assert torch.equal(trained_state(model)[pruned], state.best[pruned])


@pytest.mark.parametrize("prune_at", [None, 2])
def test_average_is_pruned_and_not_begun_anew(
    prune_at: int | None, config: RunConfig, backbone: FrozenBackbone, task: Task
):
    """At the pruned epoch the average is that of the dense run, at the kept entries."""
    config = config.but(ema=0.9, epochs=3, prune_at=prune_at)

    def average(**options: object) -> dict[str, torch.Tensor]:
        changed = config.but(**options)
        seed_all(3)
        model = build_model(changed, backbone, len(task.classes))
        averages = []
        fit_run(model, task, changed, on_epoch=lambda s: averages.append(copy.deepcopy(s.average)))
        return averages[(prune_at or config.training.epochs) - 1]

    pruned, dense = average(), average(sparsity=0.0, prune_at=None)
    matrix = "input_prompt.layer.cell.down."
    kept = pruned[matrix + "values"]
    assert 0 < kept.numel() < dense[matrix + "weight"].numel()
    assert torch.isin(kept, dense[matrix + "weight"]).all()
    assert torch.equal(pruned["head.bias"], dense["head.bias"])


def test_patience_waits_for_pruning(config: RunConfig, backbone: FrozenBackbone, task: Task):
    config = config.but(epochs=12, prune_at=6, patience=2, lr=1e-7)
    seed_all(3)
    model = build_model(config, backbone, len(task.classes))
    state = fit_run(model, task, config)
    assert state.best_epoch >= 6
    assert len(state.history) == min(12, state.best_epoch + 2)


def test_pruning_at_the_end_measures_the_pruned_model(
    config: RunConfig, task: Task, backbone_file: Path
):
    config = config.but(prune_at=None)
    seed_all(config.training.seed)
    state = fit_run(build_model(config, load_backbone(str(backbone_file)), 3), task, config)
    assert state.best_epoch == config.training.epochs
    assert state.history[-1]["kept"] < state.history[-2]["kept"]


def test_values_of_a_pruned_matrix_have_its_weight_decay(config: RunConfig):
    model = double_lion()
    prune_model(model, 0.75)
    optimizer = optimizer_of(model, config.but(weight_decay=0.1), 2)
    values = model.input_prompt.layer.cell.down.values
    (group,) = [g for g in optimizer.param_groups if any(p is values for p in g["params"])]
    assert group["weight_decay"] == 0.1


@pytest.mark.parametrize("robust_set", ["step", "fixed"])
def test_robust_training_acts_on_the_implicit_layers_matrices(robust_set: str, config: RunConfig):
    config = config.but(robust="cdr", robust_set=robust_set, tau=0.5, robust_ramp=3)
    model = double_lion()
    optimizer = optimizer_of(model, config, 7)
    assert isinstance(optimizer, RobustOptimizer)
    (group,) = optimizer.param_groups[2:]
    assert [id(p) for p in group["params"]] == [id(model.get_parameter(n)) for n in MATRICES]
    assert group["weight_decay"] == 0
    assert optimizer.rule.ramp == 21
    assert optimizer.rule.fix_after == (7 if robust_set == "fixed" else None)
    everything = optimizer_of(model, config.but(robust_on="all"), 7)
    assert any(p is model.head.weight for p in everything.param_groups[2]["params"])
    prune_model(model, 0.75)
    assert not isinstance(optimizer_of(model, config, 7), RobustOptimizer)


@pytest.mark.parametrize("robust_on", ["implicit", "all"])
def test_robust_training_of_other_methods_is_opt_in(
    robust_on: str, config: RunConfig, backbone: FrozenBackbone
):
    config = config.but(method="linear", robust="cdr", robust_on=robust_on)
    optimizer = optimizer_of(build_model(config, backbone, 3), config, 2)
    assert isinstance(optimizer, RobustOptimizer) == (robust_on == "all")


def test_fixed_critical_set_decides_what_pruning_keeps(
    config: RunConfig, task: Task, backbone_file: Path
):
    config = config.but(robust="cdr", robust_set="fixed", tau=0.75, robust_decay=0.5, epochs=3)
    seed_all(config.training.seed)
    model = build_model(config, load_backbone(str(backbone_file)), 3)
    seen: list[torch.Tensor] = []

    def note(state: FitState) -> None:
        if len(state.history) == 1:
            seen.extend(state.optimizer["robust"]["fixed"])

    fit_run(model, task, config, on_epoch=note)
    kept = [model.get_submodule(name.removesuffix(".weight")).pattern.mask() for name in MATRICES]
    assert all(torch.equal(mask, critical) for mask, critical in zip(kept, seen, strict=True))


class KilledError(Exception):
    """Stands for a process that ends without warning."""


@pytest.mark.parametrize("killed_after", [1, 2, 3])
@pytest.mark.parametrize(
    "options",
    [
        {"optimizer": "adamw"},
        {"optimizer": "sgd", "robust": "cdr", "robust_set": "fixed", "prune_at": 3},
        {"optimizer": "adamw", "robust": "cdr", "robust_scope": "global", "prune_at": None},
    ],
    ids=["adamw", "sgd fixed", "adamw step"],
)
def test_resume_across_pruning_gives_the_same_weights_bit_for_bit(
    options: dict[str, object], killed_after: int, config: RunConfig, task: Task,
    backbone_file: Path, tmp_path: Path,
):  # fmt: skip
    config = config.but(**options)
    backbone = load_backbone(str(backbone_file))

    def train(state: FitState | None = None, until: int | None = None) -> FitState:
        def die(state: FitState) -> None:
            torch.save(vars(state), tmp_path / "state.pt")
            if len(state.history) == until:
                raise KilledError

        seed_all(config.training.seed)
        return fit_run(build_model(config, backbone, 3), task, config, state, die)

    whole = train()
    with pytest.raises(KilledError):
        train(until=killed_after)
    stored = torch.load(tmp_path / "state.pt", weights_only=True)
    resumed = train(FitState(**stored))
    assert resumed.best_epoch == whole.best_epoch
    for name in ("weights", "best"):
        first, second = getattr(whole, name), getattr(resumed, name)
        assert first.keys() == second.keys()
        assert all(torch.equal(first[key], second[key]) for key in first)


def test_run_of_a_pruned_model_can_be_loaded_and_tells_what_it_kept(
    config: RunConfig, tmp_path: Path
):
    folder = tmp_path / "run"
    result = Run(folder, config).train()
    counts = result["parameters"]
    assert counts["trained"] - counts["kept"] == 4 * D * H * 3 // 4
    assert counts["without_head"] - counts["kept_without_head"] == 4 * D * H * 3 // 4
    run = load_run(folder)
    assert count_parameters(run.model).kept == counts["kept"]
    stored = load_file(folder / "checkpoint.safetensors")
    assert stored["input_prompt.layer.cell.down.values"].shape == (D * H // 4,)
    assert "input_prompt.layer.cell.down.weight" not in stored
    assert result["test"]["images"] == 12


def test_checkpoint_with_a_pattern_of_another_width_is_named(config: RunConfig, tmp_path: Path):
    folder = tmp_path / "run"
    Run(folder, config).train(test=False)
    weights, metadata = read_checkpoint(folder / "checkpoint.safetensors")
    backbone = load_backbone(config.backbone.backbone)
    other = config.but(hidden=H + 1)
    classes = tuple(json.loads(metadata["classes"]))
    save_checkpoint(folder / "checkpoint.safetensors", weights, other, backbone, classes)
    with pytest.raises(UserError, match="its weights do not fit method 'lion'"):
        load_run(folder)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sparsity": 1.0}, "`sparsity`: expected a share from 0 to below 1, got 1.0"),
        ({"tau": -0.1}, "`tau`: expected a share from 0 to below 1, got -0.1"),
        ({"prune_at": 5}, "`prune_at`: says when to prune; say how much with `sparsity`"),
        ({"prune_at": 101, "sparsity": 0.5}, "`prune_at`: expected an epoch from 1 to 100"),
        ({"robust": "cdrr"}, "did you mean 'cdr'"),
        ({"robust_set": "fix"}, "`robust_set`: expected one of fixed, step"),
        ({"robust_scope": "all"}, "`robust_scope`: expected one of global, layer"),
        ({"robust_decay": -1.0}, "`robust_decay`: expected 0 or more"),
        ({"robust_decay": float("nan")}, "`robust_decay`: expected 0 or more"),
        ({"method": "lora", "lora_alpha": 0.0}, "`lora_alpha`: expected a number above 0"),
        ({"method": "vpt-pad", "pad": 0}, "`pad`: expected 1 or more"),
        ({"space": "pixels"}, "did you mean 'pixel'"),
        ({"output_input": "tokens"}, "`output_input`: expected one of embedding, pooled"),
        (
            {"method": "adapter", "adapter_place": "attn"},
            "`adapter_place`: expected one of both, mlp",
        ),
    ],
)
def test_bad_options_are_named(options: dict[str, object], message: str):
    with pytest.raises(UserError, match=message):
        RunConfig.of(data="digits", **options)


def test_pixels_alone_cannot_be_pruned(backbone: FrozenBackbone):
    config = RunConfig.of(data="digits", space="pixel", sides="input", sparsity=0.5)
    with pytest.raises(UserError, match="`sparsity`: prunes the linear layers of LION's"):
        build_model(config, backbone, 3)
    model = build_model(config.but(sides="both"), backbone, 3)
    assert list(prune_model(model, 0.5)) == MATRICES[2:]


def test_compare_shows_what_pruning_keeps(
    lion: Command, image_folder: Path, backbone_file: Path, tmp_path: Path
):
    done = lion(
        "compare", "--data", image_folder, "--backbone", backbone_file, "--shots", 3,
        "--validation-shots", 2, "--epochs", 2, "--hidden", H, "--seeds", 1, "--methods",
        "lora,lion", "--robust", "cdr", "--sparsity", 0.5, "--prune-at", 1, "--runs", tmp_path,
        "--name", "c",
    )  # fmt: skip
    assert done.code == 0, done.err
    written = json.loads((tmp_path / "c" / "compare.json").read_text())
    rows = {row["method"]: row for row in written["summary"]}
    assert rows["lion"]["without_head"] - rows["lion"]["kept_without_head"] == 2 * D * H
    assert rows["lora"]["without_head"] == rows["lora"]["kept_without_head"]
    line = next(line for line in done.out.splitlines() if line.startswith("lion  "))
    assert str(rows["lion"]["kept_without_head"]) in line.split()
