"""The examples run as they stand."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest

from lion_models.backbones import fingerprint

EXAMPLES = Path(__file__).parents[2] / "examples"


def test_tuning_example_learns(capsys: pytest.CaptureFixture[str]):
    names = runpy.run_path(str(EXAMPLES / "tune_frozen_vit.py"))
    assert names["chosen"]["validation_accuracy"] > 0.7
    assert "solver steps per image" in capsys.readouterr().out


def test_network_of_ones_own_is_tuned_through_the_protocol():
    names = runpy.run_path(str(EXAMPLES / "adapt_backbone.py"))
    assert names["chosen"]["validation_accuracy"] > 0.6
    assert names["backbone"].fingerprint == fingerprint(names["network"].state_dict())


@pytest.mark.drawn
def test_folder_of_images_becomes_a_file_that_answers_as_the_run_does(tmp_path: Path):
    for package in ("onnx", "onnxruntime", "onnxscript"):
        pytest.importorskip(package, reason="the extra [export] is not installed")
    from examples import image_folder

    shown = image_folder.main(["--small", "--out", str(tmp_path)])
    assert shown["test"] > 0.5  # chance is 0.25
    assert shown["right"] > 0.5
    assert shown["same"] == 1
    assert (tmp_path / "image_folder.png").stat().st_size > 10_000
