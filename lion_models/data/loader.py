"""Decoded images: kept up to one limit, and decoded ahead of their use by worker processes.

What comes out is the same for any limit and any number of workers, and so are the random numbers
that training draws: both only decide when an image is decoded, and how often.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from lion_models.base.errors import UserError
from lion_models.data.base import Source

__all__ = ["IMAGE_CACHE", "ImageCache", "Images", "SourceImages", "in_batches"]

IMAGE_CACHE = 4.0  # GiB
# What a worker decodes at a time: few enough that workers share a batch, and that what they hold
# ready (two pieces each, 4.6 MiB with pictures of 224 pixels) fits a container's shared memory.
PIECE = 32

_numbers = itertools.count()


class ImageCache:
    """Decodes images of any number of sources and keeps them as far as they fit.

    Images that are kept stay, so that every pass over too many finds its share of them. Those of
    another source make room where it is needed, longest unused first.

    Args:
        limit: GiB of decoded images to keep.
        workers: processes that decode ahead; 0 decodes in this one, when a batch is taken.

    Raises:
        UserError: one of them is below 0.
    """

    def __init__(self, limit: float = IMAGE_CACHE, workers: int = 0) -> None:
        for name, value in (("image_cache", limit), ("workers", workers)):
            if not value >= 0:
                raise UserError(f"`{name}`: expected 0 or more, got {value}")
        self.workers = workers
        self.limit = int(limit * 2**30)  # bytes
        self._shelves: dict[tuple[int, bool], _Shelf] = {}

    def images(self, source: Source, rows: Tensor, training: bool = False) -> SourceImages:
        """Some images of a source, each decoded when it is first used.

        Args:
            source: where they are.
            rows: int64 (n,).
            training: with the margin that random crops move in; see `Source.load`.
        """
        key = id(source), training  # no other source has the id, as the shelf holds this one
        shelf = self._shelves.pop(key, None) or _Shelf(self, source, training)
        self._shelves[key] = shelf  # behind all that are longer unused
        return SourceImages(shelf, rows)

    def room(self, source: Source, wanted: int) -> int:
        """Make room for `wanted` bytes of a source's images; how many there is room for."""
        free = self.limit - sum(shelf.nbytes for shelf in self._shelves.values())
        for shelf in self._shelves.values():
            if free < wanted and shelf.source is not source:
                free += shelf.nbytes
                shelf.clear()
        return min(wanted, free)


class SourceImages:
    """Images of a source, indexed as a tensor uint8 (n, C, S, S) is along its first dimension.

    Attributes:
        key: tells these images from any others of this process.
    """

    def __init__(self, shelf: _Shelf, rows: Tensor) -> None:
        self._shelf, self._rows = shelf, rows
        self.key = f"{shelf.number}:".encode() + rows.numpy().tobytes()

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: slice | Tensor) -> Tensor:
        return next(self._shelf.batches([self._rows[index]]))

    def split(self, size: int) -> Iterator[Tensor]:
        """Batches of `size` images in order; workers decode ahead of the one that is taken."""
        return self._shelf.batches(self._rows.split(size))

    def batches(self, parts: Sequence[Tensor]) -> Iterator[Tensor]:
        """The images of each part, int64 (n,), as `split` gives them."""
        return self._shelf.batches([self._rows[part] for part in parts])


Images = Tensor | SourceImages


def in_batches(images: Images, parts: Sequence[Tensor]) -> Iterator[Tensor]:
    """`images[part]` of each part; workers decode ahead of the one that is taken."""
    if isinstance(images, Tensor):
        return (images[part] for part in parts)
    return images.batches(parts)


class _Shelf:
    """What is kept of a source's images of one kind: as evaluated, or with training's margin.

    Attributes:
        source: decodes them.
        number: no other shelf of the process has it.
        nbytes: of the images that are kept.
    """

    def __init__(self, cache: ImageCache, source: Source, training: bool) -> None:
        self.source, self.number = source, next(_numbers)
        self._cache, self._training = cache, training
        self.clear()

    def clear(self) -> None:
        self.nbytes = self._count = 0
        self._kept = torch.empty(0)
        self._slots = torch.full((len(self.source),), -1)  # of each row in `_kept`

    def batches(self, parts: Sequence[Tensor]) -> Iterator[Tensor]:
        """The images of each part of the source's rows, in order."""
        known = [self._slots[rows] >= 0 for rows in parts]
        missing = [rows[~have] for rows, have in zip(parts, known, strict=True)]
        pieces = [piece for rows in missing for piece in rows.split(PIECE) if len(piece)]
        decoded = self._decode(pieces)
        for rows, have, lacking in zip(parts, known, missing, strict=True):
            fresh = list(itertools.islice(decoded, -(-len(lacking) // PIECE)))
            slots = self._slots[rows[have]]
            if len(rows) == 0 or (slots < 0).any():
                # No image, or what was kept has made room for others meanwhile.
                images = self.source.load(rows, self._training)
            elif not fresh:
                images = self._kept[slots]
            else:
                images = torch.cat(fresh)
                if len(slots):
                    images = images.new_empty((len(rows), *images.shape[1:]))
                    images[have], images[~have] = self._kept[slots], torch.cat(fresh)
                self._keep(rows, images)
            yield images

    def _decode(self, pieces: Sequence[Tensor]) -> Iterator[Tensor]:
        workers = min(self._cache.workers, len(pieces))
        if workers == 0 or len(pieces) < 2:
            yield from (self.source.load(piece, self._training) for piece in pieces)
            return
        loader: DataLoader[Tensor | UserError] = DataLoader(
            _Rows(self.source, self._training),
            batch_size=None,
            sampler=[piece.tolist() for piece in pieces],
            num_workers=workers,
            # Of its own: a pass draws a seed for the workers, which must not be training's.
            generator=torch.Generator(),
        )
        try:
            for answer in loader:
                if isinstance(answer, UserError):
                    raise answer
                yield answer
        except RuntimeError as error:
            if "DataLoader worker (pid" not in str(error):
                raise
            raise UserError(
                f"`workers`: a process that decodes images has ended ({error}); was it killed, or "
                "out of memory? Try fewer workers, or none"
            ) from error

    def _keep(self, rows: Tensor, images: Tensor) -> None:
        new = self._slots[rows] < 0
        rows, images = rows[new], images[new]
        size = images[:1].nbytes
        if not 0 < size <= self._cache.limit:
            return
        if self._count == 0:  # the system gives memory when it is written to
            most = min(len(self.source), self._cache.limit // size)
            self._kept = images.new_empty((most, *images.shape[1:]))
        count = min(len(images), len(self._kept) - self._count)
        count = self._cache.room(self.source, count * size) // size
        end = self._count + count
        self._kept[self._count : end] = images[:count]
        self._slots[rows[:count]] = torch.arange(self._count, end)
        self._count, self.nbytes = end, end * size


class _Rows(Dataset[Tensor | UserError]):
    """A source as worker processes see it: pieces of rows, and errors as values.

    torch raises a worker's error anew with the worker's traceback for its message.
    """

    def __init__(self, source: Source, training: bool) -> None:
        self._source, self._training = source, training

    def __getitem__(self, piece: list[int]) -> Tensor | UserError:
        try:
            return self._source.load(torch.tensor(piece), self._training)
        except UserError as error:
            return error
