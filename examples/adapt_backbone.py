"""Tune around a network of your own: say where its tokens are, and how they become a feature."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lion_models import FrozenBackbone, Lion, TrainingConfig, fit, make_task, open_source

SIZE, WIDTH = 16, 32


class MyNetwork(nn.Module):
    """A stand-in for yours: patches, two transformer layers, the mean, a head."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(1, WIDTH, kernel_size=4, stride=4)
        layer = nn.TransformerEncoderLayer(WIDTH, 4, 64, dropout=0.0, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.positions = nn.Parameter(torch.zeros(1, (SIZE // 4) ** 2, WIDTH))
        self.head = nn.Linear(WIDTH, 10)

    def tokens(self, images: Tensor) -> Tensor:  # (B, 1, 16, 16) in [0, 1] -> (B, 16, 32)
        patches = self.patches((images - 0.3) / 0.4).flatten(2).transpose(1, 2)
        return patches + self.positions

    def feature(self, tokens: Tensor) -> Tensor:  # (B, 16, 32) -> (B, 32)
        return self.encoder(tokens).mean(1)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.feature(self.tokens(images)))


torch.manual_seed(42)
network = MyNetwork()

# Pretraining: 5000 digits of MNIST.
mnist = open_source("mnist5k", channels=1, size=SIZE)
images, labels = mnist.load(torch.arange(len(mnist))).float() / 255, mnist.labels
optimizer = torch.optim.AdamW(network.parameters(), lr=3e-3)
for _ in range(4):
    for rows in torch.randperm(len(images)).split(64):
        optimizer.zero_grad()
        F.cross_entropy(network(images[rows]), labels[rows]).backward()
        optimizer.step()

backbone = FrozenBackbone(
    network,
    embed=network.tokens,  # normalises the pixels itself
    encode=network.feature,
    name="my-network",
    channels=1,
    image_size=SIZE,
    token_dim=WIDTH,
    feature_dim=WIDTH,
    # For vpt-deep also: blocks=[...], one for each layer, and pool=what follows them.
    # A network without tokens: space="pixel", token_dim=channels, and embed only normalises.
)

# Few-shot on other handwriting: 10 training and 10 validation images a class.
task = make_task(open_source("digits", channels=1, size=SIZE), seed=42, shots=10)
model = Lion(backbone, classes=len(task.classes))
state = fit(model, task, TrainingConfig(epochs=30))
chosen = state.history[state.best_epoch - 1]
print(f"validation accuracy {chosen['validation_accuracy']:.0%} at epoch {state.best_epoch}")
