"""How a run is trained: parts of a batch, averages, early ends, precision, class weights."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from lion_models.backbones import FrozenBackbone
from lion_models.base.errors import UserError
from lion_models.data import Task
from lion_models.methods.base import TunedClassifier, trained_state
from lion_models.run import FitState, RunConfig, build_model
from lion_models.run.averaging import Average
from lion_models.run.features import freeze_images
from lion_models.run.loss import TrainingLoss
from lion_models.run.seeding import seed_all
from lion_models.run.trainer import score
from tests.support.small import fit_run


def fitted(
    config: RunConfig, frozen: FrozenBackbone, task: Task
) -> tuple[TunedClassifier, FitState]:
    seed_all(config.training.seed)
    model = build_model(config, frozen, len(task.classes))
    return model, fit_run(model, task, config)


@pytest.mark.parametrize("weights", ["none", "balanced", "balanced-softmax"])
@pytest.mark.parametrize("accumulate", [2, 3, 20])
def test_parts_of_a_batch_give_the_step_of_the_whole(
    accumulate: int, weights: str, config: RunConfig, frozen: FrozenBackbone, task: Task
):
    config = config.but(augment="affine", class_weights=weights)
    _, whole = fitted(config, frozen, task)
    _, parts = fitted(config.but(accumulate=accumulate), frozen, task)
    for name, value in whole.weights.items():
        torch.testing.assert_close(parts.weights[name], value, rtol=1e-4, atol=1e-5)
    for first, second in zip(whole.history, parts.history, strict=True):
        assert second["loss"] == pytest.approx(first["loss"], rel=1e-4)


def test_average_follows_its_formula(frozen: FrozenBackbone, config: RunConfig):
    model = build_model(config.but(method="linear"), frozen, 3)
    average = Average(0.5)
    values = [0.0, 1.0, 3.0, 3.0]
    expected = 0.0
    for step, value in enumerate(values):
        with torch.no_grad():
            model.head.bias.fill_(value)
        average.update(model, step)
        decay = min(0.5, (1 + step) / (10 + step))
        expected = value if step == 0 else decay * expected + (1 - decay) * value
        assert average.weights["head.bias"].tolist() == pytest.approx([expected] * 3)
    with average.applied(model):
        assert model.head.bias.tolist() == pytest.approx([expected] * 3)
    assert model.head.bias.tolist() == [3.0] * 3


def test_average_is_what_is_validated_and_kept(
    config: RunConfig, frozen: FrozenBackbone, task: Task
):
    model, state = fitted(config.but(ema=0.99, epochs=4), frozen, task)
    assert any(not torch.equal(state.weights[name], state.average[name]) for name in state.weights)
    assert all(torch.equal(state.best[name], value) for name, value in trained_state(model).items())
    sums = score(model, freeze_images(model, task.validation_images), task.validation_labels)
    row = state.history[state.best_epoch - 1]
    assert sums["accuracy"] / len(task.validation_labels) == row["validation_accuracy"]
    assert sums["loss"] / len(task.validation_labels) == pytest.approx(row["validation_loss"])
    _, plain = fitted(config.but(epochs=4), frozen, task)
    for name, value in plain.weights.items():  # the average changes nothing about the steps
        assert torch.equal(state.weights[name], value)


def test_training_stops_when_validation_has_not_improved(
    config: RunConfig, frozen: FrozenBackbone, task: Task
):
    _, state = fitted(config.but(lr=1e-7, epochs=60, patience=3), frozen, task)
    assert len(state.history) == state.best_epoch + 3 < 60


def test_bf16_trains_float32_weights_near_those_of_float32(
    config: RunConfig, frozen: FrozenBackbone, task: Task
):
    config = config.but(method="lion", lr=0.003)
    _, full = fitted(config, frozen, task)
    _, half = fitted(config.but(amp="bf16"), frozen, task)
    assert all(value.dtype == torch.float32 for value in half.weights.values())
    assert any(not torch.equal(half.weights[name], full.weights[name]) for name in full.weights)
    assert half.history[-1]["loss"] == pytest.approx(full.history[-1]["loss"], rel=0.05)


def test_fp16_without_a_gpu_is_refused(config: RunConfig, frozen: FrozenBackbone, task: Task):
    with pytest.raises(UserError, match="`amp` fp16: needs `device` cuda, got cpu; use `amp` bf16"):
        fitted(config.but(amp="fp16"), frozen, task)


def test_class_weights_follow_their_formulas():
    labels = torch.tensor([0] * 6 + [1] * 3 + [2])
    logits = torch.randn(10, 3)
    balanced = TrainingLoss("balanced", labels, 3)
    weight = torch.tensor([10 / 18, 10 / 9, 10 / 3])
    expected = F.cross_entropy(logits, labels, weight=weight)
    mean = balanced.sum(logits, labels) / balanced.denominator(labels)
    torch.testing.assert_close(mean, expected)
    softmax = TrainingLoss("balanced-softmax", labels, 3)
    counts = torch.tensor([6.0, 3.0, 1.0])
    shares = counts * logits.exp() / (counts * logits.exp()).sum(1, keepdim=True)
    torch.testing.assert_close(
        softmax.sum(logits, labels), -shares[torch.arange(10), labels].log().sum()
    )
    plain = TrainingLoss("none", labels, 3)
    torch.testing.assert_close(
        plain.sum(logits, labels) / plain.denominator(labels), F.cross_entropy(logits, labels)
    )


def test_class_weights_lift_the_rare_class(frozen: FrozenBackbone, config: RunConfig):
    # Pure noise: the best guess is the class frequency, and balanced losses undo it.
    images = torch.randint(0, 255, (44, 1, 12, 12), dtype=torch.uint8)
    labels = torch.tensor([0] * 40 + [1] * 4)
    task = Task(("many", "few"), images, labels, images, labels)
    chances = {}
    for kind in ("none", "balanced", "balanced-softmax"):
        model, _ = fitted(
            config.but(method="linear", class_weights=kind, lr=0.01, epochs=20), frozen, task
        )
        with torch.no_grad():
            chances[kind] = model(images.float() / 255).softmax(1)[:, 1].mean().item()
    assert chances["none"] < 0.3
    assert chances["balanced"] > chances["none"] + 0.15
    assert chances["balanced-softmax"] > chances["none"] + 0.15
