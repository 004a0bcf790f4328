"""What a study says at its end: compare.json and sweep.json, their tables, and tested.md."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rich import box
from rich.table import Table

from lion_models.base.names import written
from lion_models.methods import METHODS
from lion_models.run.config import to_write
from lion_models.run.log import METRICS
from lion_models.study.plan import short_value
from lion_models.study.study import Study
from lion_models.study.trial import Trial

__all__ = [
    "Measured",
    "comparison_content",
    "comparison_table",
    "folds_table",
    "measured_markdown",
    "measured_methods",
    "summarise",
    "sweep_content",
    "sweep_tables",
]

TABLE_ROWS = 40
OF_TRIALS = ("method", "seed", "best_epoch", "epochs", "validation_accuracy", "validation_loss",
             "seconds", "parameters", "solver")  # fmt: skip


def sweep_content(study: Study) -> dict[str, Any]:
    """The content of sweep.json.

    Returns:
        `options`, `seeds`, `grid`, `over`, `settings` (best first), `chosen`, `tested`, `cells` (a
        row for each trial) and `failed`.
    """
    plan, settings = study.plan, study.settings()
    cells = []
    for trial in (trial for row in study.rows for trial in row.trials):
        result = study.results[trial.folder] or {}
        figures = {key: result[key] for key in OF_TRIALS if key in result}
        cells.append({"run": trial.folder.name, "recipe": _recipe(trial)} | figures)
    return {
        "options": _options(study),
        "seeds": list(plan.seeds),
        "grid": [vars(axis) for axis in plan.grid],
        "over": [vars(axis) for axis in plan.over],
        "settings": settings,
        "chosen": [one for one in settings if one["chosen"]],
        "tested": [study.summary(row, test=True) for row in study.tested],
        "cells": cells,
        "failed": study.failed,
    }


def comparison_content(study: Study) -> dict[str, Any]:
    """The content of compare.json: `options`, `cells` (a row for each trial) and `summary`."""
    cells = []
    for trial in (trial for row in study.tested for trial in row.trials):
        result = study.results[trial.folder] or {}
        rows = [json.loads(line) for line in (trial.folder / METRICS).read_text().splitlines()]
        counts = result["parameters"]
        steps = [value for key, value in result["test"].items() if key.startswith("steps_")]
        cells.append(
            {
                "method": result["method"],
                "seed": result["seed"],
                **({"fold": fold} if (fold := trial.config.data.fold) else {}),
                "run": trial.folder.name,
                "recipe": _recipe(trial),
                "test_images": result["test"]["images"],
                "test_accuracy": result["test"]["accuracy"],
                **_balanced_figure([result["test"].get("balanced_accuracy")]),
                "validation_accuracy": result["validation_accuracy"],
                "trained": counts["trained"],
                "without_head": counts["without_head"],
                # Runs of versions without pruning kept everything.
                "kept": counts.get("kept", counts["trained"]),
                "kept_without_head": counts.get("kept_without_head", counts["without_head"]),
                "nonzero_without_head": counts.get("nonzero_without_head", counts["without_head"]),
                "seconds": result["seconds"],
                "solver_steps": statistics.fmean(steps) if steps else None,
                "curve": [row["validation_accuracy"] for row in rows],
                "traces": result["traces"],
            }
        )
    return {"options": _options(study), "cells": cells, "summary": summarise(cells)}


def _balanced_figure(values: Sequence[float | None]) -> dict[str, float]:
    """Their mean by its name; nothing where classes are not unequal in all of them."""
    whole = [value for value in values if value is not None]
    if len(whole) < len(values):
        return {}
    return {"test_balanced_accuracy": statistics.fmean(whole)}


def _options(study: Study) -> dict[str, Any]:
    return to_write({k: v for k, v in study.plan.base.items() if k not in ("method", "seed")})


def _recipe(trial: Trial) -> dict[str, Any]:
    return trial.config.recipe._asdict()


def summarise(cells: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Mean and sample standard deviation over seeds and folds, one row per method.

    Args:
        cells: of compare.json.
    """
    by_method: dict[str, list[Mapping[str, Any]]] = {}
    for cell in cells:
        by_method.setdefault(cell["method"], []).append(cell)
    rows = []
    for method, own in by_method.items():

        def mean(key: str, own: list[Mapping[str, Any]] = own) -> float:
            return statistics.fmean(cell[key] for cell in own)

        accuracies = [cell["test_accuracy"] for cell in own]
        balanced = [cell.get("test_balanced_accuracy") for cell in own]
        rows.append(
            {
                "method": method,
                "seeds": len({cell["seed"] for cell in own}),
                "test_accuracy": mean("test_accuracy"),
                **_balanced_figure(balanced),
                "test_spread": statistics.stdev(accuracies) if len(own) > 1 else None,
                "validation_accuracy": mean("validation_accuracy"),
                **{key: own[0][key] for key in ("without_head", "trained", "kept",
                                                "kept_without_head")},
                "nonzero_without_head": mean("nonzero_without_head"),
                "seconds": mean("seconds"),
                "solver_steps": own[0]["solver_steps"] and mean("solver_steps"),
            }
        )  # fmt: skip
    return rows


def comparison_table(summary: Sequence[Mapping[str, Any]], title: str) -> Table:
    """Test accuracy, trained weights with and without the head, seconds, solver steps.

    Where a method pruned, a column shows the weights that are kept, without the head; where classes
    are unequal, one shows the balanced accuracy. The last but two says how many weights more or
    less than VPT-deep's are trained, without the head.
    """
    pruned = any(row["kept_without_head"] != row["without_head"] for row in summary)
    unequal = any(row.get("test_balanced_accuracy") is not None for row in summary)
    balanced = ["balanced"] if unequal else []
    kept = ["kept"] if pruned else []
    # All columns but these two fit a terminal of 80 characters with lines between them.
    plain: dict[str, Any] = {"box": box.SIMPLE_HEAD, "show_edge": False, "pad_edge": False,
                             "padding": (0, 1, 0, 0)}  # fmt: skip
    looks = plain if balanced or kept else {}
    table = Table(title=title, title_justify="left", **looks)
    table.add_column("method", no_wrap=True)
    weights = ("trained", "no head", *kept, "weights vs\nVPT-deep")
    for heading in ("accuracy", *balanced, *weights, "seconds", "steps"):
        table.add_column(heading, justify="right", no_wrap=True)
    vpt = next((row["without_head"] for row in summary if row["method"] == "vpt-deep"), None)
    for row in summary:
        spread = f" ± {100 * row['test_spread']:.1f}" if row["test_spread"] is not None else ""
        table.add_row(
            row["method"],
            f"{100 * row['test_accuracy']:.1f}%{spread}",
            *([_percent(row.get("test_balanced_accuracy"))] if unequal else []),
            f"{row['trained']:,}",
            f"{row['without_head']:,}",
            *([f"{row['kept_without_head']:,}"] if pruned else []),
            f"{100 * (row['without_head'] / vpt - 1):+.0f}%" if vpt else "",
            f"{row['seconds']:.1f}",
            f"{row['solver_steps']:.1f}" if row["solver_steps"] else "-",
        )
    return table


def folds_table(cells: Sequence[Mapping[str, Any]], title: str) -> Table:
    """Test accuracy on each fold, a column for each method, then mean ± deviation.

    Args:
        cells: of compare.json, each with a `fold`.
        title: of the table.
    """
    methods = list(dict.fromkeys(cell["method"] for cell in cells))
    several = len({cell["seed"] for cell in cells}) > 1
    table = _plain_table(title)
    for heading in ("seed, fold" if several else "fold", "images", *methods):
        table.add_column(heading, justify="right", no_wrap=True)
    draws: dict[tuple[int, int], dict[str, Mapping[str, Any]]] = {}
    for cell in cells:
        draws.setdefault((cell["seed"], cell["fold"]), {})[cell["method"]] = cell
    for (seed, fold), own in sorted(draws.items()):
        images = next(iter(own.values()))["test_images"]
        figures = (_percent(own[each]["test_accuracy"]) for each in methods)
        table.add_row(f"{seed}, {fold}" if several else str(fold), str(images), *figures)
    table.add_section()
    accuracies = {each: [c["test_accuracy"] for c in cells if c["method"] == each]
                  for each in methods}  # fmt: skip
    table.add_row("mean", "", *(_figure(values) for values in accuracies.values()))
    return table


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.1f}%"


@dataclass(frozen=True)
class Measured:
    """One method's accuracies on the test set.

    Attributes:
        method: its name.
        without_head: parameters that were trained beside the head. Widths that a condition or a
            setting changes change it; then it is that of the largest model.
        accuracies: by condition, a value for each seed, in the order of the seeds.
        balanced: the same of balanced accuracies, of conditions where classes are unequal.
    """

    method: str
    without_head: int
    accuracies: dict[str, list[float]]
    balanced: dict[str, list[float]]

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
            {name: values for name, row in rows.items() if (values := _balanced(row))},
        )
        for method, rows in found.items()
        if len(rows) == conditions
    ]
    return sorted(
        tested, key=lambda one: (one.without_head, [*METHODS, one.method].index(one.method))
    )


def _figure(values: Sequence[float]) -> str:
    """`69.9 ± 3.2`, in percent; the sample deviation over the seeds."""
    mean = f"{100 * statistics.fmean(values):.1f}"
    return f"{mean} ± {100 * statistics.stdev(values):.1f}" if len(values) > 1 else mean


def _balanced(row: Mapping[str, Any]) -> list[float]:
    values = [test.get("balanced_accuracy") for test in row["tests"]]
    return [] if None in values else values


def _cells(tested: Sequence[Measured]) -> list[list[str]]:
    """A row for each method: name, parameters, each condition, and the mean where there are two."""
    rows = []
    for one in tested:
        row = [one.method, f"{one.without_head:,}"]
        for condition, values in one.accuracies.items():
            balanced = one.balanced.get(condition)
            row.append(_figure(values) + (f" / {_figure(balanced)}" if balanced else ""))
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
        f"Test accuracy (%), mean ± standard deviation of {seeds} seeds"
        f"{_about_balanced(tested)}; no head: trained parameters without the classifier. Chosen on "
        "validation images:",
        "",
        _row(["method", "condition", "setting"]),
        _row(["---"] * 3),
    ]
    for row in content["tested"]:
        name = _condition_name(content, row["condition"])
        lines.append(_row([row["method"], name, describe(row["setting"]) or "-"]))
    return "\n".join(lines) + "\n"


def _about_balanced(tested: Sequence[Measured]) -> str:
    return ", and after / the balanced one" if any(one.balanced for one in tested) else ""


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(written(cell).replace('|', '&#124;') for cell in cells)} |"


def sweep_tables(content: Mapping[str, Any], title: str) -> list[Table]:
    """Settings by validation accuracy, then what was tested.

    Args:
        content: of sweep.json.
        title: of the first table.
    """
    tables = [_validation_table(title, content)]
    tested = measured_methods(content)
    if tested:
        table = _plain_table(f"test set (%), with what validation chose{_about_balanced(tested)}")
        for index, heading in enumerate(_headings(tested)):
            table.add_column(heading, justify="right" if index else "left", no_wrap=True)
        for cells in _cells(tested):
            if len(tested[0].accuracies) > 1:
                cells[-1] = cells[-1].partition(" ")[0]  # tested.md has the mean's spread
            table.add_row(*(cell.replace("± ", "±").replace(" / ", "/") for cell in cells))
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
