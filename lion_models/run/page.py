"""report.html: what came out of a run, on one page that needs no network and no other file."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from lion_models.base.files import write_bytes
from lion_models.run.balance import accuracy_text
from lion_models.run.config import RunConfig
from lion_models.run.reliability import address, confused_pairs

__all__ = ["write_page"]

STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; color: #222; max-width: 62rem; margin: 2rem auto;
       padding: 0 1rem }
h1 { font-size: 1.5rem } h2 { font-size: 1.15rem; margin-top: 2rem }
table { border-collapse: collapse } td, th { padding: .2rem .8rem .2rem 0; text-align: left;
       vertical-align: top; overflow-wrap: anywhere }
td.n, th { overflow-wrap: normal } td.n { white-space: nowrap }
td.n, th.n { text-align: right; font-variant-numeric: tabular-nums }
svg { max-width: 100%; height: auto } .scroll { overflow-x: auto }
.scroll img { max-width: max(100%, 44rem); height: auto }
.mistakes { display: flex; flex-wrap: wrap; gap: 1rem }
figure { margin: 0; width: 9rem; overflow-wrap: anywhere; font-size: 13px }
figure img { width: 8rem; image-rendering: pixelated; border: 1px solid #ccc }
"""


def write_page(
    path: Path,
    config: RunConfig,
    result: Mapping[str, Any],
    report: Mapping[str, Any],
    pictures: Mapping[str, Path],
) -> None:
    """Write the page of a finished run.

    Args:
        path: of the page.
        config: the run's.
        result: content of result.json.
        report: content of report.json; empty where the test set was not read.
        pictures: PNG files by the heading above them; those that are not there are left out.
    """
    title = f"{config.method.name} on {config.data.data}"
    parts = [f"<h1>{escape(title)}</h1>", _summary(config, result, report)]
    for heading, picture in pictures.items():
        if picture.is_file():
            image = f'<img alt="{escape(heading)}" src="{address(picture.read_bytes())}">'
            parts.append(_section(heading, f'<div class="scroll">{image}</div>'))
    if "calibration" in report:
        parts.append(_section("Calibration", _reliability(report["calibration"])))
    if report:
        parts.append(_section("Classes that are confused", _pairs(report)))
        parts.append(_section("Classes", _classes(report)))
    if report.get("mistakes"):
        parts.append(_section("Most confident mistakes", _mistakes(report["mistakes"])))
    if result.get("solver"):
        parts.append(_section("Equilibrium solves of the chosen epoch", _solver(result["solver"])))
    rows = ((name, str(value)) for name, value in config.options().items())
    parts.append(_section("Options", _table(("option", "value"), rows)))
    page = (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{STYLE}</style></head><body>\n"
        + "\n".join(parts)
        + "\n</body></html>\n"
    )
    write_bytes(path, page.encode(errors="backslashreplace"))


def _section(heading: str, content: str) -> str:
    return f"<section><h2>{escape(heading)}</h2>\n{content}</section>"


def _table(
    headings: Sequence[str], rows: Iterable[Sequence[str]], numbers: Sequence[int] = ()
) -> str:
    """Texts as a table; the columns in `numbers` end at the right."""

    def line(cells: Sequence[str], tag: str) -> str:
        marked = (
            f"<{tag}{' class=n' * (at in numbers)}>{escape(cell)}</{tag}>"
            for at, cell in enumerate(cells)
        )
        return f"<tr>{''.join(marked)}</tr>"

    body = "\n".join(line(row, "td") for row in rows)
    return f"<table>{line(headings, 'th')}\n{body}</table>"


def _summary(config: RunConfig, result: Mapping[str, Any], report: Mapping[str, Any]) -> str:
    counts, test = result["parameters"], result.get("test")
    facts = {}
    if test:
        facts["test accuracy"] = f"{accuracy_text(test)} of {test['images']} images, read once"
    if report:
        facts["balanced accuracy"] = f"{100 * report['balanced_accuracy']:.1f}%"
        facts["macro F1"] = f"{report['macro_f1']:.3f}"
    if "top5_accuracy" in report:
        facts["class among the best 5"] = f"{100 * report['top5_accuracy']:.1f}%"
    if "calibration" in report:
        facts["calibration error (ECE)"] = f"{100 * report['calibration']['ece']:.1f}%"
    facts["validation accuracy"] = (
        f"{accuracy_text(result, 'validation_')} in epoch {result['best_epoch']} of "
        f"{result['epochs']}, which it chose"
    )
    facts["trained parameters"] = (
        f"{counts['trained']:,}, {counts['without_head']:,} beside the head"
    )
    facts["backbone"] = f"{config.backbone.backbone}, {counts['frozen']:,} frozen parameters"
    facts["training images"] = f"{sum(result['train_images']):,}"
    facts["seconds"] = f"{result['seconds']:.1f} on {result['device']}"
    if result.get("diverged"):
        facts["diverged"] = f"the loss ended at {result['last_loss']:.3g}"
    return _table(("", ""), facts.items())


def _reliability(calibration: Mapping[str, Any]) -> str:
    """Accuracy against confidence as bars, with the diagonal of a calibrated classifier."""
    side, left, below = 300, 45, 40
    shapes = [
        f'<line x1="{left}" y1="{side}" x2="{left + side}" y2="0" stroke="#888" '
        'stroke-dasharray="4"/>',
        f'<path d="M{left} 0V{side}H{left + side}" fill="none" stroke="#222"/>',
    ]
    for one in calibration["bins"]:
        x, width = left + side * one["low"], side * (one["high"] - one["low"])
        height = side * one["accuracy"]
        words = f"{one['images']} images, confidence {one['confidence']:.2f}, accuracy "
        shapes.append(
            f'<rect x="{x + 1:.1f}" y="{side - height:.1f}" width="{width - 2:.1f}" '
            f'height="{height:.1f}" fill="#0072B2" opacity=".75"><title>{words}'
            f"{one['accuracy']:.2f}</title></rect>"
        )
    for at in (0, 0.5, 1):
        shapes.append(f'<text x="{left - 6}" y="{side * (1 - at) + 10 * at:.0f}" '
                      f'text-anchor="end">{at:g}</text>')  # fmt: skip
        shapes.append(f'<text x="{left + side * at:.0f}" y="{side + 16}" '
                      f'text-anchor="middle">{at:g}</text>')  # fmt: skip
    middle = left + side / 2
    shapes.append(f'<text x="{middle}" y="{side + 34}" text-anchor="middle">confidence</text>')
    shapes.append(f'<text x="14" y="{side / 2}" text-anchor="middle" '
                  f'transform="rotate(-90 14 {side / 2})">accuracy</text>')  # fmt: skip
    svg = (
        f'<svg width="{left + side + 20}" viewBox="0 0 {left + side + 20} {side + below}" '
        'font-size="12" role="img" '
        f'aria-label="reliability diagram">{"".join(shapes)}</svg>'
    )
    rows = [
        (f"{one['low']:.1f} to {one['high']:.1f}", str(one["images"]), f"{one['confidence']:.3f}",
         f"{one['accuracy']:.3f}") for one in calibration["bins"]
    ]  # fmt: skip
    table = _table(("confidence", "images", "mean", "accuracy"), rows, (1, 2, 3))
    return f"<p>Expected calibration error {100 * calibration['ece']:.1f}%.</p>{svg}{table}"


def _pairs(report: Mapping[str, Any]) -> str:
    names = [row["class"] for row in report["classes"]]
    pairs = confused_pairs(names, report["confusion"])
    rows = [
        (one["true"], one["predicted"], str(one["images"]), f"{100 * one['share']:.0f}%")
        for one in pairs
    ]
    if not rows:
        return "<p>None.</p>"
    return _table(("true", "taken for", "images", "of the class"), rows, (2, 3))


def _classes(report: Mapping[str, Any]) -> str:
    rows = [
        (row["class"], *(f"{row[key]:.3f}" for key in ("precision", "recall", "f1")),
         str(row["support"])) for row in report["classes"]
    ]  # fmt: skip
    return _table(("class", "precision", "recall", "F1", "images"), rows, (1, 2, 3, 4))


def _mistakes(mistakes: Sequence[Mapping[str, Any]]) -> str:
    figures = [
        f'<figure><img alt="" src="{escape(one["picture"])}"><figcaption>{escape(one["true"])}, '
        f"taken for <b>{escape(one['predicted'])}</b> with {100 * one['confidence']:.0f}%<br>"
        f"{escape(one['file'])}</figcaption></figure>"
        for one in mistakes
    ]
    return f'<div class="mistakes">{"".join(figures)}</div>'


def _solver(solver: Mapping[str, Mapping[str, float]]) -> str:
    keys = list(dict.fromkeys(key for figures in solver.values() for key in figures))
    rows = [
        (side, *(f"{figures[key]:.4g}" if key in figures else "-" for key in keys))
        for side, figures in solver.items()
    ]
    return _table(("layer", *keys), rows, range(1, len(keys) + 1))
