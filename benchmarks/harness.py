"""Timing, memory, verdicts and the two outputs of a benchmark: a table and JSON.

Two or more contestants take turns, round after round, so that a neighbour on a shared machine slows
them alike; ratios are taken round by round. On the CPU one thread's own time is measured
(`time.thread_time`), which waiting does not count towards.
"""

from __future__ import annotations

import json
import math
import platform
import re
import statistics
import subprocess
import time
import weakref
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

import deqcore


@dataclass
class Result:
    """One line of the table.

    Attributes:
        work: what was done, with its shape.
        against: the peer.
        ratio: the peer's cost over ours, median over rounds; p10 and p90 beside it.
        gate: the least ratio asked for, or None where there is no gate.
        ours, peer: median cost of one call, in `unit`.
    """

    work: str
    against: str
    ratio: float
    p10: float
    p90: float
    ours: float
    peer: float
    unit: str
    gate: float | None = None
    note: str = ""

    @property
    def verdict(self) -> str:
        if self.gate is None:
            return "-"
        return "met" if self.ratio >= self.gate else "MISSED"


@dataclass
class Report:
    results: list[Result] = field(default_factory=list)
    facts: dict[str, Any] = field(default_factory=dict)
    previous: dict[tuple[str, str], float] = field(default_factory=dict)
    short: bool = False  # a few small shapes, in a minute

    def compare_with(self, path: Path) -> None:
        """Show the ratios of an earlier run of the same work beside the new ones."""
        for row in json.loads(path.read_text())["results"]:
            self.previous[without_gate(row["work"]), row["against"]] = row["ratio"]

    def add(self, result: Result) -> None:
        before = self.previous.get((without_gate(result.work), result.against))
        if before is not None:
            result.note = f"{result.note} was {before:.2f}x".strip()
        self.results.append(result)
        print(_line(result), flush=True)

    def write(self, path: Path) -> None:
        """JSON with the machine's facts; written to a temporary file first."""
        rows = [asdict(result) | {"verdict": result.verdict} for result in self.results]
        text = json.dumps({"machine": machine(), "facts": self.facts, "results": rows}, indent=2)
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_suffix(".tmp")
        temporary.write_text(text + "\n")
        temporary.replace(path)


def compare(
    work: str,
    contestants: Mapping[str, Callable[[], object]],
    gates: dict[str, float],
    rounds: int = 9,
    seconds: float = 0.04,
    less: Callable[[], object] | None = None,
) -> list[Result]:
    """Time the first contestant against each of the others.

    `seconds` is how long each one runs in a round; `less` is work whose cost is subtracted from all
    (the calls of f in a solve).
    """
    everyone = dict(contestants)
    if less is not None:
        everyone["(less)"] = less
    calls = {name: _calls_for(run, seconds) for name, run in everyone.items()}
    times: dict[str, list[float]] = {name: [] for name in everyone}
    for _ in range(rounds):
        for name, run in everyone.items():
            times[name].append(_time(run, calls[name]))
    if less is not None:
        idle = statistics.median(times.pop("(less)"))
        times = {name: [max(t - idle, 1e-9) for t in ts] for name, ts in times.items()}
    ours, *peers = times
    results = []
    for peer in peers:
        ratios = sorted(p / o for o, p in zip(times[ours], times[peer], strict=True))
        results.append(
            Result(
                work=work,
                against=peer,
                ratio=statistics.median(ratios),
                p10=ratios[math.floor(0.1 * (len(ratios) - 1))],
                p90=ratios[math.ceil(0.9 * (len(ratios) - 1))],
                ours=statistics.median(times[ours]) * 1e6,
                peer=statistics.median(times[peer]) * 1e6,
                unit="us",
                gate=gates.get(peer),
            )
        )
    return results


def share_of_bandwidth(work: str, run: Callable[[], object], moved: int, gate: float) -> Result:
    """Of the copy bandwidth, the share that a run reaches which has ``moved`` bytes to move."""
    copy, copied = _large_copy()
    (result,) = compare(work, {"deqcore": run, "copy bandwidth": copy}, {"copy bandwidth": gate})
    scale = moved / copied
    for name in ("ratio", "p10", "p90", "peer"):
        setattr(result, name, getattr(result, name) * scale)
    return result


def peak_bytes(run: Callable[[], object]) -> int:
    """The most bytes of tensors alive at once during `run`, beyond those alive before it."""
    with _LiveTensors() as live:
        run()
    return live.peak


class _LiveTensors(TorchDispatchMode):
    """Counts the storages that operations create, until they are freed."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self.known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        inputs = torch.utils._pytree.tree_leaves((args, kwargs))
        before = {t.untyped_storage()._cdata for t in inputs if isinstance(t, torch.Tensor)}
        out = func(*args, **(kwargs or {}))
        for tensor in torch.utils._pytree.tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                self._count(tensor.untyped_storage(), before)
        return out

    def _count(self, storage: torch.UntypedStorage, inputs: set[int]) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self.known or key in inputs:
            return
        self.known.add(key)
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._freed, key, size)

    def _freed(self, key: int, size: int) -> None:
        self.known.discard(key)
        self.now -= size


def machine() -> dict[str, Any]:
    """Device, versions and commit: what a figure means nothing without."""
    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty"], capture_output=True, text=True, check=False
    )
    return {
        "processor": _processor(),
        "python": platform.python_version(),
        "commit": commit.stdout.strip() or None,
        "threads": torch.get_num_threads(),
        "date": time.strftime("%Y-%m-%d"),
        "deqcore": deqcore.build_info(),
    }


def copy_bandwidth() -> float:
    """GB/s of a tensor copy from memory to memory, both directions counted.

    256 MB each: what a server's last cache holds of less is copied twice as fast.
    """
    copy, copied = _large_copy()
    best = min(_time(copy, 5) for _ in range(5))
    return copied / best / 1e9


def _large_copy() -> tuple[Callable[[], object], int]:
    """A copy from memory to memory, and the bytes that it reads and writes."""
    source = torch.ones(1 << 26)
    target = torch.empty_like(source)
    return lambda: target.copy_(source), 2 * source.numel() * source.element_size()


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def _calls_for(run: Callable[[], object], seconds: float) -> int:
    run()
    return max(1, math.ceil(seconds / max(_time(run, 1), 1e-6)))


def _time(run: Callable[[], object], calls: int) -> float:
    start = time.thread_time()
    for _ in range(calls):
        run()
    return (time.thread_time() - start) / calls


def header() -> str:
    return (
        f"{'work':44} {'against':22} {'ratio':>7} {'p10':>7} {'p90':>7} {'gate':>6} "
        f"{'verdict':8} {'ours':>10} {'peer':>11}"
    )


def without_gate(work: str) -> str:
    """Work is named after its gate, which may have come since."""
    return re.sub(r"^[GS]\d+ ", "", work)


def _line(r: Result) -> str:
    gate = "-" if r.gate is None else f"{r.gate:g}x"
    return (
        f"{r.work:44} {r.against:22} {r.ratio:6.2f}x {r.p10:6.2f}x {r.p90:6.2f}x {gate:>6} "
        f"{r.verdict:8} {r.ours:8.1f} {r.unit} {r.peer:8.1f} {r.unit} {r.note}"
    )
