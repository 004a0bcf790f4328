"""docs/performance.md is what the committed results give, and comparisons know noise."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from benchmarks import bench_memory
from benchmarks.harness import Report
from benchmarks.report import __main__ as command
from benchmarks.report.pictures import PICTURES, draw_all
from benchmarks.report.results import FOLDER, Results, Run
from benchmarks.report.tables import TABLES, fill

DOCS = Path(__file__).parents[2] / "docs"
PAGE = DOCS / "performance.md"


def test_tables_of_the_page_are_what_the_committed_results_give() -> None:
    assert fill(PAGE.read_text(), Results.read()) == PAGE.read_text(), "python -m benchmarks.report"


def test_a_figure_changed_by_hand_is_noticed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(command, "DOCS", tmp_path)
    page = tmp_path / "performance.md"
    page.write_text(PAGE.read_text())
    assert command.main(["--check"]) == 0
    page.write_text(PAGE.read_text().replace("| 29.34x |", "| 39.34x |"))
    assert command.main(["--check"]) == 1
    assert "run python -m benchmarks.report" in capsys.readouterr().out


def test_a_page_without_a_tables_markers_is_refused() -> None:
    results = Results.read()
    with pytest.raises(ValueError, match="no markers of auto-cpu, "):
        fill("<!-- table: gpu -->\n<!-- end of table -->", results)
    with pytest.raises(ValueError, match="there is no table 'tpu'; there are solvers-cpu, "):
        fill("<!-- table: tpu -->\n<!-- end of table -->", results)


def test_each_picture_is_drawn_committed_and_shown(tmp_path: Path) -> None:
    drawn = list(draw_all(Results.read(), tmp_path))
    assert [path.stem for path in drawn] == list(PICTURES)
    assert sorted(tmp_path.iterdir()) == sorted(drawn)
    for path in drawn:
        assert path.stat().st_size > 10_000
        assert (DOCS / "images" / path.name).exists()
        assert f"(images/{path.name})" in PAGE.read_text()
    assert len(TABLES) == PAGE.read_text().count("<!-- table: ")


def row(work: str, ratio: float, spread: float) -> dict[str, Any]:
    return {
        "work": work,
        "against": "torchdeq",
        "ratio": ratio,
        "p10": ratio * (1 - spread),
        "p90": ratio * (1 + spread),
    }


@pytest.fixture
def compared(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """The exit code and the words of a comparison of two lists of rows."""
    machine = {
        "processor": "some",
        "commit": "0123456",
        "date": "2026-01-01",
        "deqcore": {"isa": "avx2", "torch": "2.13.0"},
    }

    def compare(before: list[dict[str, Any]], after: list[dict[str, Any]]) -> tuple[int, str]:
        files = []
        for name, rows in (("before", before), ("after", after)):
            content = {"machine": machine, "facts": {}, "results": rows}
            (tmp_path / f"{name}.json").write_text(json.dumps(content))
            files.append(str(tmp_path / f"{name}.json"))
        code = command.main(["--compare", *files])
        return code, capsys.readouterr().out

    return compare


def test_what_became_slower_beyond_its_noise_is_named_and_fails(compared) -> None:
    before = [row("G1 step 1x4", 10, 0.02), row("step 2x8", 4, 0.02)]
    code, said = compared(before, [row("step 1x4", 8, 0.02), row("step 2x8", 4, 0.02)])
    assert code == 1
    assert (
        "| step 1x4 | torchdeq | 10.00x (9.80 - 10.20) | 8.00x (7.84 - 8.16) | 0.80 | slower |"
        in said
    )
    assert "1 of 2 became slower" in said


@pytest.mark.parametrize(
    ("ratio", "spread"),
    [
        pytest.param(8, 0.2, id="the spreads overlap"),
        pytest.param(9.7, 0.001, id="less than five percent"),
        pytest.param(13, 0.01, id="faster"),
    ],
)
def test_noise_small_changes_and_what_became_faster_do_not_fail(compared, ratio, spread) -> None:
    code, said = compared([row("step", 10, spread)], [row("step", ratio, spread)])
    assert code == 0
    assert "0 of 1 became slower" in said
    assert said.count("| faster |") == (ratio > 12)


def test_lines_of_one_file_alone_are_named(compared) -> None:
    code, said = compared(
        [row("old", 2, 0.1), row("both", 2, 0.1)], [row("new", 2, 0.1), row("both", 2, 0.1)]
    )
    assert code == 0
    assert "1 lines only in before: old" in said
    assert "1 lines only in after: new" in said


def test_files_that_cannot_be_compared_are_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], compared
) -> None:
    (tmp_path / "other.json").write_text("[]")
    with pytest.raises(SystemExit, match="2"):
        command.main(["--compare", str(tmp_path / "other.json"), str(tmp_path / "gone.json")])
    assert "other.json: expected what `python -m benchmarks --out FILE` writes" in (
        capsys.readouterr().err
    )
    with pytest.raises(SystemExit, match="2"):
        compared([row("old", 2, 0.1)], [row("new", 2, 0.1)])
    assert "before and after have no work in common" in capsys.readouterr().err


def test_a_run_of_a_short_set_compares_with_the_committed_one(tmp_path: Path) -> None:
    """Memory is counted, so that this one may decide."""
    report = Report(short=True)
    bench_memory.run(report)
    report.write(tmp_path / "now.json")
    now, committed = Run.read(tmp_path / "now.json"), Results.read().memory
    assert {re.search(r"\d+", work)[0] for work, _ in now.rows} == {"5", "10"}
    for key, found in now.rows.items():
        assert found["ours"] == pytest.approx(committed.rows[key]["ours"], rel=0.05), key
    files = [str(tmp_path / "now.json"), str(FOLDER / "cpu_memory.json")]
    assert command.main(["--compare", *files]) == 0
