"""Warnings about answers: each cause once in a process, and without waiting for a GPU."""

from __future__ import annotations

import threading
import warnings
from typing import Any

import torch
from torch import Tensor


class ConvergenceWarning(RuntimeWarning):
    """An answer is not what it seems; each cause is told once in a process.

    Turn it off, or into an error, with ``warnings.filterwarnings(..., category=...)``; a filter
    "always" shows every occurrence.
    """


_told: set[str] = set()
_lock = threading.Lock()


def warn_once(message: str) -> None:
    """Warn, once for each message, unless the filters ask for every occurrence.

    Python's own filter "default" forgets what it has shown whenever someone changes the filters,
    which libraries do in every step of a training loop.
    """
    with _lock:
        if message in _told and not _asked_for_all():
            return
        _told.add(message)
    warnings.warn(message, ConvergenceWarning, stacklevel=3)


def _asked_for_all() -> bool:
    for action, _, category, module, _ in warnings.filters:
        if issubclass(ConvergenceWarning, category) and module is None:
            return action in ("always", "all", "error")
    return False


class Pending:
    """Flags on their way from a GPU: a warning of theirs comes with a later call."""

    def __init__(self) -> None:
        self._flags: list[tuple[Any, Tensor, tuple[str, ...]]] = []

    def add(self, flags: Tensor, messages: tuple[str, ...]) -> None:
        """Send ``flags`` (bool [len(messages)], on a GPU) off, without waiting."""
        if torch.cuda.is_current_stream_capturing():
            return  # what a graph replays, no one would look at
        host = torch.empty(len(messages), dtype=torch.bool, pin_memory=True)
        host.copy_(flags, non_blocking=True)
        event = torch.cuda.Event()
        event.record(torch.cuda.current_stream(flags.device))
        self._put(event, host, messages)

    def _put(self, event: Any, host: Tensor, messages: tuple[str, ...]) -> None:
        with _lock:
            self._flags.append((event, host, messages))

    def tell(self) -> None:
        """Warn about what has arrived."""
        if not self._flags:
            return
        with _lock:
            flags, self._flags = self._flags, []
            arrived = [item for item in flags if item[0].query()]
            self._flags = [item for item in flags if not any(item is other for other in arrived)]
        for _, host, messages in arrived:
            for flag, message in zip(host.tolist(), messages, strict=True):
                if flag:
                    warn_once(message)


pending = Pending()


def warn_where(
    flags: list[Tensor] | Tensor, messages: tuple[str, ...], *, wait: bool = True
) -> None:
    """Warn of each message whose flag, a bool tensor of one element, is set.

    On the CPU now. On a GPU at a later solve, or never where ``wait`` is False: then nothing may be
    copied to the host.
    """
    if flags[0].device.type != "cuda":
        for flag, message in zip(flags, messages, strict=True):
            if flag:
                warn_once(message)
    elif wait:
        pending.add(flags if isinstance(flags, Tensor) else torch.stack(flags), messages)
