"""Dropout for cells: one mask for a whole solve, so that f stays one function."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from deqcore._compile import never_traced

# The masks of one solve, by module, shape, dtype and device.
Masks = dict[tuple[Any, ...], Tensor]


class _Solving(threading.local):
    masks: Masks | None = None  # of the solve that is going on


solving = _Solving()


def masks_of_solve() -> Masks:
    """Those of the solve that is going on, or of one that begins now."""
    return {} if solving.masks is None else solving.masks


@contextlib.contextmanager
def solve_of(masks: Masks) -> Iterator[None]:
    """A solve, or a part of one that is done again in backward."""
    outer, solving.masks = solving.masks, masks
    try:
        yield
    finally:
        solving.masks = outer


class FixedDropout(nn.Module):
    """Dropout whose mask is drawn once per solve, and shared by all evaluations of f in it.

    ``nn.Dropout`` draws anew in each evaluation: f then has no fixed point, and no row converges.
    Here forward and backward evaluations of a solve have one mask, and the next solve has another.
    A solve inside of f has the masks of the outer one. Modules of this class have masks of their
    own; one that is called several times in f has one mask for each shape.

    Outside of a solve the mask of the last one is used where it fits, as in
    ``deqcore.jacobian_penalty`` at the solution, else one is drawn; so a cell that is iterated
    by hand needs ``reset`` before each pass. In ``deqcore.capture`` it is that of the
    recording. In ``eval()`` mode it returns its input, as ``nn.Dropout`` does.

    Args:
        p: probability of a zero, 0 to 1; other elements are multiplied by 1 / (1 - p).
        shared: dims along which elements share their fate: ``(1,)`` for the tokens of [B, L, D],
            ``(2, 3)`` for whole channels of [B, C, H, W].

    Raises:
        ValueError: p outside of 0 to 1.
        IndexError: in forward, a dim that the input has not.
        RuntimeError: where activation checkpointing inside of f calls it again in backward, when
            nobody knows for which solve: checkpoint the whole solve.

    Sources: Gal & Ghahramani, "A Theoretically Grounded Application of Dropout in Recurrent Neural
    Networks", NeurIPS 2016; in equilibrium models Bai, Kolter & Koltun, NeurIPS 2019. torchdeq
    calls it ``VariationalDropout``.
    """

    def __init__(self, p: float = 0.5, shared: Sequence[int] = ()) -> None:
        super().__init__()
        if isinstance(p, bool) or not isinstance(p, (int, float)) or not 0 <= p <= 1:
            raise ValueError(f"p: expected a probability from 0 to 1, got {p!r}")
        self.p, self.shared = p, tuple(shared)
        self._forget()

    def _forget(self) -> None:
        self._last: Masks = {}
        self._pass = -1  # the backward pass, if any, in which that solve was made

    def forward(self, x: Tensor) -> Tensor:
        """x times the mask, of the same shape."""
        if not self.training or self.p == 0:
            return x
        return x * self._mask(x)

    def reset(self) -> None:
        """Draw a new mask at the next call, if it is outside of a solve."""
        self._forget()

    def extra_repr(self) -> str:
        """Options."""
        return f"p={self.p}, shared={self.shared}"

    @never_traced(reason="a mask belongs to a solve, not to a trace")
    def _mask(self, x: Tensor) -> Tensor:
        this_pass = torch._C._current_graph_task_id()
        if solving.masks is not None:
            self._last, self._pass = solving.masks, this_pass
        elif this_pass not in (-1, self._pass):
            raise RuntimeError(
                "FixedDropout: called again in backward, by activation checkpointing inside of f, "
                "where nobody knows which solve's mask is meant; checkpoint the whole solve instead"
            )
        key = id(self), x.shape, x.dtype, x.device
        if key not in self._last:
            self._last[key] = self._draw(x)
        return self._last[key]

    def _draw(self, x: Tensor) -> Tensor:
        shape = list(x.shape)
        for dim in self.shared:
            shape[dim] = 1
        # Not a tensor of inference mode, which a later evaluation could not save for backward.
        with torch.inference_mode(False), torch.no_grad():
            mask = torch.empty(shape, dtype=x.dtype, device=x.device).bernoulli_(1 - self.p)
            return mask.div_(1 - self.p) if self.p < 1 else mask

    def __getstate__(self) -> dict[str, Any]:
        """Without masks, which copies draw for themselves."""
        return {n: value for n, value in vars(self).items() if n not in ("_last", "_pass")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._forget()
