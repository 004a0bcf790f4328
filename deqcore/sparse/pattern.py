"""``SparsityPattern``: which entries of a weight are kept."""

from __future__ import annotations

import hashlib
import zlib
from typing import Any, NoReturn

import numpy as np
import torch
from torch import Tensor

from deqcore import _kernels
from deqcore.ops import masked_dense

Structure = int | str | None
BLOCKS = (16, 32, 64)
_STRUCTURES: tuple[Structure, ...] = (None, *BLOCKS, "2:4")
# Bytes of a packed pattern before its bits: rows, columns, kept and a code as int32. The code's
# lowest byte is the structure; the others are a checksum of all else, zero in what version 0.1.0
# wrote.
_HEADER = 16


class SparsityPattern:
    """Which entries of a [rows, columns] weight are kept, checked once and then never changed.

    Build one with ``from_mask`` or ``from_scores``. Two patterns are equal, and hash alike,
    when they have the same shape and keep the same entries, wherever they are.

    Attributes:
        shape: (rows, columns).
        kept: number of kept entries.
        structure: None, a block size (16, 32, 64: whole aligned blocks are kept or not), or
            ``"2:4"`` (at most two of each four consecutive entries of a row).
        indices: int32 tensor, the pattern as the ops want it (see ``deqcore.ops.masked_dense``).
    """

    shape: tuple[int, int]
    kept: int
    structure: Structure
    block: int
    indices: Tensor

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        raise TypeError(
            "SparsityPattern is built with SparsityPattern.from_mask(mask) or "
            ".from_scores(scores, sparsity)"
        )

    @classmethod
    def from_mask(cls, mask: Tensor, *, structure: Structure = None) -> SparsityPattern:
        """The pattern that keeps the entries where ``mask`` is true, on the mask's device.

        Args:
            mask: bool [rows, columns].
            structure: a block size (16, 32 or 64) or ``"2:4"``, which the mask must have; blocks
                and 2:4 have kernels of their own.

        Raises:
            TypeError: mask is not a bool tensor.
            ValueError: mask is not a matrix, has too many entries for 32-bit indices, or lacks
                the structure.
        """
        _check_structure(structure)
        if not isinstance(mask, Tensor):
            raise TypeError(f"mask: expected a bool tensor, got {type(mask).__name__}")
        if mask.dtype != torch.bool:
            raise TypeError(
                f"mask: expected dtype torch.bool, got {mask.dtype}; write mask != 0 to keep the "
                "entries that are not zero"
            )
        if mask.dim() != 2:
            raise ValueError(
                f"mask: expected (rows, columns), got shape {tuple(mask.shape)}; a mask has the "
                "shape of the weight"
            )
        if mask.numel() > torch.iinfo(torch.int32).max:
            raise ValueError(
                f"mask: expected fewer than 2**31 entries, got {mask.numel()}; split the weight"
            )
        _check_mask_has(mask, structure)
        bits = np.packbits(mask.detach().cpu().numpy().reshape(-1))
        return cls._build(_indices(mask), bits, (mask.shape[0], mask.shape[1]), structure)

    @classmethod
    def from_scores(
        cls, scores: Tensor, sparsity: float, *, structure: Structure = None
    ) -> SparsityPattern:
        """The pattern that keeps the entries, or whole blocks, with the highest scores.

        Args:
            scores: [rows, columns], the higher the more worth keeping; ``weight.abs()`` prunes by
                magnitude. Of equal scores the first in row order is kept.
            sparsity: share of the entries to drop, from 0 to 1; rounded to whole entries or blocks.
                ``"2:4"`` drops half.
            structure: None, a block size (the scores in a block are added up), or ``"2:4"``.

        Raises:
            ValueError: a sparsity out of range, NaN scores, or a shape that does not fit.
        """
        _check_structure(structure)
        if not 0 <= sparsity <= 1:
            raise ValueError(f"sparsity: expected a share from 0 to 1, got {sparsity}")
        if scores.dim() != 2:
            raise ValueError(f"scores: expected (rows, columns), got {tuple(scores.shape)}")
        scores = scores.detach()
        if scores.isnan().any():
            raise ValueError("scores: expected numbers, got NaN; replace them (torch.nan_to_num)")
        if structure == "2:4":
            if sparsity != 0.5:
                raise ValueError(f"sparsity: 2:4 drops half of the entries, got {sparsity}")
            mask = _keep_two_of_four(scores)
        elif structure is None:
            mask = _keep_highest(scores, sparsity)
        else:
            mask = _keep_blocks(scores, sparsity, int(structure))
        return cls.from_mask(mask, structure=structure)

    @classmethod
    def from_packed(cls, packed: Tensor) -> SparsityPattern:
        """The pattern that ``to_packed`` wrote, on packed's device.

        Raises:
            ValueError: not a packed pattern.
        """
        data = packed.detach().cpu().contiguous().numpy() if packed.dtype == torch.uint8 else None
        if data is None or data.ndim != 1 or data.size < _HEADER:
            raise ValueError(
                f"packed: expected the uint8 tensor that SparsityPattern.to_packed() returned, got "
                f"{packed.dtype} of shape {tuple(packed.shape)}"
            )
        rows, columns, kept, code = (int(n) for n in data[:_HEADER].view(np.int32))
        cells = rows * columns
        bits = data[_HEADER:]
        whole = min(rows, columns) >= 0 and bits.size == (cells + 7) // 8
        structure, written = code & 255, (code & 0xFFFFFFFF) >> 8
        whole &= structure < len(_STRUCTURES)
        whole = whole and written in (0, _checksum(rows, columns, kept, structure, bits))
        mask = np.unpackbits(bits, count=cells) if whole else None
        if mask is None or int(mask.sum()) != kept:
            raise ValueError(
                f"packed: damaged: a {rows} x {columns} pattern of {kept} entries in {data.size} "
                "bytes; save it again with SparsityPattern.to_packed()"
            )
        bools = torch.from_numpy(mask.astype(bool).reshape(rows, columns)).to(packed.device)
        return cls.from_mask(bools, structure=_STRUCTURES[structure])

    def to_packed(self) -> Tensor:
        """The pattern as a uint8 tensor on the CPU: a header and one bit for each entry.

        The header has a checksum, so that ``from_packed`` notices what was damaged.
        """
        facts = (*self.shape, self.kept, _STRUCTURES.index(self.structure))
        code = facts[3] | _checksum(*facts, self._bits) << 8
        header = np.array([*facts[:3], code], dtype=np.uint32).view(np.uint8)
        return torch.from_numpy(np.concatenate([header, self._bits]))

    @property
    def device(self) -> torch.device:
        """Where ``indices`` is."""
        return self.indices.device

    @property
    def sparsity(self) -> float:
        """Share of the entries that are dropped, 0 for an empty matrix."""
        cells = self.shape[0] * self.shape[1]
        return 1 - self.kept / cells if cells else 0.0

    def to(self, device: torch.device | str) -> SparsityPattern:
        """The same pattern on another device; itself if it is there."""
        device = torch.device(device)
        if self.device.type == "meta" and device.type != "meta":
            return SparsityPattern.from_packed(self.to_packed().to(device))
        indices = self.indices.to(device)
        if indices is self.indices:
            return self
        return SparsityPattern._build(indices, self._bits, self.shape, self.structure)

    def mask(self) -> Tensor:
        """bool [rows, columns], true where an entry is kept."""
        cells = self.shape[0] * self.shape[1]
        mask = np.unpackbits(self._bits, count=cells).astype(bool).reshape(self.shape)
        device = "cpu" if self.device.type == "meta" else self.device
        return torch.from_numpy(mask).to(device)

    def to_dense(self, values: Tensor) -> Tensor:
        """values [kept] at their places, zero elsewhere: [rows, columns]. Differentiable.

        Where all entries are kept it is a view of the values.
        """
        rows, columns = self.shape
        if self.kept == rows * columns:
            return values.view(rows, columns)
        # Where few are kept, placing them one by one takes less (measured: from about 88% on).
        many = 8 * self.kept > rows * columns
        if many and self._words is not None and _kernels.CPU_KERNELS:
            return masked_dense.expand(values, self._words, self.indices, rows, columns)
        return masked_dense.to_dense(values, self.indices, rows, columns)

    def from_dense(self, weight: Tensor) -> Tensor:
        """The kept entries of weight [rows, columns], in row order: [kept]. Differentiable."""
        if weight.shape != self.shape:
            raise ValueError(f"weight: expected shape {self.shape}, got {tuple(weight.shape)}")
        return masked_dense.from_dense(weight, self.indices)

    def difference(self, other: SparsityPattern) -> int:
        """How many entries one of two patterns of the same shape keeps and the other does not."""
        return int(np.unpackbits(self._bits ^ other._bits).sum())

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, SparsityPattern):
            return NotImplemented
        return self.shape == other.shape and self._digest == other._digest

    def __hash__(self) -> int:
        return hash((self.shape, self._digest))

    def __repr__(self) -> str:
        kind = "" if self.structure is None else f", structure={self.structure!r}"
        return (
            f"SparsityPattern({self.shape[0]} x {self.shape[1]}, {self.kept} kept, "
            f"{self.sparsity:.1%} sparse{kind}, device={str(self.device)!r})"
        )

    def __setattr__(self, name: str, value: object) -> NoReturn:
        raise AttributeError("a SparsityPattern cannot be changed; build another one")

    def __delattr__(self, name: str) -> NoReturn:
        raise AttributeError("a SparsityPattern cannot be changed; build another one")

    def __copy__(self) -> SparsityPattern:
        return self

    def __deepcopy__(self, memo: object) -> SparsityPattern:
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        # The indices go along, although the bits would do: torch.load moves tensors as it is told.
        return SparsityPattern._build, (self.indices, self._bits, self.shape, self.structure)

    @classmethod
    def _build(
        cls, indices: Tensor, bits: np.ndarray, shape: tuple[int, int], structure: Structure
    ) -> SparsityPattern:
        self = object.__new__(cls)
        rows, columns = shape
        fields = {
            "shape": shape,
            "kept": (indices.shape[0] - rows - columns - 2) // 3,
            "structure": structure,
            "block": structure if isinstance(structure, int) else 1,
            "indices": indices,
            "_bits": bits,
            "_words": _words(bits, indices),
            "_choices": {},
            "_sparse": {},
            "_digest": hashlib.blake2b(bits.tobytes(), digest_size=16).digest(),
        }
        self.__dict__.update(fields)
        return self

    _bits: np.ndarray
    _words: Tensor | None  # on the CPU: the bits, the lowest of a byte first
    _digest: bytes
    _choices: dict[Any, tuple[bool, bool]]  # of sparse.choice, as is
    _sparse: dict[Any, bool]


def _checksum(rows: int, columns: int, kept: int, structure: int, bits: np.ndarray) -> int:
    """24 bits of CRC-32, never 0."""
    header = np.array([rows, columns, kept, structure], dtype=np.int32).tobytes()
    return zlib.crc32(bits.tobytes(), zlib.crc32(header)) >> 8 or 1


def _words(bits: np.ndarray, indices: Tensor) -> Tensor | None:
    if indices.device.type != "cpu":
        return None
    return torch.from_numpy(np.packbits(np.unpackbits(bits), bitorder="little"))


def _check_structure(structure: Structure) -> None:
    if structure not in _STRUCTURES or isinstance(structure, bool):
        raise ValueError(f"structure: expected None, 16, 32, 64 or '2:4', got {structure!r}")


def _check_mask_has(mask: Tensor, structure: Structure) -> None:
    rows, columns = mask.shape
    if structure == "2:4":
        _check_divides(4, "2:4", columns=columns)
        crowded = int((mask.view(rows, -1, 4).sum(-1) > 2).sum()) if mask.numel() else 0
        if crowded:
            raise ValueError(
                f"mask: 2:4 keeps at most two of four consecutive entries of a row; {crowded} "
                "groups keep more; from_scores(scores, 0.5, structure='2:4') chooses them"
            )
    elif isinstance(structure, int):
        _check_divides(structure, f"blocks of {structure}", rows=rows, columns=columns)
        counts = _blocks(mask, structure).sum((1, 3))
        torn = int(((counts > 0) & (counts < structure**2)).sum())
        if torn:
            raise ValueError(
                f"mask: {torn} of {counts.numel()} blocks of {structure} x {structure} are kept in "
                "part; keep or drop whole blocks, or leave out structure"
            )


def _check_divides(size: int, what: str, **dimensions: int) -> None:
    for name, length in dimensions.items():
        if length % size:
            raise ValueError(
                f"structure: {what} needs a multiple of {size} {name}, got {length}; pad the "
                "weight, or leave out structure"
            )


def _blocks(matrix: Tensor, size: int) -> Tensor:
    """[rows, columns] -> [rows of blocks, size, columns of blocks, size]."""
    rows, columns = matrix.shape
    return matrix.reshape(rows // size, size, columns // size, size)


def _keep_highest(scores: Tensor, sparsity: float) -> Tensor:
    keep = round((1 - sparsity) * scores.numel())
    order = scores.flatten().argsort(descending=True, stable=True)
    mask = torch.zeros(scores.numel(), dtype=torch.bool, device=scores.device)
    mask[order[:keep]] = True
    return mask.view(scores.shape)


def _keep_blocks(scores: Tensor, sparsity: float, size: int) -> Tensor:
    _check_divides(size, f"blocks of {size}", rows=scores.shape[0], columns=scores.shape[1])
    kept = _keep_highest(_blocks(scores, size).double().sum((1, 3)), sparsity)
    return kept.repeat_interleave(size, 0).repeat_interleave(size, 1)


def _keep_two_of_four(scores: Tensor) -> Tensor:
    _check_divides(4, "2:4", columns=scores.shape[1])
    groups = scores.reshape(scores.shape[0], -1, 4)
    order = groups.argsort(dim=-1, descending=True, stable=True)
    mask = torch.zeros_like(groups, dtype=torch.bool).scatter(-1, order[..., :2], True)
    return mask.view(scores.shape)


def _indices(mask: Tensor) -> Tensor:
    """The pattern as one int32 tensor; its layout is in deqcore.ops.masked_dense."""
    rows, columns = mask.nonzero(as_tuple=True)
    by_column = columns.argsort(stable=True)  # rows ascend within a column
    parts = [_offsets(mask.sum(1)), columns, _offsets(mask.sum(0)), rows[by_column], by_column]
    return torch.cat(parts).to(torch.int32)


def _offsets(counts: Tensor) -> Tensor:
    return torch.cat([counts.new_zeros(1), counts.cumsum(0)])
