"""Train the embedded tiny ViT on Fashion-MNIST: `python tools/pretrain_tiny_vit.py --help`.

The data is Debian's package `dataset-fashion-mnist` (MIT licence); no root is needed:

    apt-get download dataset-fashion-mnist && dpkg-deb -x dataset-fashion-mnist_*.deb fashion
    python tools/pretrain_tiny_vit.py --data fashion/usr/share/datasets/fashion-mnist

5,000 of the 60,000 training images are the validation set and choose the epoch; the 10,000 test
images are read once, at the end. Everything is seeded, and an interrupted run continues from its
state file with the same result on the same machine and number of threads.

The loss is that of the class plus that of a linear decoder which redraws the picture from the
class token. Without the second, the feature forgets all that does not tell clothes apart, and a
linear probe on other pictures is worse than on their pixels. The decoder is dropped afterwards.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from lion_models.backbones.tiny_vit import save_vit
from lion_models.backbones.vit import VisionTransformer, ViTConfig
from lion_models.base.files import replacing
from lion_models.data.idx import read_idx_pair

VALIDATION_IMAGES = 5000
WARM_UP_EPOCHS = 3
CLASSES = (
    "t-shirt",
    "trouser",
    "pullover",
    "dress",
    "coat",
    "sandal",
    "shirt",
    "sneaker",
    "bag",
    "ankle boot",
)


def augment(images: Tensor, generator: torch.Generator) -> Tensor:
    """Random flip, affine map, outline and erasing: (B, 1, S, S) in [0, 1] -> the same.

    The outline (gradient magnitude, one image in four) shows the backbone strokes on a dark
    ground, which clothes alone never do.
    """
    batch, _, size, _ = images.shape

    def uniform(low: float, high: float) -> Tensor:
        return torch.empty(batch).uniform_(low, high, generator=generator)

    angle = uniform(-math.pi / 12, math.pi / 12)
    scale_x, scale_y = uniform(0.8, 1.25), uniform(0.8, 1.25)
    flip = torch.where(uniform(0, 1) < 0.5, -1.0, 1.0)
    shear, shift_x, shift_y = uniform(-0.15, 0.15), uniform(-0.2, 0.2), uniform(-0.2, 0.2)
    cos, sin = angle.cos(), angle.sin()
    theta = torch.stack(
        [
            torch.stack([flip * scale_x * cos, scale_x * (shear - sin), shift_x], dim=1),
            torch.stack([flip * scale_y * sin, scale_y * cos, shift_y], dim=1),
        ],
        dim=1,
    )
    grid = F.affine_grid(theta, list(images.shape), align_corners=False)
    images = F.grid_sample(images, grid, align_corners=False)

    padded = F.pad(images, (1, 1, 1, 1), mode="replicate")
    slope_x = padded[:, :, 1:-1, 2:] - padded[:, :, 1:-1, :-2]
    slope_y = padded[:, :, 2:, 1:-1] - padded[:, :, :-2, 1:-1]
    outline = (slope_x.square() + slope_y.square()).sqrt().clamp(max=1.0)
    images = torch.where((uniform(0, 1) < 0.25).view(-1, 1, 1, 1), outline, images)

    pixel = torch.arange(size)
    left, top = uniform(0, size).view(-1, 1), uniform(0, size).view(-1, 1)
    width, height = uniform(4, 12).view(-1, 1), uniform(4, 12).view(-1, 1)
    columns = (pixel >= left) & (pixel < left + width)
    rows = (pixel >= top) & (pixel < top + height)
    erased = rows[:, :, None] & columns[:, None, :] & (uniform(0, 1) < 0.25)[:, None, None]
    return images.masked_fill(erased[:, None], 0.0)


def learning_rate(step: int, warm_up: int, total: int, base: float) -> float:
    """Linear warm-up, then half a cosine down to zero."""
    if step < warm_up:
        return base * (step + 1) / warm_up
    return base * 0.5 * (1 + math.cos(math.pi * (step - warm_up) / (total - warm_up)))


@torch.no_grad()
def accuracy(model: VisionTransformer, images: Tensor, labels: Tensor) -> float:
    """Share of uint8 images (n, C, S, S) that the model with its head gets right."""
    model.eval()
    hits = sum(
        int((model(batch.float() / 255).argmax(1) == truth).sum())
        for batch, truth in zip(images.split(500), labels.split(500), strict=True)
    )
    return hits / len(labels)


def train_epoch(
    model: VisionTransformer,
    decoder: nn.Linear,
    optimizer: torch.optim.Optimizer,
    images: Tensor,
    labels: Tensor,
    epoch: int,
    args: argparse.Namespace,
) -> float:
    """One pass over the shuffled training images; returns the mean loss."""
    model.train()
    # A generator of the epoch alone: a resumed run draws what an uninterrupted one would.
    generator = torch.Generator().manual_seed(args.seed * 1000 + epoch)
    batches = torch.randperm(len(images), generator=generator).split(args.batch)
    total = 0.0
    bar = tqdm(batches, desc=f"epoch {epoch + 1}/{args.epochs}", leave=False, mininterval=2)
    for index, rows in enumerate(bar):
        step = epoch * len(batches) + index
        warm_up = min(WARM_UP_EPOCHS, args.epochs) * len(batches)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, warm_up, args.epochs * len(batches) + 1, args.lr)
        views = augment(images[rows].float() / 255, generator)
        feature = model.encode(model.embed(views))
        loss = F.cross_entropy(model.head(feature), labels[rows], label_smoothing=0.1)
        loss = loss + args.reconstruction * F.mse_loss(decoder(feature), views.flatten(1))
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        total += loss.item() * len(rows)
        bar.set_postfix(loss=f"{loss.item():.3f}")
    return total / len(images)


def make_optimizer(modules: nn.Module, args: argparse.Namespace) -> torch.optim.Optimizer:
    """AdamW with weight decay on matrices alone."""
    matrices = [p for p in modules.parameters() if p.dim() == 2]
    others = [p for p in modules.parameters() if p.dim() != 2]
    groups: list[dict[str, Any]] = [{"params": matrices}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=args.lr, weight_decay=args.weight_decay)


def parse_args() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python tools/pretrain_tiny_vit.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--data", type=Path, default=Path("/usr/share/datasets/fashion-mnist"))
    parser.add_argument("--out", type=Path, default=Path("runs/pretrain"))
    parser.add_argument("--epochs", type=int, default=15)
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--weight-decay", type=float, default=0.05)
    parser.add_argument(
        "--reconstruction",
        type=float,
        default=100.0,
        help="weight of the mean squared error per pixel (default 100)",
    )
    parser.add_argument("--patch-size", type=int, default=7)
    parser.add_argument("--seed", type=int, default=42)
    parser.add_argument("--threads", type=int, default=1)
    return parser.parse_args()


def main() -> None:
    """Train, choose the epoch by validation, test once, and write the weights."""
    args = parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    images, labels = read_idx_pair(args.data, "train")
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(args.seed))
    held_out, kept = order[:VALIDATION_IMAGES], order[VALIDATION_IMAGES:]
    pixels = images[kept].float() / 255
    config = ViTConfig(
        patch_size=args.patch_size,
        classes=len(CLASSES),
        pixel_mean=round(pixels.mean().item(), 4),
        pixel_std=round(pixels.std().item(), 4),
    )
    del pixels
    model = VisionTransformer(config)
    decoder = nn.Linear(config.dim, config.channels * config.image_size**2)
    optimizer = make_optimizer(nn.ModuleList([model, decoder]), args)

    args.out.mkdir(parents=True, exist_ok=True)
    state_path, log_path = args.out / "state.pt", args.out / "log.jsonl"
    history: list[dict[str, Any]] = []
    best: dict[str, Tensor] = {}
    if state_path.exists():
        state = torch.load(state_path, weights_only=True)
        model.load_state_dict(state["model"])
        decoder.load_state_dict(state["decoder"])
        optimizer.load_state_dict(state["optimizer"])
        history, best = state["history"], state["best"]
        print(f"continues after epoch {len(history)}")

    for epoch in range(len(history), args.epochs):
        start = time.perf_counter()
        loss = train_epoch(model, decoder, optimizer, images[kept], labels[kept], epoch, args)
        score = accuracy(model, images[held_out], labels[held_out])
        if score > max((row["validation_accuracy"] for row in history), default=0.0):
            best = {name: value.clone() for name, value in model.state_dict().items()}
        history.append(
            {
                "epoch": epoch + 1,
                "train_loss": round(loss, 5),
                "validation_accuracy": score,
                "seconds": round(time.perf_counter() - start, 1),
            }
        )
        print(json.dumps(history[-1]), flush=True)
        log_path.write_text("".join(json.dumps(row) + "\n" for row in history))
        state = {
            "model": model.state_dict(),
            "decoder": decoder.state_dict(),
            "optimizer": optimizer.state_dict(),
            "history": history,
            "best": best,
        }
        with replacing(state_path) as file:
            torch.save(state, file)

    model.load_state_dict(best)
    chosen = max(history, key=lambda row: row["validation_accuracy"])
    test_accuracy = accuracy(model, *read_idx_pair(args.data, "t10k"))
    training = {
        "data": "Fashion-MNIST, 55000 train / 5000 validation / 10000 test",
        "options": {
            k: str(v) if isinstance(v, Path) else v
            for k, v in vars(args).items()
            if k not in ("data", "out")
        },
        "chosen_epoch": chosen["epoch"],
        "validation_accuracy": chosen["validation_accuracy"],
        "test_accuracy": test_accuracy,
        "seconds": round(sum(row["seconds"] for row in history)),
        "torch": torch.__version__,
    }
    save_vit(model, args.out / "tiny_vit_fashion_mnist.safetensors", training, CLASSES)
    with log_path.open("a") as log:
        log.write(json.dumps(training) + "\n")
    print(json.dumps(training, indent=2))


if __name__ == "__main__":
    main()
