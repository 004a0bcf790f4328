"""How a picture of any shape becomes a backbone's square, and random crops of training images.

The protocols are those of visual prompt tuning (Jia et al., ECCV 2022, appendix A): VTAB-1k images
are resized to the square and not augmented; the fine-grained sets are resized by their shorter
side to 8/7 of the input (256 for 224), cropped at random and mirrored in training, and cropped in
the middle to be evaluated. Where we differ: the random crop moves inside the middle square of the
resized picture, so that the images of a batch have one shape before they are cropped.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from lion_models.base.errors import choose
from lion_models.data.augment import jitter
from lion_models.data.levels import Levels

__all__ = [
    "TRANSFORMS",
    "Geometry",
    "random_crop",
    "random_flip",
    "random_resized_crop",
    "training_view",
]

TRANSFORMS = ("square", "vtab", "fgvc", "fgvc-resized")
_CROPPED = ("fgvc", "fgvc-resized")
# The share of the area and the aspect ratio of random resized crops, as torchvision's defaults.
AREA = (0.08, 1.0)
ASPECT = (3 / 4, 4 / 3)
LUMINANCE = (0.299, 0.587, 0.114)  # ITU-R 601, as Pillow's conversion to grey
# Pillow averages 2 x 2 pixels or more of what is decoded for each that is shown.
DRAFT_TIMES = 2
LONGEST = 4  # times the shorter side; what a cropped picture has beyond is never shown

View = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Geometry:
    """The input of a backbone, and how pictures are fitted to it.

    Args:
        channels: 1 for grey, 3 for colour, whatever the picture has.
        size: S, height and width in pixels.
        transform: `square` and `vtab` resize to the square whatever the shape; `fgvc` and
            `fgvc-resized` keep the shape, resize the shorter side to 8/7 S and take the middle.
        levels: which values of pictures with more than 8 bits are black and white; None takes 65535
            for whole numbers, and for floats 1 where none is larger, else 255.
        draft: decode a JPEG at a half, a quarter or an eighth of its sides, as long as both are
            twice those of the square or more.
    """

    channels: int
    size: int
    transform: str = "square"
    levels: Levels | None = None
    draft: bool = False

    def __post_init__(self) -> None:
        choose("transform", self.transform, TRANSFORMS)

    @property
    def keeps_shape(self) -> bool:
        """Whether pictures keep their shape, and lose what is outside of the middle square."""
        return self.transform in _CROPPED

    @property
    def training_size(self) -> int:
        """R: S, or 8/7 S where training crops at random."""
        return round(self.size * 8 / 7) if self.transform in _CROPPED else self.size

    @property
    def draft_size(self) -> tuple[int, int] | None:
        """The least width and height that a JPEG is decoded at; None for its own."""
        side = DRAFT_TIMES * self.training_size
        return (side, side) if self.draft else None

    def empty(self, training: bool = False) -> Tensor:
        """No image at all: uint8 (0, C, S, S), or R for S in training."""
        side = self.training_size if training else self.size
        return torch.empty(0, self.channels, side, side, dtype=torch.uint8)

    def picture(self, image: Image.Image, training: bool = False) -> Image.Image:
        """Fit a Pillow image of any mode to S x S, or to R x R for training."""
        if self.transform in _CROPPED:
            image = _without_ends(image)
        resized = self._resized_shape(image.height, image.width)
        if (image.height, image.width) != resized:
            image = image.resize(resized[::-1], Image.Resampling.BILINEAR)
        top, left, side = self._middle(resized, training)
        if (side, side) == resized:
            return image
        return image.crop((left, top, left + side, top + side))

    def arrays(self, images: Tensor, training: bool = False) -> Tensor:
        """Fit images (n, 1 or 3, H, W) with values 0 to 255 to uint8 (n, C, S, S)."""
        height, width = images.shape[2:]
        resized = self._resized_shape(height, width)
        pixels = images
        if (height, width) != resized:
            smaller = resized[0] < height or resized[1] < width
            pixels = F.interpolate(pixels.float(), resized, mode="bilinear", antialias=smaller)
        top, left, side = self._middle(resized, training)
        pixels = pixels[:, :, top : top + side, left : left + side]
        if self.channels == 1 and pixels.shape[1] == 3:
            weights = torch.tensor(LUMINANCE).view(1, 3, 1, 1)
            pixels = (pixels.float() * weights).sum(1, keepdim=True)
        if pixels.dtype != torch.uint8:
            pixels = pixels.round().clamp(0, 255).to(torch.uint8)
        return pixels.expand(-1, self.channels, -1, -1)

    def _resized_shape(self, height: int, width: int) -> tuple[int, int]:
        if self.transform not in _CROPPED:
            return self.size, self.size
        scale = self.training_size / min(height, width)
        return round(height * scale), round(width * scale)

    def _middle(self, shape: tuple[int, int], training: bool) -> tuple[int, int, int]:
        side = self.training_size if training else self.size
        return (shape[0] - side) // 2, (shape[1] - side) // 2, side


def _without_ends(image: Image.Image) -> Image.Image:
    """The middle of a very long picture: its ends are never shown, and resized they are huge."""
    width, height = image.size
    most = LONGEST * min(width, height)
    if max(width, height) <= most:
        return image
    left, top = max(0, (width - most) // 2), max(0, (height - most) // 2)
    return image.crop((left, top, left + min(width, most), top + min(height, most)))


def random_crop(images: Tensor, size: int) -> Tensor:
    """Cut a square out of each image at a random place: (B, C, H, W) -> (B, C, size, size)."""
    batch, _, height, width = images.shape
    device = images.device
    steps = torch.arange(size, device=device)
    top = torch.randint(height - size + 1, (batch, 1), device=device) + steps
    left = torch.randint(width - size + 1, (batch, 1), device=device) + steps
    index = torch.arange(batch, device=device).view(-1, 1, 1)
    # Advanced indices around the slice put the channels last.
    return images[index, :, top[:, :, None], left[:, None, :]].permute(0, 3, 1, 2).contiguous()


def random_resized_crop(images: Tensor, size: int) -> Tensor:
    """Cut a random share of each image and resize it: float (B, C, H, W) -> (B, C, size, size).

    The share of the area is uniform in 0.08 to 1, the logarithm of the aspect ratio uniform
    between those of 3/4 and 4/3. A side that would be longer than the image is shortened to it
    (Inception-style code draws again instead).
    """
    device, batch = images.device, len(images)
    area = torch.empty(batch, device=device).uniform_(*AREA)
    low, high = torch.tensor(ASPECT).log().tolist()
    aspect = torch.empty(batch, device=device).uniform_(low, high).exp()
    wide = (area * aspect).sqrt().clamp(max=1)
    tall = (area / aspect).sqrt().clamp(max=1)
    across = (2 * torch.rand(batch, device=device) - 1) * (1 - wide)
    down = (2 * torch.rand(batch, device=device) - 1) * (1 - tall)
    zero = torch.zeros_like(area)
    rows = [torch.stack([wide, zero, across], dim=1), torch.stack([zero, tall, down], dim=1)]
    shape = [batch, images.shape[1], size, size]
    grid = F.affine_grid(torch.stack(rows, dim=1), shape, align_corners=False)
    return F.grid_sample(images, grid, padding_mode="border", align_corners=False)


def random_flip(images: Tensor) -> Tensor:
    """Mirror each image left to right with probability one half."""
    mirrored = torch.rand(len(images), 1, 1, 1, device=images.device) < 0.5
    return torch.where(mirrored, images.flip(3), images)


def training_view(transform: str, augment: str, size: int) -> View | None:
    """The random map from loaded training images to a backbone's input; None where it is fixed.

    Args:
        transform: see `Geometry`; `fgvc` crops and mirrors, `fgvc-resized` cuts a random share
            instead of a fixed square.
        augment: `affine` adds `jitter` after it.
        size: S.

    Returns:
        A function of float images (B, C, R, R) in [0, 1] to (B, C, S, S), which draws from torch's
        global generator.
    """
    if transform not in _CROPPED and augment == "none":
        return None
    cut = {"fgvc": random_crop, "fgvc-resized": random_resized_crop}.get(transform)
    side = Geometry(1, size, transform).training_size

    def view(images: Tensor) -> Tensor:
        if tuple(images.shape[2:]) != (side, side):
            raise ValueError(
                f"`transform` {transform}: expected training images of {side} x {side}, got "
                f"{tuple(images.shape)}; take them with Source.load(rows, training=True)"
            )
        if cut is not None:
            images = random_flip(cut(images, size))
        return jitter(images) if augment == "affine" else images

    return view
