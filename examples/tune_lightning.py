"""LION in a LightningModule: `pip install 'deqcore[lion]' lightning`."""

import tempfile

import lightning
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from lion_models import LionConfig, TunedModel, make_task, open_source, tune

lightning.seed_everything(42)
source = open_source("digits", channels=1, size=28)
task = make_task(source, seed=42, shots=10)
images, labels = task.train_images[:].float() / 255, task.train_labels
validation_images, truth = task.validation_images[:].float() / 255, task.validation_labels


class Classifier(lightning.LightningModule):
    def __init__(self, model: TunedModel) -> None:
        super().__init__()
        self.model = model

    def training_step(self, batch: list[Tensor], index: int) -> Tensor:
        pixels, target = batch
        return F.cross_entropy(self.model(pixels), target)

    def validation_step(self, batch: list[Tensor], index: int) -> None:
        pixels, target = batch
        hits = self.model(pixels).argmax(1) == target
        self.log("accuracy", hits.float().mean())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.model.trainable_parameters(), lr=0.01)


# Lightning's checkpoints have what is trained alone, as the backbone does not change.
model = tune("tiny-vit", LionConfig(hidden=8), task.classes, trained_state_only=True)
with tempfile.TemporaryDirectory() as folder:
    trainer = lightning.Trainer(
        max_epochs=10,
        default_root_dir=folder,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        log_every_n_steps=1,
    )
    trainer.fit(
        Classifier(model),
        DataLoader(TensorDataset(images, labels), batch_size=32, shuffle=True),
        DataLoader(TensorDataset(validation_images, truth), batch_size=100),
    )
    accuracy = trainer.callback_metrics["accuracy"].item()
    print(f"validation accuracy {accuracy:.0%}")

    model.save_pretrained(f"{folder}/lion")
    loaded = TunedModel.from_pretrained(f"{folder}/lion")
