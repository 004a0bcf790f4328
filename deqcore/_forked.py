"""Solves in a process that was forked from one with threads, which do not exist in the child.

Neither do OpenMP's, and GNU's waits for them for ever at the next parallel region, be it torch's or
ours. With one thread there is no such region.
"""

from __future__ import annotations

import os
import warnings

import torch

_had_threads = False  # this process when it was forked last
_is_child_of_threads = False


def go_on_with_one_thread() -> None:
    """In such a child, at its first solve, have torch use one thread; else do nothing."""
    global _is_child_of_threads
    if not _is_child_of_threads:
        return
    _is_child_of_threads = False
    if torch.get_num_threads() == 1:
        return
    torch.set_num_threads(1)
    warnings.warn(
        "deqcore: this process was forked from one with threads, of which torch's would be waited "
        "for without end: torch.set_num_threads(1) was called. Start processes with 'spawn' or "
        "'forkserver', or say torch.set_num_threads(1) yourself",
        RuntimeWarning,
        stacklevel=2,
    )


def _before() -> None:
    global _had_threads
    try:
        _had_threads = len(os.listdir("/proc/self/task")) > 1
    except OSError:  # no Linux: there may be some
        _had_threads = True


def _in_child() -> None:
    global _is_child_of_threads
    _is_child_of_threads = _had_threads


if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=_before, after_in_child=_in_child)
