"""An exported file says how to feed it: whoever follows that alone gets the run's answers."""

from __future__ import annotations

import json
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from lion_models.backbones import FrozenBackbone, freeze_vit
from lion_models.data import decode_image
from lion_models.run import Run, load_run
from lion_models.run.export import export_run
from lion_models.run.feeding import example, preprocessing
from lion_models.run.predict import predict
from tests.support.command import Lion
from tests.support.pictures import followed
from tests.support.small import small_vit

TURNED = 6  # EXIF: by 90 degrees


@pytest.fixture
def photo(tmp_path: Path) -> Path:
    """A long picture in colour, lying on its side, with something else in each corner."""
    pixels = torch.randint(0, 60, (90, 320, 3), generator=torch.Generator().manual_seed(0))
    pixels[:, :100, 0] += 190
    pixels[:45, 200:, 1] += 120
    image = Image.fromarray(pixels.to(torch.uint8).numpy())
    exif = Image.Exif()
    exif[274] = TURNED
    image.save(tmp_path / "photo.png", exif=exif)
    return tmp_path / "photo.png"


@pytest.mark.parametrize("form", ["torch-export", "onnx"])
def test_whoever_follows_the_metadata_alone_gets_the_runs_answer(
    lion: Lion, trained: Path, photo: Path, form: str
):
    if form == "onnx":
        for package in ("onnx", "onnxruntime", "onnxscript"):
            pytest.importorskip(package, reason="the extra [export] is not installed")
    done = lion("export", trained, "--format", form)
    assert done.code == 0, done.err
    file = trained / f"model.{'pt2' if form == 'torch-export' else 'onnx'}"
    loaded = load_run(trained)
    [expected] = predict(loaded, [photo])

    logits, stored = _run(file, form, photo)
    assert stored == json.loads(file.with_name(f"{file.name}.json").read_text())["preprocessing"]
    chances = torch.from_numpy(logits).softmax(1)[0]
    torch.testing.assert_close(
        chances, torch.tensor(expected.probabilities), atol=0.01, rtol=0
    )  # the file's tolerance, and a grey value that is rounded the other way
    cropped = Image.open(photo).convert("L").crop((115, 0, 205, 90)).resize((12, 12))
    assert np.abs(np.asarray(cropped) / 255 - followed(photo, stored)[0, 0]).max() > 0.1

    code = done.out.split("runtime alone:")[1].replace("photo.jpg", str(photo))
    ran = subprocess.run(
        [sys.executable, "-c", code.strip()], capture_output=True, text=True, check=False
    )
    assert ran.stdout.strip() == loaded.classes[expected.best], ran.stderr


def _run(file: Path, form: str, photo: Path) -> tuple[np.ndarray, dict[str, Any]]:
    if form == "onnx":
        import onnxruntime

        session = onnxruntime.InferenceSession(str(file))
        how = json.loads(session.get_modelmeta().custom_metadata_map["preprocessing"])
        assert session.get_inputs()[0].shape == ["batch", 1, 12, 12]
        assert session.get_outputs()[0].shape == ["batch", 3]
        return session.run(["logits"], {"images": followed(photo, how)})[0], how
    extra = {"lion.json": ""}
    network = torch.export.load(str(file), extra_files=extra).module()
    how = json.loads(extra["lion.json"])["preprocessing"]
    return network(torch.from_numpy(followed(photo, how))).detach().numpy(), how


@pytest.mark.parametrize("transform", ["square", "fgvc"])
@pytest.mark.parametrize("channels", [1, 3])
def test_the_printed_example_prepares_pictures_as_training_does(
    photo: Path, transform: str, channels: int
):
    backbone = freeze_vit(small_vit(), "small")
    backbone.channels = channels
    code = example(Path("model.onnx"), "onnx")
    start, end = code.index("import numpy"), code.index("session =")
    names: dict[str, Any] = {}
    exec(code[start:end].replace("import onnxruntime", ""), names)
    how = json.loads(json.dumps(preprocessing(backbone, transform)))
    clear = photo.with_name("clear.png")
    image = Image.open(photo).convert("RGBA")
    image.putalpha(100)
    image.save(clear)
    for path in (photo, clear):
        expected = decode_image(path, channels, 12, transform).float() / 255
        found = torch.from_numpy(names["prepare"](path, how))[0]
        torch.testing.assert_close(found, expected, atol=1e-6, rtol=0)


def test_steps_are_chosen_for_a_tolerance_and_what_misses_it_is_said(trained: Path, tmp_path: Path):
    images = Run.open(trained).validation_images(5)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        near = export_run(load_run(trained), images, tmp_path / "near.pt2").metadata
    assert near["difference"] <= 0.01
    finer = export_run(load_run(trained), images, tmp_path / "f.pt2", tolerance=1e-4).metadata
    assert finer["steps"] >= near["steps"]
    with pytest.warns(UserWarning, match=r"differ from the trained model's by up to .* 1 plain"):
        export_run(load_run(trained), images, tmp_path / "far.pt2", steps=1, tolerance=1e-6)


def test_a_layer_that_does_not_contract_is_exported_with_the_difference_told(
    trained: Path, tmp_path: Path
):
    run = load_run(trained)
    with torch.no_grad():
        for prompt in run.model.implicit_layers.values():
            for matrix in prompt.matrices:
                matrix.mul_(40)
            prompt.strength.fill_(3.0)
    with pytest.warns(UserWarning, match="does not contract"):
        export_run(run, Run.open(trained).validation_images(5), tmp_path / "m.pt2")
    figures = json.loads((tmp_path / "m.pt2.json").read_text())
    assert figures["difference"] > 0.01


def test_normalisation_is_told_for_each_channel(frozen: FrozenBackbone):
    frozen.normalisation = (0.5, 0.25)
    assert preprocessing(frozen, "square")["normalisation"] == {
        "inside": True, "mean": [0.5], "std": [0.25],
    }  # fmt: skip
