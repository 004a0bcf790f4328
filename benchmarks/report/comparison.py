"""Two files of results, before and after: what became slower beyond its noise."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from benchmarks.report.results import Run

# Of the ratio to the peer, which stands still where ours does. Smaller changes are not named.
THRESHOLD = 1.05


@dataclass(frozen=True)
class Change:
    """One line of both files: ratios of the peer's time, or memory, over ours.

    Attributes:
        factor: the ratio after over the ratio before: below 1, ours became slower beside its peer.
        verdict: "slower" or "faster" where the factor is beyond the threshold and the two runs'
            p10 - p90 of their repetitions do not overlap, else "within noise".
    """

    work: str
    against: str
    before: dict[str, Any]
    after: dict[str, Any]

    @property
    def factor(self) -> float:
        return float(self.after["ratio"] / self.before["ratio"])

    @property
    def verdict(self) -> str:
        if self.factor < 1 / THRESHOLD and self.after["p90"] < self.before["p10"]:
            return "slower"
        if self.factor > THRESHOLD and self.after["p10"] > self.before["p90"]:
            return "faster"
        return "within noise"


def compare(before: Run, after: Run) -> list[Change]:
    """The lines that both have, the worst first.

    Raises:
        ValueError: they have none in common.
    """
    both = [key for key in after.rows if key in before.rows]
    if not both:
        raise ValueError(f"{before.name} and {after.name} have no work in common")
    changes = [Change(*key, before.rows[key], after.rows[key]) for key in both]
    return sorted(changes, key=lambda change: change.factor)


def describe(before: Run, after: Run, changes: list[Change]) -> Iterator[str]:
    """As Markdown, for a terminal or the summary of a workflow."""
    yield f"before: {before.label()}"
    yield f"after: {after.label()}"
    if before.device != after.device:
        yield "two devices: ratios to a peer differ between them without any change of ours"
    yield ""
    yield "| work | against | before | after | factor | |"
    yield "| --- | --- | --- | --- | --- | --- |"
    for change in changes:
        yield (
            f"| {change.work} | {change.against} | {_spread(change.before)} | "
            f"{_spread(change.after)} | {change.factor:.2f} | {change.verdict} |"
        )
    yield ""
    for names, run in ((before.rows.keys() - after.rows.keys(), before),
                       (after.rows.keys() - before.rows.keys(), after)):  # fmt: skip
        if names:
            works = ", ".join(sorted(work for work, _ in names))
            yield f"{len(names)} lines only in {run.name}: {works}"
    slower = sum(change.verdict == "slower" for change in changes)
    beyond = f"by more than {THRESHOLD - 1:.0%} and their noise"
    yield f"{slower} of {len(changes)} became slower {beyond}"


def _spread(row: dict[str, Any]) -> str:
    return f"{row['ratio']:.2f}x ({row['p10']:.2f} - {row['p90']:.2f})"
