"""What goes into the trained part of a model: outputs of its frozen part, kept where they fit."""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from lion_models.data.loader import Images, in_batches
from lion_models.data.transforms import View
from lion_models.methods.base import TunedClassifier

__all__ = ["FeatureCache", "Inputs", "freeze_images"]

CACHE_LIMIT_BYTES = 2**30


def freeze_images(model: TunedClassifier, images: Images) -> Tensor:
    """The frozen part's output for uint8 images (n, C, S, S), in batches."""
    device = model.head.weight.device
    batches = images.split(model.backbone.evaluation_batch)
    return torch.cat([model.frozen(batch.to(device).float() / 255) for batch in batches])


class FeatureCache:
    """Outputs of frozen parts that several runs of one process share.

    A frozen part is known by what it gives for an image of noise, so that methods with the same
    frozen part share its outputs whatever they call it.

    Args:
        limit: bytes to keep; the least recently used outputs go first.
    """

    def __init__(self, limit: int = CACHE_LIMIT_BYTES) -> None:
        self._limit = limit
        self._kept: OrderedDict[str, Tensor] = OrderedDict()

    def outputs(self, model: TunedClassifier, images: Images) -> Tensor:
        """`freeze_images(model, images)`, computed or remembered.

        Args:
            model: whose frozen part.
            images: uint8 (n, C, S, S).
        """
        # Of no image of the data: a black one, say, hides how wide a method's frame is.
        generator = torch.Generator().manual_seed(0)
        noise = torch.randint(256, images[:1].shape, generator=generator, dtype=torch.uint8)
        answer = freeze_images(model, noise)
        digest = hashlib.sha256(f"{model.backbone.fingerprint} {answer.shape}".encode())
        digest.update(_content(images) if isinstance(images, Tensor) else images.key)
        digest.update(_content(answer))
        key = digest.hexdigest()
        if key not in self._kept:
            self._kept[key] = freeze_images(model, images)
        self._kept.move_to_end(key)
        while len(self._kept) > 1 and sum(map(_bytes, self._kept.values())) > self._limit:
            self._kept.popitem(last=False)
        return self._kept[key]


class Inputs:
    """Training or validation inputs: outputs of the frozen part.

    They are computed once and kept where they fit in memory, unless a random view of the images
    is taken each time.

    Args:
        model: whose frozen part.
        images: uint8 (n, C, S, S).
        labels: int64 (n,).
        view: of the images, in [0, 1], each time that they are taken; None: always the same.
        features: keeps the outputs for other runs too; None computes them for this one.
    """

    def __init__(
        self,
        model: TunedClassifier,
        images: Images,
        labels: Tensor,
        view: View | None = None,
        features: FeatureCache | None = None,
    ) -> None:
        self.labels = labels.to(model.head.weight.device)
        self._model, self._images, self._view = model, images, view
        self._cache: Tensor | None = None
        if view is not None:
            return
        first = freeze_images(model, images[:1])
        if _bytes(first) * len(images) > CACHE_LIMIT_BYTES:
            return
        if features is None:
            self._cache = freeze_images(model, images)
        else:
            self._cache = features.outputs(model, images)

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, rows: Tensor, part: slice = slice(None)) -> Tensor:
        """Outputs for `rows[part]` of one batch; see `stream`."""
        [outputs] = self.stream([rows], lambda count: part)
        return outputs

    def stream(
        self, batches: Sequence[Tensor], part_of: Callable[[int], slice]
    ) -> Iterator[Tensor]:
        """Outputs for this process's part of each batch, computed when it is taken.

        Images of the batches ahead are decoded meanwhile, if there are workers. The random numbers
        that are drawn are those of whole batches.

        Args:
            batches: int64 (n,) each.
            part_of: the part of a batch of n rows that this process works on.
        """
        slices = [part_of(len(rows)) for rows in batches]
        parts = [rows[part] for rows, part in zip(batches, slices, strict=True)]
        if self._cache is not None:
            yield from (self._cache[rows] for rows in parts)
            return
        taken = in_batches(self._images, [rows.cpu() for rows in parts])
        for rows, part, images in zip(batches, slices, taken, strict=True):
            if self._view is None:
                yield freeze_images(self._model, images)
            else:
                own = images.to(self.labels.device).float() / 255
                # A view of the others costs less than decoding them.
                pixels = own.new_zeros((len(rows), *own.shape[1:]))
                pixels[part] = own
                yield self._model.frozen(self._view(pixels)[part])


def _content(tensor: Tensor) -> memoryview:
    return tensor.cpu().contiguous().view(torch.uint8).numpy().data


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()
