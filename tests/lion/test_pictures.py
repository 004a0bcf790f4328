"""Pictures stay legible: no two labels run together, and none leaves the picture."""

from __future__ import annotations

import io
import itertools
from pathlib import Path
from typing import Any

import pytest
from matplotlib.figure import Figure
from matplotlib.text import Text
from rich.console import Console

from lion_models.cli.text import fit_table
from lion_models.run import RunConfig, plots
from lion_models.study import plot
from lion_models.study.report import comparison_table

pytestmark = pytest.mark.drawn

METHODS = ("linear", "vpt-shallow", "vpt-deep", "lion")


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    figures: list[Figure] = []
    for module in (plots, plot):
        monkeypatch.setattr(module, "save_figure", lambda path, figure: figures.append(figure))
    return figures


def check_legible(figure: Figure) -> list[Text]:
    """All texts of a figure, none of which overlaps another or leaves it."""
    figure.canvas.draw()
    texts = [text for axis in figure.axes if axis.axison for text in _texts_of(axis)]
    texts += [text for text in figure.texts if text.get_text()]
    boxes = [(text.get_text(), text.get_window_extent()) for text in texts]
    for name, box in boxes:
        inside = figure.bbox
        assert box.x0 >= -1, f"{name!r} leaves on the left"
        assert box.x1 <= inside.x1 + 1, f"{name!r} leaves on the right"
        assert box.y0 >= -1, f"{name!r} leaves below"
        assert box.y1 <= inside.y1 + 1, f"{name!r} leaves above"
    for (one, first), (other, second) in itertools.combinations(boxes, 2):
        assert not first.padded(-1).overlaps(second.padded(-1)), f"{one!r} meets {other!r}"
    return texts


def _texts_of(axis: Any) -> list[Text]:
    shown = []
    for side, (low, high) in ((axis.xaxis, sorted(axis.get_xlim())),
                              (axis.yaxis, sorted(axis.get_ylim()))):  # fmt: skip
        at = 0 if side is axis.xaxis else 1
        labels = side.get_ticklabels(which="both")
        shown += [label for label in labels if label.get_visible() and label.get_text()
                  and low <= label.get_position()[at] <= high]  # fmt: skip
    return [*shown, axis.title, *(each for each in (axis.xaxis.label, axis.yaxis.label)
                                  if each.get_text())]  # fmt: skip


def report_of(names: list[str]) -> dict[str, Any]:
    count = len(names)
    confusion = [[9 * (a == b) + (b == (a + 1) % count and a % 3 == 0) for b in range(count)]
                 for a in range(count)]  # fmt: skip
    rows = [
        {"class": name, "support": sum(row)} for name, row in zip(names, confusion, strict=True)
    ]
    return {"images": 9 * count, "accuracy": 0.9, "balanced_accuracy": 0.9, "classes": rows,
            "confusion": confusion}  # fmt: skip


def test_of_200_classes_the_20_most_mistaken_are_drawn(drawn: list[Figure]):
    report = report_of([f"species {index:03}" for index in range(200)])
    report["confusion"][150][151] += 40
    plots.plot_confusion(Path("x.png"), report)
    texts = [text.get_text() for text in check_legible(drawn[0])]
    assert "species 150" in texts
    assert "all others" in texts
    assert sum(text.startswith("species") for text in texts) == 40  # on two axes
    assert any("20 of 200 classes" in text for text in texts)
    width, height = drawn[0].get_size_inches()
    assert max(width, height) < 16


@pytest.mark.parametrize("count", [2, 5, 30])
def test_a_name_of_200_letters_leaves_room_for_the_matrix(drawn: list[Figure], count: int):
    plots.plot_confusion(Path("x.png"), report_of([f"{'x' * 190} {i:03}" for i in range(count)]))
    texts = [text.get_text() for text in check_legible(drawn[0])]
    assert any(text.endswith(" 001") and "…" in text for text in texts)
    assert drawn[0].axes[0].get_window_extent().width > 80 * count**0.5


@pytest.mark.parametrize("methods", [2, 4, 6])
def test_labels_of_a_comparison_stay_apart(drawn: list[Figure], methods: int):
    names = [*METHODS, "finetune-last", "finetune"][:methods]
    cells = [
        {"method": name, "seed": 1, "test_accuracy": 0.8 + 0.01 * at, "curve": [0.5, 0.6],
         "without_head": 1_234_567 * at, "traces": {"before": {}, "after": {}}}
        for at, name in enumerate(names)
    ]  # fmt: skip
    plot.plot_comparison(Path("x.png"), f"photos-{'x' * 200}, 20 images a class", cells)
    texts = check_legible(drawn[0])
    pixels_an_inch = 390 / drawn[0].get_size_inches()[0]  # on a phone
    assert min(text.get_fontsize() for text in texts) * pixels_an_inch / 72 > 5.5


def test_a_residual_of_exactly_0_is_said_and_stays_off_the_logarithmic_axis():
    traces = {
        "before": {"input": [[0.0, 0.3, 0.4], [0.0, 0.0, 0.0], [0.0, 0.0, 0.0]]},
        "after": {"input": [[0.1, 0.2, 0.3], [0.01, 0.02, 0.03], [0.0, 0.001, 0.002]]},
    }
    _, [[axis]] = plots.new_figure(4, 4)
    plots.draw_traces(axis, traces)
    untrained, trained = axis.get_legend().get_texts()
    assert untrained.get_text() == "input layer, untrained, 0 from step 2 on"
    assert trained.get_text() == "input layer, trained"
    low, high = axis.get_ylim()
    assert 1e-4 < low < 0.001
    assert 0.3 <= high < 4


@pytest.mark.parametrize("conditions", [1, 2, 5])
def test_labels_of_what_was_tested_are_whole(drawn: list[Figure], conditions: int):
    accuracies = {f"data {'photographs' * 4}-{n}, shots {n}": [0.7, 0.8] for n in range(conditions)}
    plot.plot_tested(Path("x.png"), dict.fromkeys(METHODS, (1234567, accuracies)))
    check_legible(drawn[0])


@pytest.mark.parametrize("losses", [(0.9, 0.5), (1.4, 1.2), (3.0, 0.02), (2.3, 1e-5), (3e14, 0.5)])
def test_numbers_of_a_loss_are_written_in_one_way(drawn: list[Figure], losses: tuple[float, float]):
    history = [
        {"epoch": at, "train_accuracy": 0.5, "validation_accuracy": 0.5, "loss": loss,
         "validation_loss": loss} for at, loss in enumerate(losses, start=1)
    ]  # fmt: skip
    result = {"traces": {"after": {}}, "best_epoch": 1, "validation_accuracy": 0.5}
    plots.plot_run(Path("x.png"), RunConfig.of("digits"), history, result)
    figure = drawn[0]
    check_legible(figure)
    axis = figure.axes[1]
    shown = [label.get_text() for label in axis.get_yticklabels(which="both") if label.get_text()]
    assert len({"\\mathdefault" in text for text in shown}) == 1, shown
    low, high = axis.get_ylim()
    assert sum(low <= tick <= high for tick in axis.get_yticks()) >= 2


@pytest.mark.parametrize("width", [40, 80])
@pytest.mark.parametrize("terminal", [False, True])
def test_tables_fit_and_say_what_is_compared(width: int, terminal: bool):
    row = {"method": "vpt-shallow", "test_accuracy": 0.812, "test_spread": 0.012, "trained": 46_860,
           "without_head": 42_240, "kept_without_head": 42_240, "seconds": 123.4,
           "solver_steps": 5.5, "test_balanced_accuracy": 0.333}  # fmt: skip
    rows = [row, row | {"method": "linear", "without_head": 0, "kept_without_head": 0},
            row | {"method": "vpt-deep"}]  # fmt: skip
    console = Console(width=width, force_terminal=terminal, record=True, file=io.StringIO())
    console.print(fit_table(comparison_table(rows, "photos, 20 images a class"), console))
    text = console.export_text()
    assert all(len(line) <= width for line in text.splitlines())
    for word in ("vpt-shallow", "81.2%", "33.3%", "weights vs", "VPT-deep", "-100%"):
        assert word in text
    assert "…" not in text
