"""Saved tensors that are unpacked once, where the caller's hooks make that expensive."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


class SavedOnce:
    """What f's graph saves while hooks of the caller's are active, unpacked once for all VJPs.

    Under ``torch.utils.checkpoint`` unpacking recomputes the whole region, solve included, and
    under ``save_on_cpu`` it copies: once for each graph pass, and the adjoint's solve makes many.
    The caller's hooks pack as they would; ``unpack`` is called at the start of the backward pass,
    so that a recomputation is the one that the rest of the region needs anyway.
    """

    def __init__(self) -> None:
        # The graph owns what it saved: freeing it after backward must free these too.
        self._packed: list[weakref.ref[_Packed]] = []

    def recording(self) -> contextlib.AbstractContextManager[Any]:
        """Within it, graphs save through the caller's hooks and here; no-op where there are none.

        Without hooks nothing is put in between: PyTorch then checks that what was saved was not
        changed in place, which it does not with any.
        """
        # Not public, and nothing public tells which hooks are active. Its stub forgets the None.
        top: Callable[[bool], Any] = torch._C._autograd._top_saved_tensors_default_hooks
        hooks = top(False)
        if hooks is None:
            return contextlib.nullcontext()
        pack, unpack = hooks

        def packed(tensor: Tensor) -> _Packed:
            saved = _Packed(pack(tensor), unpack)
            self._packed.append(weakref.ref(saved))
            return saved

        return torch.autograd.graph.saved_tensors_hooks(packed, _Packed.unpack)

    def unpack(self) -> None:
        """Unpack all that the graph still holds."""
        for reference in self._packed:
            saved = reference()
            if saved is not None:
                saved.unpack()


class _Packed:
    def __init__(self, value: Any, unpack: Callable[[Any], Tensor]) -> None:
        self._value, self._unpack = value, unpack
        self._tensor: Tensor | None = None

    def unpack(self) -> Tensor:
        if self._tensor is None:
            self._tensor = self._unpack(self._value)
        return self._tensor
