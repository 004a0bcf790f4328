"""What torch.compile is told about functions, without importing its tracer.

``torch.compiler.disable`` and ``assume_constant_result`` import ``torch._dynamo``, which takes as
long as ``import torch``. What they do to a function is done here without.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from torch._C._dynamo import eval_frame as frames

F = TypeVar("F", bound=Callable[..., Any])

_UNTRACED = frames._FrameExecStrategy(frames._FrameAction.SKIP, frames._FrameAction.SKIP)


def never_traced(reason: str) -> Callable[[F], F]:
    """``torch.compiler.disable(reason=reason)``: the function, and what it calls, runs as it is.

    What is compiled by itself, such as an f that was given to torch.compile, stays compiled.
    """

    def mark(function: F) -> F:
        # At a call that is being traced: the graph breaks there, for this reason.
        function._torchdynamo_disable = True  # type: ignore[attr-defined]  # torch's mark
        function._torchdynamo_disable_msg = reason  # type: ignore[attr-defined]  # likewise
        # At the call itself: its frame is no start of a trace, and neither is one below it.
        frames.set_code_exec_strategy(function.__code__, _UNTRACED)
        return function

    return mark


def constant_when_traced(function: F) -> F:
    """``torch.compiler.assume_constant_result``: called while tracing, its result is a constant."""
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]  # torch's mark
    return function
