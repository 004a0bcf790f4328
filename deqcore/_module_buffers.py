"""Buffers that modules change in each call, as running statistics: one update for a whole solve."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.autograd.grad_mode import _unsafe_preserve_version_counter
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.module import register_module_forward_pre_hook


class ModuleBuffers:
    """The buffers of the modules in training mode that f calls, as they were before.

    Which modules those are shows when they are called: f may be any callable. An evaluation within
    ``unchanged`` leaves them as it found them. A module that is ``constant_in_solve`` sees to
    that itself, as it remembers for which weight its buffers are.
    """

    def __init__(self) -> None:
        self._known: dict[int, nn.Module] = {}
        self._buffers: list[_Buffer] = []
        self._at_first: list[Tensor] | None = None
        self._changed = False  # by an evaluation that was undone
        self._kept = False  # the one evaluation that was not has been made

    @property
    def waiting(self) -> bool:
        """Whether evaluations change buffers, and none of their changes stands yet."""
        return self._changed and not self._kept

    @contextlib.contextmanager
    def unchanged(self) -> Iterator[None]:
        """Put the buffers back when f returns or raises."""
        with self._noting():
            try:
                yield
            finally:
                try:
                    self.restore()
                except BaseException:  # an interrupt came between two buffers
                    self.restore()
                    raise

    @contextlib.contextmanager
    def changing(self) -> Iterator[None]:
        """Let an evaluation's changes stand, and later ones start from there."""
        with self._noting():
            yield
        self.take()
        self._kept = True

    @contextlib.contextmanager
    def _noting(self) -> Iterator[None]:
        thread = threading.get_ident()

        def note(module: nn.Module, args: Any) -> None:
            if threading.get_ident() == thread:  # the hook is the process's
                self._note(module)

        hook = register_module_forward_pre_hook(note)
        try:
            yield
        finally:
            hook.remove()

    def _note(self, module: nn.Module) -> None:
        """Before its first call. Those inside it too: a compiled module calls them unseen."""
        if id(module) in self._known:
            return
        for part in module.modules():
            if id(part) in self._known:
                continue
            self._known[id(part)] = part
            if part.training and not getattr(part, "constant_in_solve", False):
                names = [name for name, value in part._buffers.items() if value is not None]
                new = [_Buffer(part, name) for name in names]
                self._buffers += new
                if self._at_first is not None:
                    self._at_first += [buffer.before.clone() for buffer in new]

    @torch.no_grad()
    def take(self) -> None:
        """Start from the values of now, in the memory of those before (a captured solve does)."""
        self._kept = False
        for buffer in self._buffers:
            buffer.take()

    def remember(self) -> None:
        """Keep the first values, for ``recall``."""
        self._at_first = []

    @torch.no_grad()
    def recall(self) -> None:
        """Go back to the values before the first call."""
        for buffer, value in zip(self._buffers, self._at_first or (), strict=True):
            buffer.before.copy_(value)
        self.restore()
        self._at_first = None

    @torch.no_grad()
    def restore(self) -> None:
        for buffer in self._buffers:
            self._changed |= buffer.restore()


@dataclass
class _Buffer:
    module: nn.Module
    name: str

    def __post_init__(self) -> None:
        # One that is None has no entry here: only tensors are looked at.
        self.tensor = cast(Tensor, self.module._buffers[self.name])
        self.before = self.tensor.detach().clone()
        self.version = _version(self.tensor)

    def take(self) -> None:
        now = self.module._buffers.get(self.name)
        if now is not None:
            self.tensor = now
            self.before.copy_(now)
            self.version = _version(now)

    def restore(self) -> bool:
        """Whether there was anything to do."""
        replaced = self.module._buffers.get(self.name) is not self.tensor
        if replaced:
            self.module._buffers[self.name] = self.tensor
        if isinstance(self.module, _NormBase):
            # Its kernel does not count changes, nor does its derivative in training mode use what
            # it saves of these: counting here would make a graph of f useless for nothing.
            with _unsafe_preserve_version_counter(self.tensor):
                self.tensor.copy_(self.before)
            return True
        changed = self.version is None or self.tensor._version != self.version
        if changed:
            self.tensor.copy_(self.before)
            self.version = _version(self.tensor)
        return replaced or changed


def _version(tensor: Tensor) -> int | None:
    """How often it was changed; tensors made in inference mode do not tell."""
    return None if tensor.is_inference() else tensor._version
