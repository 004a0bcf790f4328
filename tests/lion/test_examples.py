"""The tuning example runs as it stands."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest

EXAMPLE = Path(__file__).parents[2] / "examples" / "tune_frozen_vit.py"


def test_tuning_example_learns(capsys: pytest.CaptureFixture[str]):
    names = runpy.run_path(str(EXAMPLE))
    assert names["chosen"]["validation_accuracy"] > 0.7
    assert "solver steps per image" in capsys.readouterr().out
