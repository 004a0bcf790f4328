"""The tables of docs/performance.md, as Markdown, and the page that they are put into."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from benchmarks.report.results import Results, Run, Training

_AUTO = re.compile(r"auto (?P<sparsity>\d+%) (?P<tokens>\d+)x\d+$")
_MEMORY = re.compile(r"training step memory, (?P<steps>\d+) steps$")
_GATE_OF_CAPTURE = "25x"


def _table(heads: Iterable[str], rows: Iterable[Iterable[str]]) -> list[str]:
    heads = list(heads)
    lines = [heads, ["---"] * len(heads), *map(list, rows)]
    return [f"| {' | '.join(line)} |" for line in lines]


def _gate(row: dict[str, Any]) -> str:
    return "-" if row["gate"] is None else f"{row['gate']:g}x"


def ratios(run: Run, pattern: str) -> list[str]:
    """A line for each row whose work begins like this, with its spread and gate."""
    return _table(
        ("work", "against", "ratio", "p10 - p90", "gate", "verdict", "ours"),
        (
            (
                work, against, f"{row['ratio']:.2f}x", f"{row['p10']:.2f} - {row['p90']:.2f}",
                _gate(row), row["verdict"], f"{row['ours']:,.1f} {row['unit']}",
            )
            for (work, against), row in run.rows.items()
            if re.match(pattern, work)
        ),
    )  # fmt: skip


def auto_grid(run: Run, against: str) -> list[str]:
    """Ratios of `backend="auto"`: tokens down, sparsity across."""
    cells: dict[str, dict[str, str]] = {}
    for (work, peer), row in run.rows.items():
        if peer == against and (found := _AUTO.match(work)):
            cells.setdefault(found["tokens"], {})[found["sparsity"]] = f"{row['ratio']:.2f}"
    heads = next(iter(cells.values()))
    return _table(("tokens", *heads), ((tokens, *line.values()) for tokens, line in cells.items()))


def by_commit(runs: list[Run]) -> list[str]:
    """Every line that the last run has, and what the others had there."""
    last = runs[-1]
    return _table(
        (
            "work", "against", *(f"ratio at {run.commit}" for run in runs),
            "gate", "verdict", "ours",
        ),
        (
            (
                row["work"], key[1],
                *(f"{run.rows[key]['ratio']:.2f}x" if key in run.rows else "-" for run in runs),
                _gate(row), row["verdict"], f"{row['ours']:,.1f} {row['unit']}",
            )
            for key, row in last.rows.items()
        ),
    )  # fmt: skip


def training_steps(training: Training) -> list[str]:
    """Milliseconds of whole training steps, medians."""

    def line(row: dict[str, Any]) -> Iterator[str]:
        batch, dim = row["shape"]
        fixed = row["steps"].startswith("fixed")
        forward, backward = row["eager steps"]
        yield f"MLP {batch}x{dim}"
        yield f"{forward} + {backward}{'' if fixed else ', to the default tolerance'}"
        times = [row[name][0] for name in ("eager", "auto", "torchdeq")]
        yield from (f"{time:#.3g}" for time in times)
        gate = f" (gate {_GATE_OF_CAPTURE})" if fixed and (batch, dim) == (16, 512) else ""
        yield f"{times[2] / times[1]:.0f}x{gate}"

    heads = ("cell", "evaluations", "eager", "captured", "torchdeq", "torchdeq / captured")
    return _table(heads, map(line, training.rows))


def memory(run: Run) -> list[str]:
    """Peak memory of a training step, in states: steps down, contestants across."""
    cells: dict[str, dict[str, float]] = {}
    for (work, against), row in run.rows.items():
        if found := _MEMORY.match(work):
            line = cells.setdefault(found["steps"], {"Implicit": row["ours"]})
            line[against] = row["peer"]
    heads = next(iter(cells.values()))
    rows = ((steps, *(f"{x:.1f}" for x in line.values())) for steps, line in cells.items())
    return _table(("steps", *heads), rows)


TABLES: dict[str, Callable[[Results], list[str]]] = {
    "solvers-cpu": lambda found: ratios(found.cpu, "Anderson|Broyden"),
    "solvers-xeon": lambda found: ratios(found.xeon, "Anderson|Broyden"),
    "memory": lambda found: memory(found.memory),
    "masked-cpu": lambda found: ratios(found.cpu, "masked|values|blocks"),
    "masked-xeon": lambda found: ratios(found.xeon_masked, "masked|values"),
    "auto-xeon": lambda found: auto_grid(found.xeon_masked, "F.linear(x, W*M)"),
    "auto-cpu": lambda found: auto_grid(found.cpu, "F.linear(x, W*M)"),
    "auto-cpu-kept": lambda found: auto_grid(found.cpu, "F.linear, W*M kept"),
    "gpu": lambda found: by_commit(found.gpu),
    "training-gpu": lambda found: training_steps(found.training),
}


def fill(page: str, results: Results) -> str:
    """The page with every table between its two markers made anew.

    Raises:
        ValueError: the page lacks a table's markers, or has those of one that there is not.
    """
    seen: set[str] = set()

    def table(found: re.Match[str]) -> str:
        name = found["name"]
        if name not in TABLES:
            raise ValueError(f"there is no table {name!r}; there are {', '.join(TABLES)}")
        seen.add(name)
        lines = TABLES[name](results)
        return "\n".join([f"<!-- table: {name} -->", "", *lines, "", "<!-- end of table -->"])

    pattern = r"<!-- table: (?P<name>[\w-]+) -->\n.*?<!-- end of table -->"
    filled = re.sub(pattern, table, page, flags=re.DOTALL)
    if missing := TABLES.keys() - seen:
        raise ValueError(f"the page has no markers of {', '.join(sorted(missing))}")
    return filled
