"""What a sweep says at its end."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest
from matplotlib.figure import Figure
from PIL import Image
from rich.console import Console

from lion_models.base.files import save_figure
from lion_models.study import plot as sweep_plot
from lion_models.study.plot import plot_comparison
from lion_models.study.presets import write_measured
from lion_models.study.report import measured_markdown, measured_methods, sweep_tables

pytestmark = pytest.mark.drawn


def row(method: str, data: str, accuracies: list[float], **more: Any) -> dict[str, Any]:
    weights = {"linear": 0, "vpt-deep": 3840, "lion": 3298}[method]
    return {
        "condition": {"data": data},
        "method": method,
        "setting": {"lr": 0.03} | ({"hidden": 8} if method == "lion" else {}),
        "validation_accuracy": 0.5,
        "validation_spread": None,
        "seconds": 1.0,
        "parameters": {"trained": weights + 970, "without_head": weights},
        "chosen": True,
        "test_accuracy": sum(accuracies) / len(accuracies),
        "tests": [{"accuracy": accuracy} for accuracy in accuracies],
    } | more


@pytest.fixture
def content() -> dict[str, Any]:
    tested = [
        row("vpt-deep", "digits", [0.80, 0.84]),
        row("lion", "digits", [0.90, 0.94]),
        row("linear", "digits", [0.70, 0.70]),
        row("vpt-deep", "photos", [0.60, 0.60]),
        row("lion", "photos", [0.50, 0.60]),
        row("linear", "photos", [0.40, 0.44]),
    ]
    lesser = row("lion", "digits", [0.1], chosen=False, setting={"lr": 0.01, "hidden": 8})
    return {
        "options": {"data": "digits"},
        "over": [{"key": "data", "values": ["digits", "photos"], "method": None}],
        "settings": [*reversed(tested), lesser],
        "tested": tested,
    }


def shown(content: dict[str, Any], width: int = 80) -> str:
    console = Console(width=width, record=True, file=io.StringIO())
    for table in sweep_tables(content, "title"):
        console.print(table)
    return console.export_text()


def test_tested_methods_come_by_weights_with_their_mean_over_conditions_for_each_seed(
    content: dict[str, Any],
):
    tested = measured_methods(content)
    assert [one.method for one in tested] == ["linear", "lion", "vpt-deep"]
    assert [one.without_head for one in tested] == [0, 3298, 3840]
    assert tested[1].accuracies == {"digits": [0.90, 0.94], "photos": [0.50, 0.60]}
    assert tested[1].means == pytest.approx([0.70, 0.77])


def test_markdown_has_every_condition_the_mean_the_best_in_bold_and_what_was_chosen(
    content: dict[str, Any],
):
    lines = measured_markdown(content).splitlines()
    assert lines[0] == "| method | no head | digits | photos | mean |"
    assert "| lion | 3,298 | **92.0 ± 2.8** | 55.0 ± 7.1 | 73.5 ± 4.9 |" in lines
    assert "| vpt-deep | 3,840 | 82.0 ± 2.8 | **60.0 ± 0.0** | 71.0 ± 1.4 |" in lines
    assert "| lion | photos | lr 0.03, hidden 8 |" in lines
    assert "2 seeds" in measured_markdown(content)


def test_one_condition_is_called_by_its_data_and_has_no_mean(content: dict[str, Any]):
    content["over"] = []
    content["tested"] = [one | {"condition": {}} for one in content["tested"][:3]]
    assert measured_markdown(content).splitlines()[0] == "| method | no head | digits |"


def test_method_that_misses_a_condition_is_left_out_of_the_means(content: dict[str, Any]):
    content["tested"][1]["test_accuracy"] = None
    assert [one.method for one in measured_methods(content)] == ["linear", "vpt-deep"]


def test_table_shows_what_was_chosen_for_each_condition_in_the_order_of_the_command(
    content: dict[str, Any],
):
    text = shown(content)
    assert "1 more in sweep.json" in text
    rows = [line.split() for line in text.splitlines() if "lion" in line]
    assert rows == [
        ["digits", "lion", "0.03", "8", "50.0%", "3,298", "1.0"],
        ["photos", "lion", "0.03", "8", "50.0%", "3,298", "1.0"],
        ["lion", "3,298", "92.0", "±2.8", "55.0", "±7.1", "73.5"],
    ]


def test_picture_and_markdown_are_written_once_the_test_set_was_read(
    content: dict[str, Any], tmp_path: Path
):
    write_measured(tmp_path, content | {"tested": []})
    assert not list(tmp_path.iterdir())
    write_measured(tmp_path, content)
    assert (tmp_path / "tested.md").read_text() == measured_markdown(content)
    colours = Image.open(tmp_path / "tested.png").convert("RGB").getcolors(2**24) or []
    assert len(colours) > 100  # not a blank page


def test_pictures_mark_the_chosen_setting_among_dots_and_in_a_heat_map(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def setting(method: str, accuracy: float, **values: object) -> dict[str, Any]:
        return {
            "condition": {},
            "method": method,
            "setting": values,
            "validation_accuracy": accuracy,
            "runs": [f"{method}-{accuracy}"],
            "chosen": accuracy == 0.8,
        }

    settings = [setting("linear", 0.8, lr=0.03), setting("linear", 0.7, lr=0.01)]
    settings += [
        setting("lion", (8 - index) / 10, lr=lr, hidden=hidden)
        for index, (lr, hidden) in enumerate([(0.03, 4), (0.03, 8), (0.01, 4), (0.01, 8)])
    ]
    cells = [
        {"run": one["runs"][0], "validation_accuracy": one["validation_accuracy"]}
        for one in settings
    ]
    figures: list[Figure] = []
    monkeypatch.setattr(
        sweep_plot,
        "save_figure",
        lambda path, figure: (figures.append(figure), save_figure(path, figure)),
    )
    content = {
        "settings": settings,
        "seeds": [1],
        "options": {"data": "digits"},
        "cells": cells,
    }
    sweep_plot.plot_sweep(tmp_path / "sweep.png", content)
    [figure] = figures
    dots, heat_map = figure.axes
    assert {label.get_text(): label.get_fontweight() for label in dots.get_yticklabels()} == {
        "lr 0.03": "bold",
        "lr 0.01": "normal",
    }
    assert {text.get_text(): text.get_fontweight() for text in heat_map.texts} == {
        "80.0": "bold", "70.0": "normal", "60.0": "normal", "50.0": "normal"}  # fmt: skip
    assert "bold is chosen" in figure.get_suptitle()


def test_comparison_of_seeds_that_stopped_at_different_epochs_is_drawn(tmp_path: Path):
    cells = [
        {"method": "linear", "test_accuracy": 0.5, "without_head": 0, "curve": curve,
         "traces": {"before": {}, "after": {}}}
        for curve in ([0.1, 0.2, 0.3], [0.3])
    ]  # fmt: skip
    plot_comparison(tmp_path / "compare.png", "title", cells)
    assert (tmp_path / "compare.png").stat().st_size > 10_000


def test_pictures_draw_a_method_that_is_not_registered_here(
    content: dict[str, Any], tmp_path: Path
):
    cell = {"method": "of-a-plugin", "test_accuracy": 0.5, "without_head": 7, "curve": [0.1],
            "traces": {"before": {}, "after": {}}}  # fmt: skip
    plot_comparison(tmp_path / "compare.png", "title", [cell])
    content["tested"] = [one | {"method": "of-a-plugin"} for one in content["tested"][:1]]
    write_measured(tmp_path, content)
    assert "| of-a-plugin | 3,840 |" in (tmp_path / "tested.md").read_text()
    assert (tmp_path / "tested.png").exists()
