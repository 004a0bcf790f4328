"""The README's examples run as they are printed."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

README = (Path(__file__).parents[1] / "README.md").read_text()
EXAMPLES = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)


def run(code: str) -> str:
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=240
    ).stdout


def test_readme_has_a_solver_and_a_tuning_example_of_about_15_lines():
    assert len(EXAMPLES) == 2
    for code in EXAMPLES:
        assert len([line for line in code.splitlines() if line.strip()]) <= 15


def test_solver_example_converges_and_has_a_gradient():
    out = run("import torch; torch.manual_seed(0)\n" + EXAMPLES[0])
    steps = re.search(r"steps per row \[([\d, ]+)\], residuals up to ([\d.e+-]+)", out)
    assert steps, out
    assert len(steps[1].split(",")) == 8
    assert float(steps[2]) < 1e-3
    gradient = re.search(r"backward: \[[\d, ]+\] steps, gradient ([\d.]+)", out)
    assert gradient, out
    assert float(gradient[1]) > 0


def test_tuning_example_learns():
    out = run(EXAMPLES[1])
    accuracy = re.search(r"validation accuracy (\d+)%", out)
    assert accuracy, out
    assert int(accuracy[1]) >= 50, out  # chance is 10


@pytest.mark.parametrize("target", ["demo", "test", "bench"])
def test_commands_named_in_the_readme_exist(target):
    makefile = (Path(__file__).parents[1] / "Makefile").read_text()
    assert f"make {target}" in README
    assert re.search(rf"^{target}:", makefile, flags=re.MULTILINE)
