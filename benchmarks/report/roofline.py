"""Operations and bytes of what was timed, and the card's own dense products beside them."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

from benchmarks.report.results import Run

_SIZES = {"float32": 4, "bfloat16": 2}
_PRODUCT = re.compile(
    r"(?P<kind>blocks of 64|unstructured) (?P<dtype>\w+) (?P<sparsity>\d+)% "
    r"(?P<tokens>\d+)x(?P<size>\d+)$"
)
_STEP = re.compile(
    r"(?P<solver>Anderson|Broyden) step (?:k=(?P<stored>\d+) )?(?P<batch>\d+)x(?P<dim>\d+)$"
)
_MEMORY = 5  # of the Anderson steps


@dataclass(frozen=True)
class Point:
    """Work on the roofline: operations, the fewest bytes, seconds."""

    label: str
    operations: float
    bytes: float
    seconds: float


def points(run: Run) -> Iterator[Point]:
    for (work, _), row in run.rows.items():
        if found := _PRODUCT.match(work):
            size, tokens = int(found["size"]), int(found["tokens"])
            kept = size * size * (100 - int(found["sparsity"])) / 100
            moved = _SIZES[found["dtype"]] * (2 * size * tokens + kept)
            label = f"{found['kind']} {found['dtype']} {found['sparsity']}%"
            yield Point(label, 2 * kept * tokens, moved, row["ours"] * 1e-6)
        elif found := _STEP.match(work):
            elements = int(found["batch"]) * int(found["dim"])
            if found["solver"] == "Anderson":
                moved, operations = 2 * _MEMORY + 4, 4 * _MEMORY + 4
            else:
                moved, operations = 2 * int(found["stored"]) + 12, 4 * int(found["stored"]) + 8
            label = f"{found['solver']} step {found['batch']}x{found['dim']}"
            yield Point(label, operations * elements, 4 * moved * elements, row["ours"] * 1e-6)


def dense_peaks(run: Run) -> dict[str, float]:
    """Operations a second of the dense product that stood beside ours, by dtype."""
    peaks: dict[str, float] = {}
    for (work, against), row in run.rows.items():
        if (found := _PRODUCT.match(work)) and against == "F.linear(x, W*M)":
            operations = 2 * int(found["size"]) ** 2 * int(found["tokens"])
            peaks[found["dtype"]] = max(
                peaks.get(found["dtype"], 0.0), operations / (row["peer"] * 1e-6)
            )
    return peaks
