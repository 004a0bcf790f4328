"""Decoded images: kept up to one limit, and decoded ahead of their use by worker processes.

What comes out is the same for any limit and any number of workers, and so are the random numbers
that training draws: both only decide when an image is decoded, and how often.
"""

from __future__ import annotations

import itertools
from collections import OrderedDict
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
        self._shelves: OrderedDict[tuple[int, bool], _Shelf] = OrderedDict()
        self._idle: _Pool | None = None

    def images(self, source: Source, rows: Tensor, training: bool = False) -> SourceImages:
        """Some images of a source, each decoded when it is first used.

        Args:
            source: where they are.
            rows: int64 (n,).
            training: with the margin that random crops move in; see `Source.load_training`.
        """
        key = id(source), training  # no other source has the id, as the shelf holds this one
        if key not in self._shelves:
            self._shelves[key] = _Shelf(self, source, training)
        self._shelves.move_to_end(key)
        return SourceImages(self._shelves[key], rows)

    def room(self, source: Source, wanted: int) -> int:
        """Make room for `wanted` bytes of a source's images; how many there is room for."""
        for shelf in self._shelves.values():
            if self._free() >= wanted:
                break
            if shelf.source is not source:
                shelf.clear()
        return min(wanted, self._free())

    def _free(self) -> int:
        return self.limit - sum(shelf.nbytes for shelf in self._shelves.values())

    def decode(self, source: Source, training: bool, pieces: Sequence[Tensor]) -> Iterator[Tensor]:
        """The images of each piece of rows, in order."""
        if self.workers == 0 or len(pieces) < 2:
            yield from map(source.load_training if training else source.load, pieces)
            return
        # Taken out while it works: two passes at once have a pool each.
        pool, self._idle = self._idle, None
        if pool is None or pool.source is not source:
            pool = _Pool(source, self.workers)
        for done, images in enumerate(pool.decode(training, pieces), start=1):
            if done == len(pieces):
                self._idle = pool
            yield images

    def end_workers(self) -> None:
        """End processes that wait for another pass."""
        self._idle = None


class SourceImages:
    """Images of a source, indexed as a tensor uint8 (n, C, S, S) is along its first dimension."""

    def __init__(self, shelf: _Shelf, rows: Tensor) -> None:
        self._shelf, self._rows = shelf, rows

    @property
    def key(self) -> bytes:
        """What tells these images from any others of this process."""
        return f"{self._shelf.number}:".encode() + self._rows.numpy().tobytes()

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: slice | Tensor) -> Tensor:
        [images] = self._shelf.batches([self._rows[index]])
        return images

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
        missing = [rows[~have].split(PIECE) for rows, have in zip(parts, known, strict=True)]
        pieces = [piece for each in missing for piece in each if len(piece)]
        decoded = self._cache.decode(self.source, self._training, pieces)
        for index, (rows, have) in enumerate(zip(parts, known, strict=True)):
            fresh = [next(decoded) for piece in missing[index] if len(piece)]
            images = self._join(rows, have, fresh)
            if fresh:
                self._keep(rows[~have], images[~have])
            if index == len(parts) - 1 and all((self._slots[piece] >= 0).all() for piece in pieces):
                self._cache.end_workers()  # the next pass will not need them
            yield images

    def _join(self, rows: Tensor, have: Tensor, fresh: list[Tensor]) -> Tensor:
        slots = self._slots[rows[have]]
        # Without any row, or where what was kept has made room meanwhile.
        if len(rows) == 0 or (slots < 0).any():
            return (self.source.load_training if self._training else self.source.load)(rows)
        if not fresh:
            return self._kept[slots]
        new = torch.cat(fresh)
        if not have.any():
            return new
        images = new.new_empty((len(rows), *new.shape[1:]))
        images[have], images[~have] = self._kept[slots], new
        return images

    def _keep(self, rows: Tensor, images: Tensor) -> None:
        new = self._slots[rows] < 0  # a row may have been taken twice
        rows, images = rows[new], images[new]
        size = images[:1].nbytes
        if size == 0 or self._cache.limit < size:
            return
        if self._count == 0:  # the system gives memory when it is written to
            most = min(len(self.source), self._cache.limit // size)
            self._kept = images.new_empty((most, *images.shape[1:]))
        count = min(
            self._cache.room(self.source, images.nbytes) // size, len(self._kept) - self._count
        )
        here = slice(self._count, self._count + count)
        self._kept[here] = images[:count]
        self._slots[rows[:count]] = torch.arange(here.start, here.stop)
        self._count += count
        self.nbytes = self._count * size


class _Rows(Dataset[Tensor | UserError]):
    """A source as worker processes see it: pieces of rows, and errors as values.

    torch raises a worker's error anew with the worker's traceback for its message.
    """

    def __init__(self, source: Source) -> None:
        self._source = source

    def __getitem__(self, piece: tuple[bool, list[int]]) -> Tensor | UserError:
        training, rows = piece
        load = self._source.load_training if training else self._source.load
        try:
            return load(torch.tensor(rows))
        except UserError as error:
            return error


class _Pool:
    """Worker processes that decode images of one source, kept from pass to pass."""

    def __init__(self, source: Source, workers: int) -> None:
        self.source = source
        self._pieces: list[tuple[bool, list[int]]] = []
        self._loader: DataLoader[Tensor | UserError] = DataLoader(
            _Rows(source),
            batch_size=None,
            sampler=self._pieces,
            num_workers=workers,
            persistent_workers=True,
            # Of its own: a pass draws a seed for the workers, which must not be training's.
            generator=torch.Generator(),
        )

    def decode(self, training: bool, pieces: Sequence[Tensor]) -> Iterator[Tensor]:
        self._pieces[:] = [(training, piece.tolist()) for piece in pieces]
        try:
            for answer in self._loader:
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
