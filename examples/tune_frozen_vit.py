"""Tune two implicit prompts around a frozen vision transformer on a few images of digits."""

import torch

from lion_models import Lion, TrainingConfig, fit, load_backbone, make_task, open_source

backbone = load_backbone("tiny-vit")  # frozen; pretrained on pictures of clothes
source = open_source("digits", backbone.channels, backbone.image_size)
task = make_task(source, seed=42, shots=10)  # 10 training and 10 validation images a class

torch.manual_seed(42)
model = Lion(backbone, classes=len(task.classes))
state = fit(model, task, TrainingConfig(epochs=30))

chosen = state.history[state.best_epoch - 1]
steps = {side: round(figures["steps"], 1) for side, figures in chosen["solver"].items()}
print(f"validation accuracy {chosen['validation_accuracy']:.0%} at epoch {state.best_epoch}")
print(f"solver steps per image: {steps}")
