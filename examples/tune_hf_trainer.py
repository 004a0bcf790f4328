"""LION in Hugging Face's Trainer: `pip install 'deqcore[lion]' transformers accelerate`."""

import tempfile
from pathlib import Path

import torch
from transformers import EvalPrediction, Trainer, TrainingArguments

from lion_models import LionConfig, TunedModel, make_task, open_source, tune

torch.manual_seed(42)
source = open_source("digits", channels=1, size=28)
task = make_task(source, seed=42, shots=10)
images, labels = task.train_images[:].float() / 255, task.train_labels
validation_images, truth = task.validation_images[:].float() / 255, task.validation_labels


def rows(images: torch.Tensor, labels: torch.Tensor) -> list[dict[str, torch.Tensor]]:
    # A processor of Hugging Face's normalises unless it has do_normalize=False; what it gives then
    # needs tune(..., pixels="normalised").
    return [
        {"pixel_values": image, "labels": label}
        for image, label in zip(images, labels, strict=True)
    ]


def accuracy_of(answer: EvalPrediction) -> dict[str, float]:
    return {"accuracy": float((answer.predictions.argmax(1) == answer.label_ids).mean())}


# Its checkpoints have what is trained alone, as the backbone does not change.
model = tune("tiny-vit", LionConfig(hidden=8), task.classes, trained_state_only=True)
with tempfile.TemporaryDirectory() as folder:
    arguments = TrainingArguments(
        output_dir=folder,
        num_train_epochs=10,
        per_device_train_batch_size=32,
        per_device_eval_batch_size=100,
        learning_rate=0.01,
        eval_strategy="epoch",
        save_strategy="epoch",
        save_total_limit=1,
        load_best_model_at_end=True,
        metric_for_best_model="accuracy",
        report_to="none",
        disable_tqdm=True,
        use_cpu=not torch.cuda.is_available(),
    )
    trainer = Trainer(
        model,
        arguments,
        train_dataset=rows(images, labels),
        eval_dataset=rows(validation_images, truth),
        compute_metrics=accuracy_of,
    )
    trainer.train()
    accuracy = trainer.evaluate()["eval_accuracy"]
    best = Path(trainer.state.best_model_checkpoint, "model.safetensors")
    checkpoint_bytes = best.stat().st_size
    print(f"validation accuracy {accuracy:.0%}, checkpoints of {checkpoint_bytes:,} bytes")

    model.save_pretrained(f"{folder}/lion")
    loaded = TunedModel.from_pretrained(f"{folder}/lion")
