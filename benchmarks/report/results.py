"""Committed results, read: what was measured, where, and at which commit."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.harness import without_gate

FOLDER = Path(__file__).parents[1] / "results"


@dataclass(frozen=True)
class Run:
    """What `python -m benchmarks` or `benchmarks.gpu` wrote.

    Attributes:
        name: of its file, without the ending.
        rows: by work (without its gate's name) and peer, in their order.
    """

    name: str
    machine: dict[str, Any]
    facts: dict[str, Any]
    rows: dict[tuple[str, str], dict[str, Any]]

    @classmethod
    def read(cls, path: Path) -> Run:
        """Raises ValueError if the file is none that the benchmarks write."""
        found = json.loads(path.read_text())
        if not isinstance(found, dict) or not {"machine", "results"} <= found.keys():
            raise ValueError(
                f"{path}: expected what `python -m benchmarks --out FILE` writes "
                "(machine, facts, results)"
            )
        rows = {(without_gate(row["work"]), row["against"]): row for row in found["results"]}
        return cls(path.stem, found["machine"], found["facts"], rows)

    @property
    def commit(self) -> str:
        """That of the file's name, if it has one: the machine may have known it by another."""
        named = re.search(r"_([0-9a-f]{7})_", self.name)
        return named[1] if named else str(self.machine["commit"])

    @property
    def device(self) -> str:
        """The GPU, or the processor with the instruction set that was used."""
        if gpu := self.facts.get("device"):
            return str(gpu)
        return f"{self.machine['processor']}, {self.machine['deqcore']['isa']}, one thread"

    def label(self) -> str:
        """What stands in every picture: device, torch, commit, date."""
        torch = self.machine["deqcore"]["torch"]
        return f"{self.device} · torch {torch} · commit {self.commit} · {self.machine['date']}"


@dataclass(frozen=True)
class Training:
    """Whole training steps on a GPU, as a user writes them."""

    device: str
    commit: str
    torch: str
    rows: list[dict[str, Any]]

    @classmethod
    def read(cls, path: Path) -> Training:
        found = json.loads(path.read_text())
        rows = [row for row in found["rows"] if row.get("part") == "training"]
        return cls(found["device"], found["commit"], found["torch"], rows)

    def label(self) -> str:
        return f"{self.device} · torch {self.torch} · commit {self.commit}"


@dataclass(frozen=True)
class Results:
    """All that docs/performance.md is made of."""

    cpu: Run
    xeon: Run  # the solvers on a second processor
    xeon_masked: Run  # and the masked products
    memory: Run
    gpu: list[Run]  # of one GPU, older ones first
    training: Training

    @classmethod
    def read(cls, folder: Path = FOLDER) -> Results:
        gpu = ("h200_1bd15c6_benchmarks.json", "h200_b834a74_benchmarks.json")
        return cls(
            cpu=Run.read(folder / "cpu_zen4.json"),
            xeon=Run.read(folder / "cpu_xeon.json"),
            xeon_masked=Run.read(folder / "cpu_xeon_masked.json"),
            memory=Run.read(folder / "cpu_memory.json"),
            gpu=[Run.read(folder / name) for name in gpu],
            training=Training.read(folder / "h200_b834a74_training.json"),
        )
