"""Solves inside of ``torch.nn.utils.parametrize.cached()``.

What a parametrization computes is kept there at its first use. In a solve that is one without a
graph, and no gradient would reach the parameters from an evaluation that takes it from there.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch.nn.utils import parametrize

_NOTHING = contextlib.nullcontext()


def graph_free() -> contextlib.AbstractContextManager[Any]:
    """``torch.no_grad()`` which leaves nothing without a graph in the cache for who wants one."""
    if not torch.is_grad_enabled():
        return _NOTHING
    if not parametrize._cache_enabled:
        return torch.no_grad()
    stack = contextlib.ExitStack()
    stack.enter_context(torch.no_grad())
    stack.enter_context(_cache_apart())
    return stack


@contextlib.contextmanager
def _cache_apart() -> Iterator[None]:
    """What is in the cache is used, and what comes in is forgotten."""
    outer = parametrize._cache
    parametrize._cache = dict(outer)
    try:
        yield
    finally:
        parametrize._cache = outer


@contextlib.contextmanager
def uncached() -> Iterator[None]:
    """No cache: for what is evaluated again in backward, when there is none either."""
    outer = parametrize._cache_enabled
    parametrize._cache_enabled = 0
    try:
        yield
    finally:
        parametrize._cache_enabled = outer
