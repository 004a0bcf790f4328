"""Images that are decoded when a batch is taken, for data that does not fit into memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from torch import Tensor

__all__ = ["DECODED_LIMIT_BYTES", "Images", "LazyImages", "decoded_or_lazy"]

DECODED_LIMIT_BYTES = 2**31


class LazyImages:
    """The rows of a source, indexed as a tensor of images along its first dimension is.

    Args:
        load: int64 rows (n,) to uint8 images (n, C, S, S).
        rows: int64 (N,), the source's rows in order.
    """

    def __init__(self, load: Callable[[Tensor], Tensor], rows: Tensor) -> None:
        self._load, self._rows = load, rows

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: slice | Tensor) -> Tensor:
        return self._load(self._rows[index])

    def split(self, size: int) -> Iterator[Tensor]:
        """Batches of `size` images in order, each decoded when it is reached."""
        return (self._load(rows) for rows in self._rows.split(size))


Images = Tensor | LazyImages


def decoded_or_lazy(
    load: Callable[[Tensor], Tensor], rows: Tensor, limit: int = DECODED_LIMIT_BYTES
) -> Images:
    """Decode the images of `rows` now if they take at most `limit` bytes, else when used."""
    if len(rows) == 0:
        return load(rows)
    if load(rows[:1]).numel() * len(rows) <= limit:
        return load(rows)
    return LazyImages(load, rows)
