"""The one trainer that every method goes through."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lion_models.classifier import (
    TunedClassifier,
    count_parameters,
    load_trained,
    trained_state,
)
from lion_models.data import Task, training_view
from lion_models.data.lazy import Images
from lion_models.data.transforms import View
from lion_models.lion import Lion
from lion_models.pruning import prune_and_rebuild
from lion_models.seeding import seed_all
from lion_models.training.config import RunConfig
from lion_models.training.optimizer import make_optimizer

__all__ = ["FitState", "fit", "freeze_images", "score", "solver_figures"]

CACHE_LIMIT_BYTES = 2**30
GRADIENT_BOUND = 1.0


@dataclass
class FitState:
    """What a fit has reached; enough to go on from.

    Attributes:
        history: one row per finished epoch, as written to metrics.jsonl.
        best_epoch: the epoch that validation chose (1 is the first), 0 before any.
        best: its trained parameters.
        weights: the current trained parameters.
        optimizer: the optimizer's state dict.
    """

    history: list[dict[str, Any]] = field(default_factory=list)
    best_epoch: int = 0
    best: dict[str, Tensor] = field(default_factory=dict)
    weights: dict[str, Tensor] = field(default_factory=dict)
    optimizer: dict[str, Any] = field(default_factory=dict)


def freeze_images(model: TunedClassifier, images: Images) -> Tensor:
    """The frozen part's output for uint8 images (n, C, S, S), in batches."""
    device = model.head.weight.device
    batches = images.split(model.backbone.evaluation_batch)
    return torch.cat([model.frozen(batch.to(device).float() / 255) for batch in batches])


class _Inputs:
    """Training or validation inputs: outputs of the frozen part.

    They are computed once and kept where they fit in memory, unless a random view of the images
    is taken each time.
    """

    def __init__(
        self, model: TunedClassifier, images: Images, labels: Tensor, view: View | None = None
    ) -> None:
        self.labels = labels.to(model.head.weight.device)
        self._model, self._images, self._view = model, images, view
        self._cache: Tensor | None = None
        if view is not None:
            return
        one = freeze_images(model, images[:1])
        fits = one.numel() * one.element_size() * len(images) <= CACHE_LIMIT_BYTES
        self._cache = freeze_images(model, images) if fits else None

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, rows: Tensor) -> Tensor:
        if self._cache is not None:
            return self._cache[rows]
        images = self._images[rows.cpu()]
        if self._view is None:
            return freeze_images(self._model, images)
        return self._model.frozen(self._view(images.to(self.labels.device).float() / 255))


def solver_figures(model: TunedClassifier) -> dict[str, dict[str, float]]:
    """Per implicit layer: steps, worst residual and converged share of its last forward solve.

    `backward_steps` is there once a backward pass has run through the layer.
    """
    figures: dict[str, dict[str, float]] = {}
    if not isinstance(model, Lion):
        return figures
    for side, prompt in model.prompts.items():
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
def score(model: TunedClassifier, fixed: Tensor, labels: Tensor) -> dict[str, float]:
    """Sums over a set of inputs: correct answers, cross-entropy, and solver steps per layer.

    Args:
        model: put into eval mode.
        fixed: outputs of the model's frozen part, (n, ...).
        labels: int64 (n,).
    """
    model.eval()
    sums: dict[str, float] = {"accuracy": 0.0, "loss": 0.0}
    size = model.backbone.evaluation_batch
    batches = zip(fixed.split(size), labels.split(size), strict=True)
    for batch, truth in batches:
        logits = model.tuned(batch)
        sums["accuracy"] += float((logits.argmax(1) == truth).sum())
        sums["loss"] += float(F.cross_entropy(logits, truth, reduction="sum"))
        for side, figures in solver_figures(model).items():
            key = f"steps_{side}"
            sums[key] = sums.get(key, 0.0) + figures["steps"] * len(truth)
    return sums


def fit(
    model: TunedClassifier,
    task: Task,
    config: RunConfig,
    state: FitState | None = None,
    on_epoch: Callable[[FitState], None] = lambda state: None,
) -> FitState:
    """Train a model and leave it with the weights that validation chose.

    The best epoch has the highest validation accuracy, the lower validation loss deciding ties;
    where the run prunes, it is one of those measured pruned.

    Args:
        model: freshly built from `config.seed`; its device is used.
        task: training and validation images.
        config: budget, optimizer and seed.
        state: of an interrupted fit, to continue it.
        on_epoch: called after every epoch with the state so far.
    """
    steps = math.ceil(len(task.train_labels) / config.batch)
    if state is None:
        state = FitState()
        optimizer = make_optimizer(model, config, steps)
    else:
        load_trained(model, state.weights)  # pruned or not, which decides the optimizer
        optimizer = make_optimizer(model, config, steps)
        optimizer.load_state_dict(state.optimizer)
    size = model.backbone.image_size
    view = training_view(config.transform, config.recipe.augment, size)
    train = _Inputs(model, task.train_images, task.train_labels, view)
    validation = _Inputs(model, task.validation_images, task.validation_labels)
    validation_fixed = validation.take(torch.arange(len(validation)))

    for epoch in range(len(state.history) + 1, config.epochs + 1):
        start = time.perf_counter()
        row = _train_epoch(model, optimizer, train, config, epoch)
        if epoch == config.prune_epoch:
            optimizer = prune_and_rebuild(
                model, optimizer, config.sparsity, lambda: make_optimizer(model, config, steps)
            )
        if config.prune_epoch is not None:
            row["kept"] = count_parameters(model).kept
        sums = score(model, validation_fixed, validation.labels)
        row["validation_accuracy"] = sums["accuracy"] / len(validation)
        row["validation_loss"] = sums["loss"] / len(validation)
        row["seconds"] = time.perf_counter() - start
        eligible = config.prune_epoch is None or epoch >= config.prune_epoch
        better = state.best_epoch == 0 or _rank(row) > _rank(state.history[state.best_epoch - 1])
        if eligible and better:
            state.best_epoch, state.best = epoch, trained_state(model)
        state.history.append(row)
        state.weights, state.optimizer = trained_state(model), optimizer.state_dict()
        on_epoch(state)

    load_trained(model, state.best)
    model.eval()
    return state


def _rank(row: dict[str, Any]) -> tuple[float, float]:
    return row["validation_accuracy"], -row["validation_loss"]


def _train_epoch(
    model: TunedClassifier,
    optimizer: torch.optim.Optimizer,
    train: _Inputs,
    config: RunConfig,
    epoch: int,
) -> dict[str, Any]:
    model.train()
    seed_all(config.seed, epoch)
    batches = torch.randperm(len(train)).split(config.batch)
    loss_sum, hits = 0.0, 0
    for index, rows in enumerate(batches):
        rate = _learning_rate(epoch - 1 + index / len(batches), config)
        for group in optimizer.param_groups:
            group["lr"] = rate
        labels = train.labels[rows]
        logits = model.tuned(train.take(rows))
        loss = F.cross_entropy(logits, labels)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        # Without a bound, one steep batch at the peak rate throws an implicit layer far back.
        torch.nn.utils.clip_grad_norm_(model.parameters(), GRADIENT_BOUND)
        optimizer.step()
        loss_sum += loss.item() * len(rows)
        hits += int((logits.argmax(1) == labels).sum())
    return {
        "epoch": epoch,
        "loss": loss_sum / len(train),
        "train_accuracy": hits / len(train),
        "lr": rate,
        "solver": solver_figures(model),
    }


def _learning_rate(epochs_done: float, config: RunConfig) -> float:
    """Linear warm-up over a tenth of the epochs, then half a cosine to zero."""
    base, warm_up = config.recipe.lr, max(1.0, config.epochs / 10)
    if epochs_done < warm_up:
        return base * (epochs_done + 0.1) / (warm_up + 0.1)
    share = (epochs_done - warm_up) / max(1e-9, config.epochs - warm_up)
    return base * 0.5 * (1 + math.cos(math.pi * min(1.0, share)))
