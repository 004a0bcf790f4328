"""The examples in small form do what they say, and the notebooks are their scripts."""

from __future__ import annotations

import importlib
import json
import re
import runpy
from pathlib import Path
from typing import Any

import pytest
import torch

from tools.notebooks import EXAMPLES, NAMES, script_of


@pytest.fixture
def extra() -> None:
    for package in ("matplotlib", "sklearn", "skimage", "tqdm", "networkx"):
        pytest.importorskip(package, reason="the extra [examples] is not installed")


def run_main(name: str, out: Path) -> dict[str, Any]:
    return importlib.import_module(f"examples.{name}").main(["--small", "--out", str(out)])


def run_script(name: str, out: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    import matplotlib.pyplot

    matplotlib.use("Agg")
    monkeypatch.setattr("sys.argv", [name, "--small", "--out", str(out)])
    names = runpy.run_path(str(EXAMPLES / f"{name}.py"))
    matplotlib.pyplot.close("all")
    return names


def assert_picture(path: Path) -> None:
    from PIL import Image

    with Image.open(path) as picture:
        assert min(picture.size) > 200


def test_an_implicit_layer_separates_two_moons(tmp_path, monkeypatch, extra):
    shown = run_script("two_moons", tmp_path, monkeypatch)
    assert shown["accuracy"] > 0.93
    assert shown["steps"]["Anderson"] < shown["steps"]["Picard"]
    assert_picture(tmp_path / "two_moons.png")


def test_heat_agrees_with_scipy_and_its_source_is_found(tmp_path, monkeypatch, extra):
    shown = run_script("heat_plate", tmp_path, monkeypatch)
    assert len(shown["differences"]) == 4
    assert max(shown["differences"].values()) < 1e-8
    assert shown["gradient_error"] < 1e-5
    for name in ("x", "y"):
        assert shown["estimate"][name] == pytest.approx(shown["truth"][name], abs=0.05)
    assert torch.get_default_dtype() == torch.float32
    assert_picture(tmp_path / "heat_plate.png")


def test_an_equilibrium_sees_further_than_a_stack_and_keeps_less(tmp_path, extra):
    shown = run_main("flip_flop", tmp_path)
    stack, equilibrium = shown["stack of 8"], shown["equilibrium"]
    assert equilibrium["far"] > 0.9
    assert stack["far"] < 0.7
    assert equilibrium["parameters"] == stack["parameters"]
    assert equilibrium["kilobytes"] < stack["kilobytes"] / 4
    assert_picture(tmp_path / "flip_flop.png")


def test_an_implicit_graph_network_sees_further_than_two_layers(tmp_path, extra):
    shown = run_main("graph_communities", tmp_path)
    assert shown["implicit"] > shown["GCN of 2 layers"] + 0.05
    assert_picture(tmp_path / "graph_communities.png")


def test_a_photograph_is_deblurred(tmp_path, extra):
    shown = run_main("deblur", tmp_path)
    assert shown["equilibrium"] > shown["blurred"] + 2
    assert_picture(tmp_path / "deblur.png")


@pytest.mark.parametrize("name", NAMES)
def test_a_notebook_is_its_script_and_was_run_in_order(name: str):
    text = (EXAMPLES / f"{name}.ipynb").read_text()
    notebook = json.loads(text)
    script = re.sub(r"\n+(?=\n\n# %%)", "", (EXAMPLES / f"{name}.py").read_text())
    assert script_of(notebook) == script, f"{name}.py has changed: run `make notebooks`"
    code = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in code] == list(range(1, len(code) + 1))
    outputs = [output for cell in code for output in cell["outputs"]]
    assert any("image/png" in output.get("data", {}) for output in outputs)
    assert not any(output["output_type"] == "error" for output in outputs)
    assert "/home/" not in text
    assert "site-packages" not in text
    assert len(text) < 300_000
