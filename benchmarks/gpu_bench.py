"""What all GPU benchmarks share: where they run, how they are timed, what becomes of a failure."""

from __future__ import annotations

import contextlib
import os
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch

from benchmarks.harness import Report, Result
from deqcore.sparse.tune import gpu_seconds

__all__ = ["Bench", "on_trial", "trial_paths"]


@contextlib.contextmanager
def trial_paths() -> Iterator[None]:
    """Calls take the paths that no GPU has run since they were last changed."""
    before = os.environ.get("DEQCORE_CUDA_TRIAL")
    os.environ["DEQCORE_CUDA_TRIAL"] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ["DEQCORE_CUDA_TRIAL"]
        else:
            os.environ["DEQCORE_CUDA_TRIAL"] = before


def on_trial(run: Callable[[], object]) -> Callable[[], object]:
    """The same work on these paths."""

    def on_trial_paths() -> None:
        with trial_paths():
            run()

    return on_trial_paths


@dataclass(frozen=True)
class Bench:
    """Where to run, and how large."""

    report: Report
    device: str
    rounds: int
    largest: int  # elements of a row beyond which shapes are cut

    @property
    def real(self) -> bool:
        return self.device == "cuda"

    def shape(self, batch: int, dim: int) -> tuple[int, int]:
        return (batch, dim) if self.real else (min(batch, 4), min(dim, self.largest))

    def seconds(self, run: Callable[[], object], calls: int) -> float:
        """Of one call, in a row of calls."""
        if not self.real:
            start = time.perf_counter()
            for _ in range(calls):
                run()
            return (time.perf_counter() - start) / calls
        return gpu_seconds(run, calls) / calls

    def times(
        self, contestants: Mapping[str, Callable[[], object]], work: str = ""
    ) -> dict[str, list[float]]:
        """Seconds of a call, round by round. A peer that is absent or fails is left out."""
        calls: dict[str, int] = {}
        for name, run in contestants.items():
            try:
                run()
            except Exception as error:
                if not calls:  # ours, which comes first
                    raise
                self.failed(f"{work} against {name}", error)
                continue
            once = max(self.seconds(run, 2), 1e-6)
            calls[name] = max(1, round(0.02 / once)) if self.real else 1
        taken: dict[str, list[float]] = {name: [] for name in calls}
        for _ in range(self.rounds):
            for name, count in calls.items():
                taken[name].append(self.seconds(contestants[name], count))
        return taken

    def compare(
        self, work: str, contestants: Mapping[str, Callable[[], object]], gates: dict[str, float]
    ) -> None:
        """The first contestant against each of the others; each call of theirs is as much work."""
        try:
            taken = self.times(contestants, work)
        except Exception as error:
            self.failed(work, error)
            return
        ours, *peers = taken
        for peer in peers:
            ratios = sorted(p / o for o, p in zip(taken[ours], taken[peer], strict=True))
            cut = len(ratios) // 10
            self.report.add(
                Result(
                    work, peer, statistics.median(ratios), ratios[cut], ratios[-1 - cut],
                    statistics.median(taken[ours]) * 1e6, statistics.median(taken[peer]) * 1e6,
                    "us", gates.get(peer) if self.real else None,
                )
            )  # fmt: skip

    def failed(self, work: str, error: Exception) -> None:
        """Note what could not be measured, and why; the rest goes on."""
        text = f"{type(error).__name__}: {error}".strip().splitlines()[0]
        self.report.facts.setdefault("failures", {})[work] = text
        print(f"{work}: FAILED: {text}", flush=True)

    def graphed(self, run: Callable[[], object]) -> Callable[[], object]:
        """The same work as a CUDA graph, made by the first call."""
        if not self.real:
            return run
        made: list[Callable[[], object]] = []

        def replay() -> None:
            if not made:
                made.append(self._captured(run))
            made[0]()

        return replay

    def _captured(self, run: Callable[[], object]) -> Callable[[], object]:
        current, stream = torch.cuda.current_stream(), torch.cuda.Stream()
        stream.wait_stream(current)
        graph = torch.cuda.CUDAGraph()
        chosen = torch.backends.cuda.preferred_linalg_library()
        # MAGMA, which would solve the small systems of many rows, cannot be captured.
        torch.backends.cuda.preferred_linalg_library("cusolver")
        try:
            with torch.cuda.stream(stream):  # a capture that fails would leave its stream current
                run()
                with torch.cuda.graph(graph, stream=stream):
                    run()
        finally:
            torch.backends.cuda.preferred_linalg_library(chosen)
        current.wait_stream(stream)
        return graph.replay
