"""What a sweep says at its end: tables for the terminal, and tested.md and tested.png."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich import box
from rich.table import Table

from lion_models.base.files import write_bytes
from lion_models.methods import METHODS
from lion_models.study.plot import plot_tested
from lion_models.study.sweep import short_value

__all__ = ["Measured", "measured_markdown", "measured_methods", "sweep_tables", "write_measured"]

TABLE_ROWS = 40


@dataclass(frozen=True)
class Measured:
    """One method's accuracies on the test set.

    Attributes:
        method: its name.
        without_head: parameters that were trained beside the head. Widths that a condition or a
            setting changes change it; then it is that of the largest model.
        accuracies: by condition, a value for each seed, in the order of the seeds.
    """

    method: str
    without_head: int
    accuracies: dict[str, list[float]]

    @property
    def means(self) -> list[float]:
        """The mean over the conditions of each seed."""
        columns = zip(*self.accuracies.values(), strict=True)
        return [statistics.fmean(column) for column in columns]


def describe(options: Mapping[str, Any]) -> str:
    """`lr 0.03, hidden 8`."""
    return ", ".join(f"{key} {short_value(value)}" for key, value in options.items())


def _condition_name(content: Mapping[str, Any], condition: Mapping[str, Any]) -> str:
    """The value alone where only one option varies; the data's name where none does."""
    if not condition:
        return short_value(content["options"]["data"])
    values = list(condition.values())
    return short_value(values[0]) if len(values) == 1 else describe(condition)


def measured_methods(content: Mapping[str, Any]) -> list[Measured]:
    """The methods whose every condition was tested with every seed, fewest weights first.

    Args:
        content: of sweep.json.
    """
    found: dict[str, dict[str, Any]] = {}
    for row in content["tested"]:
        if row["test_accuracy"] is not None:
            found.setdefault(row["method"], {})[_condition_name(content, row["condition"])] = row
    conditions = max((len(rows) for rows in found.values()), default=0)
    tested = [
        Measured(
            method,
            max(row["parameters"]["without_head"] for row in rows.values()),
            {name: [test["accuracy"] for test in row["tests"]] for name, row in rows.items()},
        )
        for method, rows in found.items()
        if len(rows) == conditions
    ]
    return sorted(tested, key=lambda one: (one.without_head, list(METHODS).index(one.method)))


def write_measured(folder: Path, content: Mapping[str, Any]) -> None:
    """Write tested.md and tested.png, if the test set has been read.

    Args:
        folder: of the sweep.
        content: of sweep.json.
    """
    tested = measured_methods(content)
    if tested:
        write_bytes(folder / "tested.md", measured_markdown(content).encode())
        plot_tested(
            folder / "tested.png",
            {one.method: (one.without_head, one.accuracies) for one in tested},
        )


def _figure(values: Sequence[float]) -> str:
    """`69.9 ± 3.2`, in percent; the sample deviation over the seeds."""
    mean = f"{100 * statistics.fmean(values):.1f}"
    return f"{mean} ± {100 * statistics.stdev(values):.1f}" if len(values) > 1 else mean


def _cells(tested: Sequence[Measured]) -> list[list[str]]:
    """A row for each method: name, parameters, each condition, and the mean where there are two."""
    rows = []
    for one in tested:
        row = [one.method, f"{one.without_head:,}", *map(_figure, one.accuracies.values())]
        rows.append(row + ([_figure(one.means)] if len(one.accuracies) > 1 else []))
    return rows


def _headings(tested: Sequence[Measured]) -> list[str]:
    conditions = list(tested[0].accuracies)
    return ["method", "no head", *conditions] + (["mean"] if len(conditions) > 1 else [])


def measured_markdown(content: Mapping[str, Any]) -> str:
    """Test accuracy of each method and condition, then the settings that validation chose.

    Args:
        content: of sweep.json, with something tested.
    """
    tested = measured_methods(content)
    headings = _headings(tested)
    best = [
        max(statistics.fmean(one.accuracies[condition]) for one in tested)
        for condition in headings[2 : 2 + len(tested[0].accuracies)]
    ]
    lines = [_row(headings), _row(["---"] * len(headings))]
    for one, cells in zip(tested, _cells(tested), strict=True):
        for index, values in enumerate(one.accuracies.values()):
            if statistics.fmean(values) == best[index]:
                cells[2 + index] = f"**{cells[2 + index]}**"
        lines.append(_row(cells))
    seeds = len(content["tested"][0]["tests"])
    lines += [
        "",
        f"Test accuracy (%), mean ± standard deviation of {seeds} seeds; no head: trained "
        "parameters without the classifier. Chosen on validation images:",
        "",
        _row(["method", "condition", "setting"]),
        _row(["---"] * 3),
    ]
    for row in content["tested"]:
        name = _condition_name(content, row["condition"])
        lines.append(_row([row["method"], name, describe(row["setting"]) or "-"]))
    return "\n".join(lines) + "\n"


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def sweep_tables(content: Mapping[str, Any], title: str) -> list[Table]:
    """Settings by validation accuracy, then what was tested.

    Args:
        content: of sweep.json.
        title: of the first table.
    """
    tables = [_validation_table(title, content)]
    tested = measured_methods(content)
    if tested:
        table = _plain_table("test set (%), with what validation chose")
        for index, heading in enumerate(_headings(tested)):
            table.add_column(heading, justify="right" if index else "left", no_wrap=True)
        for cells in _cells(tested):
            if len(tested[0].accuracies) > 1:
                cells[-1] = cells[-1].partition(" ")[0]  # tested.md has the mean's spread
            table.add_row(*(cell.replace("± ", "±") for cell in cells))
        tables.append(table)
    return tables


def _plain_table(title: str) -> Table:
    return Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))


def _validation_table(title: str, content: Mapping[str, Any]) -> Table:
    """All settings, best first; with several conditions those alone that were chosen."""
    several = bool(content["over"])
    rows = [row for row in content["settings"] if row["chosen"] or not several]
    if several:  # in the order of the command
        rows.sort(key=lambda row: [_position(axis, row["condition"]) for axis in content["over"]])
    keys = list(dict.fromkeys(key for row in content["settings"] for key in row["setting"]))
    table = _plain_table(title)
    for heading in (["condition"] if several else []) + ["method"]:
        table.add_column(heading, no_wrap=True)
    counted = {"trained": "trained"} if not several else {}
    counted["no head"] = "without_head"
    for heading in [*keys, "validation", *counted, "seconds"]:
        table.add_column(heading, justify="right", no_wrap=True)
    for row in rows[:TABLE_ROWS]:
        accuracy, spread = row["validation_accuracy"], row["validation_spread"]
        shown = "failed" if accuracy is None else f"{100 * accuracy:.1f}%"
        shown += f" ±{100 * spread:.1f}" if spread is not None else ""
        counts, setting = row["parameters"], row["setting"]
        cells = [_condition_name(content, row["condition"])] if several else []
        cells += [row["method"], *(short_value(setting[k]) if k in setting else "" for k in keys)]
        cells += [
            shown + (" *" if row["chosen"] and not several else ""),
            *(f"{counts[key]:,}" if counts else "-" for key in counted.values()),
            f"{row['seconds']:.1f}" if row["seconds"] is not None else "-",
        ]
        table.add_row(*cells)
    left_out = len(content["settings"]) - min(len(rows), TABLE_ROWS)
    if left_out:
        table.caption = f"{left_out} more in sweep.json"
    return table


def _position(axis: Mapping[str, Any], condition: Mapping[str, Any]) -> int:
    return list(axis["values"]).index(condition[axis["key"]])
