"""The README's examples, as they are printed, and what they come to."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from tests.support.pages import fenced, run_python, text


def test_examples_of_solving_tuning_and_a_loop_of_ones_own_have_about_15_lines():
    examples = [block.code for block in fenced("README.md") if block.language == "python"]
    assert len(examples) == 3
    for code in examples:
        assert len([line for line in code.splitlines() if line.strip()]) <= 15


def test_solver_example_has_a_gradient_and_tuning_example_learns(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)  # the last example saves a model
    torch.manual_seed(0)
    solver, tuning, _ = [output for _, output in run_python("README.md")]
    steps = re.search(r"steps per row \[([\d, ]+)\], residuals up to ([\d.e+-]+)", solver)
    assert steps, solver
    assert len(steps[1].split(",")) == 8
    assert float(steps[2]) < 1e-3
    gradient = re.search(r"backward: \[[\d, ]+\] steps, gradient ([\d.]+)", solver)
    assert gradient, solver
    assert float(gradient[1]) > 0
    accuracy = re.search(r"validation accuracy (\d+)%", tuning)
    assert accuracy, tuning
    assert int(accuracy[1]) >= 50, tuning  # chance is 10


@pytest.mark.parametrize("target", ["demo", "test", "bench"])
def test_commands_that_a_newcomer_needs_are_named(target: str):
    assert f"make {target}" in text("README.md")
