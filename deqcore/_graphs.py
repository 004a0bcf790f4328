"""Records the parts of a solve with torch's capture, and joins them into one CUDA graph."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from deqcore import _kernels


class Parts(NamedTuple):
    """What a recorder joins: ``first``, ``body`` while ``remaining`` is above zero, ``last``."""

    first: Callable[[], None]
    body: Callable[[], None]
    last: Callable[[], None] | None
    remaining: Tensor  # int32 [1]
    max_steps: int
    taken: Tensor  # int32 [1], zero: the steps of a replay, which end at max_steps come what may


@dataclass
class CudaGraphs:
    """Records parts with torch's capture, and joins them."""

    exits_early: bool = True
    pool: Any = None
    stream: Any = None
    replays_alone: bool = True  # without the Python that was recorded

    def check(self, device: torch.device) -> None:
        if device.type != "cuda":
            raise ValueError(
                f"capture: expected z0 on a GPU, got {device}: CUDA graphs exist there alone; "
                "call deqcore.fixed_point here"
            )
        if not _kernels.CUDA_KERNELS:
            raise RuntimeError(f"capture: no CUDA kernels: {_kernels.missing['cuda']}")
        reason = _solve_graph().why_not_conditional()
        self.exits_early = not reason
        if reason:
            warnings.warn(
                f"deqcore.capture: every replay takes max_steps steps, because {reason}",
                stacklevel=4,
            )

    @contextlib.contextmanager
    def set_up(self) -> Iterator[None]:
        """Makes the stream current that will be captured: for all that is done before, too.

        autograd's nodes remember the stream on which they were made. One that was made on another
        and is still alive would draw that other stream into the capture, which is an error.
        """
        current = torch.cuda.current_stream()
        self.stream = _side_stream(current)
        self.stream.wait_stream(current)
        with torch.cuda.stream(self.stream):
            yield
        current.wait_stream(self.stream)

    def warm_up(self, run: Callable[[], Any]) -> None:
        """Before capture: libraries set themselves up in their first call."""
        run()
        self.pool = torch.cuda.graph_pool_handle()

    def record(self, parts: Parts) -> Callable[[], None]:
        graphs = [self._record_part(part) for part in (parts.first, parts.body, parts.last)]
        handles = [0 if graph is None else graph.raw_cuda_graph() for graph in graphs]
        remaining = parts.remaining.data_ptr() if self.exits_early else 0
        solve = _solve_graph()(*handles, remaining, parts.taken.data_ptr(), parts.max_steps)

        device = parts.remaining.device.index

        def launch(keep: Any = (graphs, parts)) -> None:  # their memory is the solve's
            solve.launch(torch._C._cuda_getCurrentRawStream(device))

        return launch

    def _record_part(self, part: Callable[[], None] | None) -> torch.cuda.CUDAGraph | None:
        if part is None:
            return None
        graph = torch.cuda.CUDAGraph(keep_graph=True)
        # Not torch.cuda.graph: it empties the allocator's cache. Other threads, which load data or
        # watch over collectives, may call what a capturing thread may not.
        graph.capture_begin(pool=self.pool, capture_error_mode="thread_local")
        try:
            try:
                part()
            finally:
                graph.capture_end()
        except RuntimeError as error:
            _recover(self.pool)
            # The end of a capture that failed fails as well, and speaks last.
            first: BaseException = error
            while first.__context__ is not None:
                first = first.__context__
            raise RuntimeError(
                "deqcore.capture: f or its derivative cannot be captured: no value may be read "
                "back to the host, and no result of f on these parameters may still hold its "
                f"autograd graph (del loss, or capture before the first one); torch says: {first}"
            ) from error
        return graph


# A library keeps a workspace for each stream that it was called on, and a graph the one that it was
# captured with: graphs that may run at a time need streams apart, others had better share one.
_side_streams: dict[tuple[int, int], Any] = {}


def _side_stream(current: Any) -> Any:
    key = current.device_index, current.cuda_stream
    if key not in _side_streams:
        _side_streams[key] = torch.cuda.Stream()
    return _side_streams[key]


def _recover(pool: Any) -> None:
    """After a capture that has failed: torch leaves its allocator and its generators in it."""
    with contextlib.suppress(RuntimeError):
        torch._C._cuda_endAllocateToPool(torch.cuda.current_device(), pool)
    one = torch.zeros(1, device="cuda")
    graph = torch.cuda.CUDAGraph()
    with contextlib.suppress(RuntimeError):
        graph.capture_begin(capture_error_mode="thread_local")
        one.fill_(0)
        graph.capture_end()


def _solve_graph() -> Any:
    return _kernels.modules["cuda"].SolveGraph
