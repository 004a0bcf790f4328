"""Trained classifiers as torch.export programs and ONNX files, with a fixed number of steps."""

from __future__ import annotations

import importlib.util
import io
import json
import logging
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import deqcore
from lion_models.base.errors import UserError, choose
from lion_models.base.files import write_bytes, write_json
from lion_models.methods.base import TunedClassifier
from lion_models.run.checkpoint import LoadedRun
from lion_models.run.feeding import preprocessing

__all__ = ["FORMATS", "TOLERANCE", "Export", "beside", "export_run", "unrolled"]

FORMATS = {"torch-export": "pt2", "onnx": "onnx"}
METADATA = "lion.json"
# The largest difference of a logit that plain iterations may make, and the numbers of them tried.
TOLERANCE = 0.01
TRIED_STEPS = (5, 10, 20, 40, 80, 160)
# Operators of ONNX that torch's exporter writes without conversion.
OPSET = 18


@dataclass(frozen=True)
class Export:
    """An exported classifier and how far it is from the one in Python.

    Attributes:
        path: of the file.
        metadata: as stored in the file: `classes`, `input`, `preprocessing`, `steps`, and the
            largest differences of a logit over the images that were tried.
    """

    path: Path
    metadata: dict[str, Any]


def unrolled(model: TunedClassifier, steps: int) -> TunedClassifier:
    """Replace, in place, each equilibrium by `steps` plain iterations from zero.

    Plain iterations (Picard's) and not the trained solver's: they are the cell's own operations,
    which every runtime has, while a mixed step solves a small linear system for each image. They
    come to the same equilibrium where the cell contracts; `Export` says how near. Pruned layers
    become dense ones with zeros, for the same reason.

    Args:
        model: changed and returned.
        steps: iterations of each implicit layer; explicit layers keep their own number.
    """
    for prompt in model.implicit_layers.values():
        if prompt.iterations is None:
            prompt.iterations = steps
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, deqcore.MaskedLinear):
                setattr(module, name, child.to_linear())
    return model


def beside(path: Path) -> Path:
    """The JSON file with an exported file's metadata, beside it: model.onnx.json."""
    return path.with_name(f"{path.name}.json")


def export_run(
    run: LoadedRun,
    images: Tensor,
    path: Path,
    form: str = "torch-export",
    steps: int | None = None,
    tolerance: float = TOLERANCE,
) -> Export:
    """Write a classifier as one file, run the file on images, and compare.

    The file maps float32 images (batch, C, S, S) in [0, 1] to logits (batch, classes), for any
    batch of one or more; the backbone's normalisation is inside. How a picture becomes such an
    image is in the metadata; see `preprocessing`.

    Args:
        run: on the CPU; its model's implicit layers are unrolled.
        images: uint8 (n, C, S, S), n >= 2, to compare on.
        path: file to write.
        form: `torch-export` or `onnx`.
        steps: iterations of each implicit layer; None takes as few of 5, 10, 20, 40, 80 and 160 as
            keep within the tolerance, or those that come nearest.
        tolerance: of a logit; more is warned of.

    Raises:
        UserError: a package is missing, or the model cannot be exported.
    """
    choose("format", form, FORMATS)
    if steps is not None and steps < 1:
        raise UserError(f"`steps`: expected 1 or more, got {steps}")
    if form == "onnx":
        _require_onnx()
    pixels = images.float() / 255
    with torch.no_grad():
        solved = run.model.eval()(pixels)
        has_steps = any(p.iterations is None for p in run.model.implicit_layers.values())
        if steps is None:
            steps = _enough_steps(run.model, pixels, solved, tolerance) if has_steps else 1
        model = unrolled(run.model, steps)
        eager = model(pixels)
        metadata: dict[str, Any] = {
            "classes": list(run.classes),
            "method": run.config.method.name,
            "backbone": run.config.backbone.backbone,
            "weights_sha256": run.weights,
            "steps": steps if has_steps else None,
            "preprocessing": preprocessing(
                run.model.backbone, run.config.data.transform, run.levels, run.config.data.draft
            ),
            "input": f"float32 (batch, {', '.join(map(str, pixels.shape[1:]))}) in [0, 1]",
            "compared_images": len(pixels),
            "difference_of_unrolling": _largest(eager, solved),
            "classes_changed_by_unrolling": int((eager.argmax(1) != solved.argmax(1)).sum()),
        }
        build = _torch_export if form == "torch-export" else _onnx
        content, result = build(model, pixels, metadata)
    metadata["difference_of_export"] = _largest(result, eager)
    metadata["difference"] = _largest(result, solved)
    write_bytes(path, content(metadata))
    write_json(beside(path), metadata)
    _warn_of_difference(metadata, tolerance)
    return Export(path, metadata)


def _enough_steps(model: TunedClassifier, pixels: Tensor, solved: Tensor, tolerance: float) -> int:
    """The fewest of `TRIED_STEPS` that come as near, else those that come nearest."""
    layers = [p for p in model.implicit_layers.values() if p.iterations is None]
    errors: dict[int, float] = {}
    for steps in TRIED_STEPS:
        for prompt in layers:
            prompt.iterations = steps
        errors[steps] = _largest(model(pixels), solved)
        if errors[steps] <= tolerance:
            break
    for prompt in layers:
        prompt.iterations = None
    return min(errors, key=lambda steps: (errors[steps] > tolerance, errors[steps], steps))


def _warn_of_difference(metadata: dict[str, Any], tolerance: float) -> None:
    if metadata["difference"] <= tolerance:
        return
    changed, steps = metadata["classes_changed_by_unrolling"], metadata["steps"]
    count = metadata["compared_images"]
    why = ""
    if steps is not None:
        why = (
            f", with {steps} plain iterations in place of the equilibrium; {changed} of {count} "
            "images get another class. Raise `steps`, and if that does not help, the trained "
            "layer does not contract"
        )
    warnings.warn(
        f"the exported file's logits differ from the trained model's by up to "
        f"{metadata['difference']:.2g}{why}",
        stacklevel=3,
    )


def _largest(first: Tensor, second: Tensor) -> float:
    return (first - second).abs().max().item()


# Bytes of the file once the metadata is known, and what the exported model gives for the images.
_Built = tuple[Callable[[dict[str, Any]], bytes], Tensor]


class _Forward(nn.Module):
    """The model as a plain function of images, whatever its class does besides."""

    def __init__(self, model: TunedClassifier) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Tensor:
        return self.model.tuned(self.model.frozen(images))


def _program(model: TunedClassifier, pixels: Tensor) -> torch.export.ExportedProgram:
    batch = torch.export.Dim("batch", min=1)
    try:
        return torch.export.export(
            _Forward(model), (pixels,), dynamic_shapes={"images": {0: batch}}, strict=True
        )
    except Exception as error:
        raise UserError(
            f"export: torch.export cannot trace this model ({type(error).__name__}: "
            f"{str(error).splitlines()[0]}); its backbone or method uses operations that depend "
            "on values"
        ) from error


def _torch_export(model: TunedClassifier, pixels: Tensor, metadata: dict[str, Any]) -> _Built:
    program = _program(model, pixels)

    def content(metadata: dict[str, Any]) -> bytes:
        buffer = io.BytesIO()
        torch.export.save(program, buffer, extra_files={METADATA: json.dumps(metadata)})
        return buffer.getvalue()

    # What is compared is what a reader of the file gets.
    loaded = torch.export.load(io.BytesIO(content(metadata))).module()
    _ = loaded(pixels[:1])
    return content, loaded(pixels)


def _require_onnx() -> None:
    for package in ("onnx", "onnxruntime", "onnxscript"):
        if importlib.util.find_spec(package) is None:
            raise UserError(
                f"`format` onnx: needs the package {package}; run: pip install 'deqcore[export]' "
                "(onnx, onnxruntime, onnxscript), or use `format` torch-export"
            )


_AXES = {
    "images": ("DATA_BATCH", "DATA_CHANNEL", "DATA_FEATURE", "DATA_FEATURE"),
    "logits": ("DATA_BATCH", "DATA_FEATURE"),
}  # ONNX's own words


def _name_axes(graph: Any) -> None:
    """Call the free axis of input and output `batch`, and say what each of the axes is."""
    for value in (*graph.input, *graph.output):
        axes = value.type.tensor_type.shape.dim
        axes[0].dim_param = "batch"
        for axis, word in zip(axes, _AXES[value.name], strict=True):
            axis.denotation = word


def _onnx(model: TunedClassifier, pixels: Tensor, metadata: dict[str, Any]) -> _Built:
    import onnxruntime

    # It tells at length which operators of packages that are not installed it skips.
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        exported = torch.onnx.export(
            _program(model, pixels),
            input_names=["images"],
            output_names=["logits"],
            opset_version=OPSET,
            dynamo=True,
            verbose=False,
        )
    if exported is None:
        raise UserError("export: torch.onnx gave no program; use `format` torch-export")
    proto = exported.model_proto
    _name_axes(proto.graph)

    def content(metadata: dict[str, Any]) -> bytes:
        del proto.metadata_props[:]
        for key, value in metadata.items():
            text = value if isinstance(value, str) else json.dumps(value)
            proto.metadata_props.add(key=key, value=text)
        return proto.SerializeToString()

    session = onnxruntime.InferenceSession(content(metadata), providers=["CPUExecutionProvider"])
    session.run(["logits"], {"images": pixels[:1].numpy()})
    return content, torch.from_numpy(session.run(["logits"], {"images": pixels.numpy()})[0])
