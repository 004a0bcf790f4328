"""LION in a training loop of your own: `tune` gives a module, and trains nothing itself."""

import tempfile

import torch
import torch.nn.functional as F

from lion_models import LionConfig, TunedModel, make_task, open_source, tune

torch.manual_seed(42)
source = open_source("digits", channels=1, size=28)
task = make_task(source, seed=42, shots=10)
images, labels = task.train_images[:].float() / 255, task.train_labels
validation_images, truth = task.validation_images[:].float() / 255, task.validation_labels

model = tune("tiny-vit", LionConfig(hidden=8), task.classes)
optimizer = torch.optim.AdamW(model.trainable_parameters(), lr=0.01)
for _ in range(10):
    model.train()  # the frozen backbone stays in eval mode
    for rows in torch.randperm(len(images)).split(32):
        optimizer.zero_grad()
        F.cross_entropy(model(images[rows]), labels[rows]).backward()
        optimizer.step()

model.eval()
with torch.no_grad():
    accuracy = (model(validation_images).argmax(1) == truth).double().mean().item()
print(f"validation accuracy {accuracy:.0%}, {model.count().trained:,} weights trained")

with tempfile.TemporaryDirectory() as folder:
    model.save_pretrained(folder)  # what was trained, and what it is; nothing of the backbone
    loaded = TunedModel.from_pretrained(folder)
