"""Between the caller's state (a tensor or a pytree) and the matrix [B, D] that solvers see.

A batch whose rows depend on each other is one row of that matrix, [1, B * D].
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from deqcore.ops._library import DTYPES


@dataclass(frozen=True)
class Packing:
    """The structure of one state.

    Attributes:
        batch, dim: rows that are solved, and elements in a row over all leaves.
        coupled: the whole state is one row.
        dtype: dtype of the packed state: the promotion of the leaves' dtypes.
        compute_dtype: of the current iterate and the history: half-precision states are kept in
            float32.
        uniform: whether every leaf has that dtype, so that packing rounds nothing.
        is_tensor: the state is one tensor and no container.
    """

    spec: pytree.TreeSpec
    shapes: tuple[torch.Size, ...]
    dtypes: tuple[torch.dtype, ...]
    widths: tuple[int, ...]
    batch: int
    dim: int
    dtype: torch.dtype
    compute_dtype: torch.dtype
    device: torch.device
    uniform: bool
    is_tensor: bool
    coupled: bool = False

    def _is_plain(self, state: Any) -> bool:
        """The usual case, worth being quick about: one tensor that needs no conversion."""
        return (
            self.is_tensor
            and isinstance(state, Tensor)
            and state.dtype == self.dtype
            and state.shape == self.shapes[0]
            and state.device == self.device
        )

    @classmethod
    def of(cls, z0: Any, batch: str = "rows") -> Packing:
        """Read the structure of ``z0``; raises TypeError or ValueError that names the bad leaf.

        ``batch`` is one of ``BATCHES``.
        """
        coupled = is_coupled(batch)
        if type(z0) is Tensor and z0.layout == torch.strided:  # the usual case
            return _of_tensor(z0.shape, z0.dtype, z0.device, coupled)
        is_tensor = isinstance(z0, Tensor)
        leaves, spec = ([z0], _LEAF) if is_tensor else pytree.tree_flatten(z0)
        if not leaves:
            raise ValueError("z0: expected a tensor or a pytree of tensors, got an empty pytree")
        for index, leaf in enumerate(leaves):
            _check_leaf(leaf, index, leaves, coupled)
        shapes = tuple([leaf.shape for leaf in leaves])
        dtypes = tuple([leaf.dtype for leaf in leaves])
        return cls._of_leaves(spec, shapes, dtypes, leaves[0].device, is_tensor, coupled)

    @classmethod
    def _of_leaves(
        cls,
        spec: pytree.TreeSpec,
        shapes: tuple[torch.Size, ...],
        dtypes: tuple[torch.dtype, ...],
        device: torch.device,
        is_tensor: bool,
        coupled: bool,
    ) -> Packing:
        one_row = coupled or (len(shapes) == 1 and not shapes[0])
        dtype = dtypes[0]
        for other in dtypes[1:]:
            dtype = torch.promote_types(dtype, other)
        widths = tuple([math.prod(shape[0 if one_row else 1 :]) for shape in shapes])
        return cls(
            spec=spec,
            shapes=shapes,
            dtypes=dtypes,
            widths=widths,
            batch=1 if one_row else shapes[0][0],
            dim=sum(widths),
            dtype=dtype,
            compute_dtype=torch.float64 if dtype == torch.float64 else torch.float32,
            device=device,
            uniform=len(set(dtypes)) == 1,
            is_tensor=is_tensor,
            coupled=coupled,
        )

    def pack(self, state: Any, what: str = "f(z)") -> Tensor:
        """[B, D] in the packed dtype, contiguous; checks that ``state`` has z0's structure."""
        if self._is_plain(state):
            as_it_is = state.dim() == 2 and not self.coupled
            packed: Tensor = state if as_it_is else state.reshape(self.batch, self.dim)
            return packed.contiguous()
        leaves = self._checked(state, what)
        if len(leaves) == 1:
            return leaves[0].reshape(self.batch, self.dim).to(self.dtype).contiguous()
        rows = zip(leaves, self.widths, strict=True)
        return torch.cat([leaf.reshape(self.batch, w).to(self.dtype) for leaf, w in rows], dim=1)

    def check(self, state: Any, what: str) -> None:
        """Raise unless ``state`` has z0's structure, shapes and device; ``what`` is as "f(z)"."""
        if not self._is_plain(state):
            self._checked(state, what)

    def _checked(self, state: Any, what: str) -> list[Tensor]:
        leaves, spec = pytree.tree_flatten(state)
        if spec != self.spec:
            leaves = self._in_order(state, what, spec)
        for leaf, shape in zip(leaves, self.shapes, strict=True):
            if not isinstance(leaf, Tensor):
                raise TypeError(f"{what}: expected tensors, got {type(leaf).__name__}")
            if leaf.shape != shape:
                raise ValueError(
                    f"{what}: expected shape {tuple(shape)}, that of z0, got {tuple(leaf.shape)}; "
                    f"{what[0]} must map a state to a state of the same shape"
                )
            if not leaf.dtype.is_floating_point:
                raise TypeError(f"{what}: expected a floating-point tensor, got {leaf.dtype}")
            if leaf.device != self.device:
                raise ValueError(f"{what}: expected device {self.device}, got {leaf.device}")
        return leaves

    def _in_order(self, state: Any, what: str, spec: pytree.TreeSpec) -> list[Any]:
        """The leaves of a state whose dicts may have their keys in another order than z0's."""
        with contextlib.suppress(ValueError):
            leaves: list[Any] = self.spec.flatten_up_to(state)
            if all(pytree.tree_is_leaf(leaf) for leaf in leaves):
                return leaves
        hint = ""
        pair = isinstance(state, tuple) and len(state) == 2
        if pair and pytree.tree_structure(state[0]) == self.spec:
            hint = (
                "; fixed_point, root and ImplicitLayer take an f that returns (z, aux) with "
                "has_aux=True, everything else lambda z: f(z)[0]"
            )
        raise ValueError(f"{what}: expected the structure of z0, {self.spec}, got {spec}{hint}")

    def unpack(self, packed: Tensor, apart: bool = False) -> Any:
        """The caller's structure; views of ``packed`` where the dtypes agree.

        With ``apart`` no two leaves share memory, so that each may be changed in place or saved
        without the others.
        """
        if self.is_tensor:
            shape = self.shapes[0]
            # Sizes one by one: a torch.Size takes three times as long to read.
            return packed.view(*shape) if shape else packed.view(shape)
        # Not `split`: its views may not be changed in place under autograd.
        ends = itertools.accumulate(self.widths)
        leaves = [
            packed[:, end - width : end].reshape(shape).to(dtype)
            for width, end, shape, dtype in zip(
                self.widths, ends, self.shapes, self.dtypes, strict=True
            )
        ]
        if apart and len(leaves) > 1:
            leaves = [leaf.clone(memory_format=torch.contiguous_format) for leaf in leaves]
        return pytree.tree_unflatten(leaves, self.spec)

    def cast(self, x: Tensor) -> Tensor:
        """The iterate as f will see it: rounded to the leaves' dtypes, in the packed dtype."""
        z = x if x.dtype == self.dtype else x.to(self.dtype)
        return z if self.uniform else self.pack(self.unpack(z), "z")


_LEAF = pytree.tree_structure(None)


@functools.lru_cache(maxsize=256)
def _of_tensor(
    shape: torch.Size, dtype: torch.dtype, device: torch.device, coupled: bool
) -> Packing:
    """Of a strided tensor; a solve of a few steps takes as long as to read one anew."""
    _check_dtype(dtype, "z0")
    return Packing._of_leaves(_LEAF, (shape,), (dtype,), device, True, coupled)


BATCHES = ("rows", "coupled")


def is_coupled(batch: str) -> bool:
    """Whether the whole batch is one problem; raises ValueError for what is no way to take it."""
    if batch not in BATCHES:
        raise ValueError(
            f"batch: expected 'rows' (each row of dim 0 is a problem of its own) or 'coupled' (the "
            f"whole state is one), got {batch!r}"
        )
    return batch == "coupled"


def _check_leaf(leaf: Any, index: int, leaves: list[Any], coupled: bool) -> None:
    where = "z0" if len(leaves) == 1 else f"z0: leaf {index}"
    if not isinstance(leaf, Tensor):
        raise TypeError(f"{where}: expected a tensor, got {type(leaf).__name__}")
    _check_dtype(leaf.dtype, where)
    check_layout(leaf, where)
    if len(leaves) == 1:
        return
    if not coupled:
        _check_rows(leaf, leaves[0], where)
    if leaf.device != leaves[0].device:
        raise ValueError(
            f"{where}: expected device {leaves[0].device} like leaf 0, got {leaf.device}"
        )


def _check_dtype(dtype: torch.dtype, where: str) -> None:
    if not dtype.is_floating_point:
        hint = "use torch.view_as_real" if dtype.is_complex else "use z0.float()"
        raise TypeError(f"{where}: expected a floating-point tensor, got {dtype}; {hint}")
    if dtype not in DTYPES:
        raise TypeError(
            f"{where}: expected float64, float32, bfloat16 or float16, got {dtype}; use z0.float()"
        )


def check_layout(leaf: Tensor, where: str) -> None:
    """Raise unless its elements are stored one by one."""
    if leaf.layout != torch.strided:
        raise TypeError(
            f"{where}: expected a strided tensor, got one of layout {leaf.layout}; use to_dense(), "
            "or for a nested tensor to_padded_tensor"
        )


def _check_rows(leaf: Tensor, first: Tensor, where: str) -> None:
    if leaf.dim() == 0:
        raise ValueError(f"{where}: expected a batch dimension (dim 0), got a 0-dim tensor")
    if leaf.shape[0] != first.shape[0]:
        raise ValueError(
            f"{where}: expected {first.shape[0]} rows in dim 0 like leaf 0, got {leaf.shape[0]}; "
            "leaves of one problem that has no rows go with batch='coupled'"
        )
