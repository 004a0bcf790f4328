"""The one trainer that every method goes through."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lion_models.base.errors import UserError
from lion_models.data import Task, training_view
from lion_models.methods.base import (
    TunedClassifier,
    count_parameters,
    load_trained,
    trained_state,
)
from lion_models.methods.registry import recipe_of
from lion_models.prompts.config import RobustConfig
from lion_models.prompts.pruning import Pruning, prune_and_rebuild
from lion_models.run.averaging import Average
from lion_models.run.balance import balanced_figure
from lion_models.run.features import FeatureCache, Inputs, freeze_images
from lion_models.run.loss import TrainingLoss
from lion_models.run.optimizer import make_optimizer
from lion_models.run.precision import Precision
from lion_models.run.ranks import ALONE, Ranks
from lion_models.run.seeding import seed_all
from lion_models.run.training import TrainingConfig

__all__ = ["FitState", "diverged", "fit", "freeze_images", "score", "solver_figures",
           "stopped_early"]  # fmt: skip

GRADIENT_BOUND = 1.0
DIVERGED = 10.0  # times the loss of guessing


@dataclass
class FitState:
    """What a fit has reached; enough to go on from.

    Attributes:
        history: one row per finished epoch, as written to metrics.jsonl.
        best_epoch: the epoch that validation chose (1 is the first), 0 before any.
        best: its trained parameters; their average where the run keeps one.
        weights: the current trained parameters.
        optimizer: the optimizer's state dict.
        average: the averaged parameters, where the run keeps them.
        scaler: state of the loss scale, with fp16.

    Random numbers and the share of a batch that is accumulated need no place here: a state is that
    of an epoch's end, and an epoch's random numbers depend on the seed and its number alone.
    """

    history: list[dict[str, Any]] = field(default_factory=list)
    best_epoch: int = 0
    best: dict[str, Tensor] = field(default_factory=dict)
    weights: dict[str, Tensor] = field(default_factory=dict)
    optimizer: dict[str, Any] = field(default_factory=dict)
    average: dict[str, Tensor] = field(default_factory=dict)
    scaler: dict[str, Any] = field(default_factory=dict)


@dataclass
class _Tools:
    """What the steps of a fit use beside model and data."""

    optimizer: torch.optim.Optimizer
    loss: TrainingLoss
    precision: Precision
    average: Average
    ranks: Ranks


def solver_figures(model: TunedClassifier) -> dict[str, dict[str, float]]:
    """Per implicit layer: steps, worst residual and converged share of its last forward solve.

    `backward_steps` is there once a backward pass has run through the layer.
    """
    figures: dict[str, dict[str, float]] = {}
    for side, prompt in model.implicit_layers.items():
        report = prompt.layer.report
        if report is None:
            continue
        figures[side] = {
            "steps": report.steps.float().mean().item(),
            "residual": report.residual.max().item(),
            "converged": report.converged.float().mean().item(),
        }
        if report.backward is not None:
            figures[side]["backward_steps"] = report.backward.steps.float().mean().item()
    return figures


@torch.no_grad()
def score(
    model: TunedClassifier,
    fixed: Tensor,
    labels: Tensor,
    predicted: list[Tensor] | None = None,
    chances: list[Tensor] | None = None,
) -> dict[str, float]:
    """Sums over a set of inputs: correct answers, cross-entropy, and solver steps per layer.

    Args:
        model: put into eval mode.
        fixed: outputs of the model's frozen part, (n, ...).
        labels: int64 (n,).
        predicted: gets the predicted labels, int64 (b,) a batch.
        chances: gets the probabilities, (b, C) a batch.
    """
    model.eval()
    sums: dict[str, float] = {"accuracy": 0.0, "loss": 0.0}
    size = model.backbone.evaluation_batch
    batches = zip(fixed.split(size), labels.split(size), strict=True)
    for batch, truth in batches:
        if len(truth) == 0:  # a process without a share of the data
            continue
        logits = model.tuned(batch)
        if predicted is not None:
            predicted.append(logits.argmax(1).cpu())
        if chances is not None:
            chances.append(logits.float().softmax(1).cpu())
        sums["accuracy"] += float((logits.argmax(1) == truth).sum())
        sums["loss"] += float(F.cross_entropy(logits, truth, reduction="sum"))
        for side, figures in solver_figures(model).items():
            key = f"steps_{side}"
            sums[key] = sums.get(key, 0.0) + figures["steps"] * len(truth)
    return sums


def fit(
    model: TunedClassifier,
    task: Task,
    training: TrainingConfig | None = None,
    state: FitState | None = None,
    on_epoch: Callable[[FitState], None] = lambda state: None,
    *,
    robust: RobustConfig | None = None,
    pruning: Pruning | None = None,
    transform: str = "square",
    features: FeatureCache | None = None,
    ranks: Ranks = ALONE,
) -> FitState:
    """Train a model and leave it with the weights that validation chose.

    The best epoch has the highest validation accuracy, the lower validation loss deciding ties;
    where the run prunes, it is one of those measured pruned.

    Args:
        model: freshly built from the seed; its device is used.
        task: training and validation images.
        training: seed, budget, optimizer and loss; None means their defaults. What it leaves open
            is as the recipe of the model's method has it; a class of one's own goes by the one that
            suits most methods.
        state: of an interrupted fit, to continue it.
        on_epoch: called after every epoch with the state so far.
        robust: robust training; None means none.
        pruning: of implicit layers; None means none.
        transform: how the task's images were fitted to the backbone; see `Geometry`.
        features: outputs of frozen parts to share with other fits of this process.
        ranks: this process among those that train the model together.

    Raises:
        UserError: the model is not one of the task's classes, or has nothing to prune.
    """
    made = model.head.out_features
    if made != len(task.classes):
        raise UserError(
            f"expected a model of {len(task.classes)} classes, as the task has, got {made}; build "
            "it with classes=len(task.classes)"
        )
    training = TrainingConfig() if training is None else training
    recipe = training.recipe(recipe_of(model), transform)
    steps = math.ceil(len(task.train_labels) / training.batch)
    resumed, state = state is not None, FitState() if state is None else state
    if resumed:
        load_trained(model, state.weights)  # pruned or not, which decides the optimizer
    optimizer = make_optimizer(model, training, recipe, steps, robust)
    if resumed:
        optimizer.load_state_dict(state.optimizer)
    ranks.align(_trained(model))
    view = training_view(transform, recipe.augment, model.backbone.image_size)
    train = Inputs(model, task.train_images, task.train_labels, view, features)
    validation = Inputs(model, task.validation_images, task.validation_labels, features=features)
    part = ranks.part(len(validation))
    validation_fixed = validation.take(torch.arange(len(validation)), part)
    tools = _Tools(
        optimizer,
        TrainingLoss(training.class_weights, train.labels, len(task.classes)),
        Precision(training.amp, train.labels.device.type, state.scaler),
        Average(training.ema, state.average),
        ranks,
    )

    for epoch in range(len(state.history) + 1, training.epochs + 1):
        if stopped_early(state, training, pruning):
            break
        start = time.perf_counter()
        row = _train_epoch(model, tools, train, training, recipe.lr, epoch)
        if pruning is not None and epoch == pruning.epoch:
            tools.optimizer = prune_and_rebuild(
                model,
                tools.optimizer,
                pruning.sparsity,
                lambda: make_optimizer(model, training, recipe, steps, robust),
            )
            tools.average.prune(model)
        if pruning is not None:
            row["kept"] = count_parameters(model).kept
        with tools.average.applied(model):
            predicted: list[Tensor] = []
            own = validation.labels[part]
            sums = ranks.add(score(model, validation_fixed, own, predicted))
            row["validation_accuracy"] = sums["accuracy"] / len(validation)
            row["validation_loss"] = sums["loss"] / len(validation)
            answers = ranks.gather((own.cpu(), torch.cat([own.cpu()[:0], *predicted])))
            truth, guessed = (torch.cat(parts) for parts in zip(*answers, strict=True))
            row |= balanced_figure(truth, guessed, "validation_")
            row["seconds"] = time.perf_counter() - start
            eligible = pruning is None or epoch >= pruning.epoch
            best = state.history[state.best_epoch - 1] if state.best_epoch else None
            if eligible and (best is None or _rank(row) > _rank(best)):
                state.best_epoch, state.best = epoch, trained_state(model)
        state.history.append(row)
        state.weights, state.optimizer = trained_state(model), tools.optimizer.state_dict()
        state.average, state.scaler = tools.average.weights, tools.precision.state()
        on_epoch(state)

    load_trained(model, state.best)
    model.eval()
    return state


def stopped_early(
    state: FitState, training: TrainingConfig, pruning: Pruning | None = None
) -> bool:
    """Whether `patience` epochs have passed since the best one, and none is left to prune after."""
    if pruning is not None and len(state.history) < pruning.epoch:
        return False
    return training.patience is not None and (
        len(state.history) - state.best_epoch >= training.patience
    )


def diverged(history: Sequence[dict[str, Any]], classes: int) -> bool:
    """Whether a fit ended with losses far above those of guessing, or with none."""
    limit = DIVERGED * max(1.0, math.log(classes))
    ends = (history[-1]["loss"], history[-1]["validation_loss"])
    return any(not loss <= limit for loss in ends)  # of NaN, too


def _rank(row: dict[str, Any]) -> tuple[float, float]:
    return row["validation_accuracy"], -row["validation_loss"]


def _train_epoch(
    model: TunedClassifier,
    tools: _Tools,
    train: Inputs,
    training: TrainingConfig,
    lr: float,
    epoch: int,
) -> dict[str, Any]:
    model.train()
    seed_all(training.seed, epoch)
    batches = torch.randperm(len(train)).split(training.batch)
    sums = {"loss": 0.0, "hits": 0.0}
    inputs = train.stream(batches, tools.ranks.part)
    for index, rows in enumerate(batches):
        rate = _learning_rate(epoch - 1 + index / len(batches), lr, training.epochs)
        for group in tools.optimizer.param_groups:
            group["lr"] = rate
        # The frozen part belongs to the step, in its precision as in its random numbers.
        with tools.precision.autocast():
            fixed = next(inputs).float()
        labels = train.labels[rows]
        loss, hits = _train_step(model, tools, fixed, labels, training.accumulate)
        tools.average.update(model, (epoch - 1) * len(batches) + index)
        sums["loss"] += loss * len(rows)
        sums["hits"] += hits
    sums = tools.ranks.add(sums)
    return {
        "epoch": epoch,
        "loss": sums["loss"] / len(train),
        "train_accuracy": sums["hits"] / len(train),
        "lr": rate,
        "solver": _merge_figures(tools.ranks.gather(solver_figures(model))),
    }


def _train_step(
    model: TunedClassifier, tools: _Tools, fixed: Tensor, labels: Tensor, accumulate: int
) -> tuple[float, int]:
    """One step on a batch; returns this process's share of its mean loss and of its hits.

    Args:
        fixed: the frozen part's output for this process's part of the batch.
        labels: of the whole batch.
    """
    total = tools.loss.denominator(labels)
    labels = labels[tools.ranks.part(len(labels))]
    tools.optimizer.zero_grad(set_to_none=True)
    loss_sum, hits = 0.0, 0
    parts = zip(fixed.tensor_split(accumulate), labels.tensor_split(accumulate), strict=True)
    for some, truth in parts:
        if len(truth) == 0:
            continue
        with tools.precision.autocast():
            logits = model.tuned(some)
        loss = tools.loss.sum(logits, truth) / total
        tools.precision.backward(loss)
        loss_sum += loss.item()
        hits += int((logits.argmax(1) == truth).sum())
    # From the optimizer: a walk over a frozen backbone's modules takes longer than a small step.
    trained = [p for group in tools.optimizer.param_groups for p in group["params"]]
    tools.ranks.add_gradients(trained)
    tools.precision.unscale(tools.optimizer)
    # Without a bound, one steep batch at the peak rate throws an implicit layer far back.
    torch.nn.utils.clip_grad_norm_(trained, GRADIENT_BOUND)
    tools.precision.step(tools.optimizer)
    return loss_sum, hits


def _trained(model: TunedClassifier) -> list[nn.Parameter]:
    return [p for p in model.parameters() if p.requires_grad]


def _merge_figures(
    figures: Sequence[dict[str, dict[str, float]]],
) -> dict[str, dict[str, float]]:
    """Of several processes: the worst residual, and the mean of the rest."""
    if len(figures) == 1:
        return figures[0]
    merged: dict[str, dict[str, float]] = {}
    for side in figures[0]:
        own = [each[side] for each in figures if side in each]
        merged[side] = {
            name: max(each[name] for each in own)
            if name == "residual"
            else statistics.fmean(each[name] for each in own if name in each)
            for name in own[0]
        }
    return merged


def _learning_rate(epochs_done: float, peak: float, epochs: int) -> float:
    """Linear warm-up over a tenth of the epochs, then half a cosine to zero."""
    warm_up = max(1.0, epochs / 10)
    if epochs_done < warm_up:
        return peak * (epochs_done + 0.1) / (warm_up + 0.1)
    share = (epochs_done - warm_up) / max(1e-9, epochs - warm_up)
    return peak * 0.5 * (1 + math.cos(math.pi * min(1.0, share)))
