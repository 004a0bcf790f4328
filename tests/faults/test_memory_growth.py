"""Many solves, gradients and failures keep nothing; `benchmarks/memory_growth.py` has 10,000."""

from __future__ import annotations

import contextlib
import gc
import weakref

import torch

import deqcore
from benchmarks.memory_growth import growth, measure


def test_solves_leave_no_objects_behind():
    figures = measure(120, points=6, bar=False)
    assert (
        growth(figures, "objects", after=40) < 0.05
    )  # of a round; one that fails, in ten, would show 0.1


def test_growth_is_measured():
    """What a leak of a number a solve looks like."""
    figures = {"round": [10, 20, 30, 40], "python": [0, 320, 640, 960]}
    assert growth(figures, "python", 0) == 32


def test_an_error_keeps_neither_state_nor_graph_once_it_has_been_dealt_with():
    kept = []

    def f(z, x):
        kept.append(weakref.ref(z))
        if len(kept) == 3:
            raise MemoryError
        return 0.5 * z + x

    x = torch.ones(2, 3, requires_grad=True)
    with contextlib.suppress(MemoryError):
        deqcore.fixed_point(f, torch.zeros(2, 3), x)
    gc.collect()
    assert all(reference() is None for reference in kept)
