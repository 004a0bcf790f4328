"""Exported files give what the trained model gives, for any batch, and say how near they come."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import nn

import deqcore
from benchmarks.lion_memory import STEPS, draw, measure
from lion_models import Lion as LionModel
from lion_models import VPTDeep
from lion_models.backbones import FrozenBackbone
from lion_models.base.errors import UserError
from lion_models.data import decode_image
from lion_models.run import Run, load_run
from lion_models.run.export import export_run, unrolled
from lion_models.run.memory import kept_bytes
from tests.support.command import CLASSES, Lion


@pytest.fixture
def images(trained: Path) -> torch.Tensor:
    return Run.open(trained).validation_images(5)


def test_torch_export_gives_the_models_logits_and_says_how_near(
    lion: Lion, trained: Path, images: torch.Tensor, image_folder: Path
):
    done = lion("export", trained, "--steps", 6)
    assert done.code == 0, done.err
    extra = {"lion.json": ""}
    program = torch.export.load(str(trained / "model.pt2"), extra_files=extra).module()
    metadata = json.loads(extra["lion.json"])
    assert metadata["classes"] == list(CLASSES)
    assert metadata["steps"] == 6
    assert metadata["compared_images"] == 9  # all validation images
    model = load_run(trained).model
    pixels = Run.open(trained).validation_images(64).float() / 255
    with torch.no_grad():
        difference = (program(pixels) - model(pixels)).abs().max().item()
    assert difference == pytest.approx(metadata["difference"], abs=1e-6)
    assert difference < 1e-3
    assert f"{metadata['difference']:.2g} from the trained model" in done.out
    for count in (1, 2, 7):
        torch.testing.assert_close(program(pixels[:count]), program(pixels)[:count])


def test_onnx_gives_the_models_logits_for_any_batch(
    lion: Lion, trained: Path, image_folder: Path, tmp_path: Path
):
    for package in ("onnx", "onnxruntime", "onnxscript"):
        pytest.importorskip(package, reason="the extra [export] is not installed")
    import onnxruntime

    done = lion("export", trained, "--format", "onnx", "--steps", 6, "--output",
                tmp_path / "m.onnx", "--images", image_folder / "dark")  # fmt: skip
    assert done.code == 0, done.err
    session = onnxruntime.InferenceSession(tmp_path / "m.onnx")
    metadata = session.get_modelmeta().custom_metadata_map
    assert json.loads(metadata["classes"]) == list(CLASSES)
    assert json.loads(metadata["compared_images"]) == 12
    pixels = torch.stack(
        [decode_image(path, 1, 12) for path in sorted((image_folder / "dark").iterdir())]
    )
    with torch.no_grad():
        expected = load_run(trained).model(pixels.float() / 255)
    for count in (1, 12):
        [logits] = session.run(["logits"], {"images": (pixels[:count].float() / 255).numpy()})
        torch.testing.assert_close(torch.from_numpy(logits), expected[:count], atol=1e-3, rtol=1e-3)


def test_more_steps_come_nearer_to_the_equilibrium(trained: Path, images: torch.Tensor):
    pixels = images.float() / 255
    with torch.no_grad():
        solved = load_run(trained).model(pixels)
        errors = [
            (unrolled(load_run(trained).model, steps)(pixels) - solved).abs().max().item()
            for steps in (1, 2, 4, 8)
        ]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 1e-3


def test_pruned_layers_are_exported_as_dense_ones(backbone: FrozenBackbone):
    model = LionModel(backbone, 3, hidden=4, iterations=3).eval()
    prompt = model.input_prompt
    assert prompt is not None
    down = prompt.layer.cell.down
    keep = torch.rand(down.weight.shape) > 0.5
    with torch.no_grad():
        down.weight.mul_(keep)
    pattern = deqcore.SparsityPattern.from_mask(keep)
    prompt.layer.cell.down = deqcore.MaskedLinear.from_linear(down, pattern)
    pixels = torch.rand(3, 1, 12, 12)
    with torch.no_grad():
        expected = model(pixels)
        assert isinstance(prompt.layer.cell.down, deqcore.MaskedLinear)
        result = unrolled(model, 5)(pixels)
    assert type(prompt.layer.cell.down) is nn.Linear
    torch.testing.assert_close(result, expected)
    assert prompt.iterations == 3  # explicit layers keep their own number


def test_missing_packages_and_bad_options_are_named(
    lion: Lion, trained: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    missing = lion("export", trained, "--format", "onnx")
    assert missing.code == 2
    assert "needs the package onnx; run: pip install 'deqcore[export]'" in missing.err
    monkeypatch.undo()
    for arguments, message in [
        (("--format", "onx"), "did you mean 'onnx'?"),
        (("--steps", 0), "--steps: expected 1 or more, got 0"),
        (("--output", tmp_path / "no" / "m.pt2"), "does not exist; create it"),
        (("--images", tmp_path / "none"), "no such file or folder"),
    ]:
        outcome = lion("export", trained, *arguments)
        assert outcome.code == 2
        assert message in outcome.err
    assert not list(trained.glob("model.*"))


def test_model_that_cannot_be_traced_is_named(trained: Path, images: torch.Tensor, tmp_path: Path):
    run = load_run(trained)

    def encode(tokens: torch.Tensor) -> torch.Tensor:
        return tokens[:, 0] if tokens.sum() > 0 else tokens[:, 1]

    run.model.backbone.encode = encode
    with pytest.raises(UserError, match=r"torch\.export cannot trace this model"):
        export_run(run, images, tmp_path / "m.pt2", steps=2)
    assert not any(tmp_path.glob("m.pt2*"))


def test_compared_images_are_validation_images(trained: Path):
    run = Run.open(trained)
    everything = run.source.load(run.split.validation)
    assert torch.equal(run.validation_images(100), everything)
    some = run.validation_images(3)
    assert torch.equal(some, everything[[0, 4, 8]])


@pytest.mark.drawn
def test_memory_of_a_step_is_flat_in_solver_steps_and_grows_with_explicit_layers(tmp_path: Path):
    result = measure("tiny-vit", batch=4, prompts=3, hidden=4)
    lion = [one["bytes"] for one in result["figures"]["lion"]]
    taken = [one["taken"] for one in result["figures"]["lion"]]
    explicit = [one["bytes"] for one in result["figures"]["explicit"]]
    assert taken == list(STEPS)
    assert len(set(lion)) == 1
    slopes = [
        (second - first) / (more - less)
        for first, second, less, more in zip(explicit, explicit[1:], STEPS, STEPS[1:], strict=False)
    ]
    assert min(slopes) == pytest.approx(max(slopes), rel=0.01)
    assert min(slopes) > 10_000
    draw(tmp_path / "memory.png", result)
    assert Image.open(tmp_path / "memory.png").size[0] > 500


def test_kept_bytes_counts_the_activations_of_a_known_network(backbone: FrozenBackbone):
    class Squares(VPTDeep):
        """x -> x ** 2 -> mean: autograd keeps x's copy alone."""

        def tuned(self, fixed: torch.Tensor) -> torch.Tensor:
            x = fixed + self.prompts.sum()  # (B, T, D), kept by the square
            return self.head((x * x).mean(1))  # (B, D), kept by the head

    pixels = torch.rand(16, 1, 12, 12)
    model = Squares(backbone, 3)
    tokens = model.frozen(pixels)
    logits = 16 * 3 * 4
    small = kept_bytes(model, pixels) - (tokens.numel() + 16 * 8) * 4
    # Beside those: the log-softmax that the loss keeps, and scalars.
    assert logits <= small <= logits + 64
