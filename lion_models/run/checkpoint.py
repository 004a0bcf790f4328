"""Checkpoints: safetensors files that hold only what was trained."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from lion_models.backbones import FrozenBackbone, fingerprint, load_backbone
from lion_models.base.errors import UserError
from lion_models.base.files import write_bytes
from lion_models.data.levels import Levels
from lion_models.data.transforms import Geometry
from lion_models.methods.base import TunedClassifier, load_trained, trained_state
from lion_models.run.config import CONFIG, RunConfig, build_model
from lion_models.run.log import METRICS

__all__ = ["CHECKPOINT", "LoadedRun", "load_run", "read_checkpoint", "save_checkpoint"]

CHECKPOINT = "checkpoint.safetensors"
FORMAT = "lion_models 1"
_KEYS = {"format", "method", "config", "backbone", "backbone_sha256", "classes", "normalisation",
         "levels", "sha256"}  # fmt: skip


@dataclass(frozen=True)
class LoadedRun:
    """A classifier rebuilt from its checkpoint.

    Attributes:
        model: in eval mode, with the trained weights.
        config: what it was trained with.
        classes: names, in the order of the logits.
        weights: fingerprint of the trained weights.
        levels: how its data's pictures of more than 8 bits were read; see `Geometry`.
    """

    model: TunedClassifier
    config: RunConfig
    classes: tuple[str, ...]
    weights: str
    levels: Levels | None = None

    @property
    def geometry(self) -> Geometry:
        """How pictures become its input."""
        backbone, data = self.model.backbone, self.config.data
        shape = backbone.channels, backbone.image_size
        return Geometry(*shape, data.transform, self.levels, data.draft)


def save_checkpoint(
    path: Path,
    weights: dict[str, Tensor],
    config: RunConfig,
    backbone: FrozenBackbone,
    classes: tuple[str, ...],
    levels: Levels | None = None,
) -> None:
    """Write trained weights and what is needed to use them, to a temporary file, then rename it."""
    metadata = {
        "format": FORMAT,
        "method": config.method.name,
        "config": json.dumps(config.to_dict()),
        "backbone": backbone.name,
        "backbone_sha256": backbone.fingerprint,
        "classes": json.dumps(classes),
        "normalisation": json.dumps(backbone.normalisation),
    }
    if levels is not None:
        metadata["levels"] = json.dumps(levels.to_dict())
    tensors = {name: value.cpu().contiguous() for name, value in weights.items()}
    metadata["sha256"] = _digest(tensors, metadata)
    write_bytes(path, _in_order(save(tensors, metadata)))


def _in_order(content: bytes) -> bytes:
    """A safetensors file with its metadata sorted: the library's order changes from run to run."""
    end = _header_end(content)
    header = json.loads(content[8:end])
    header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the data begins at a multiple of 8
    return len(text).to_bytes(8, "little") + text + content[end:]


def _digest(weights: dict[str, Tensor], metadata: dict[str, str]) -> str:
    """SHA-256 of all but the backbone's name: where that lies may change, and it has its own."""
    facts = {k: v for k, v in sorted(metadata.items()) if k not in ("backbone", "sha256")}
    return hashlib.sha256((json.dumps(facts) + fingerprint(weights)).encode()).hexdigest()


def _header_end(content: bytes) -> int:
    return 8 + int.from_bytes(content[:8], "little")


def read_checkpoint(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata of a checkpoint.

    Raises:
        UserError: no such file, cut off, or not a checkpoint of this package.
    """
    if not path.is_file():
        raise UserError(
            f"{path}: no checkpoint; expected the folder of a finished run, such as "
            "runs/NAME, or of save_pretrained, or its checkpoint file"
        )
    try:
        # Its bytes, not its name: the library opens no path that is not UTF-8.
        content = path.read_bytes()
        weights = load(content)
        metadata = json.loads(content[8 : _header_end(content)]).get("__metadata__", {})
    except (SafetensorError, OSError) as error:
        raise UserError(
            f"{path}: cut off or not a safetensors file ({path.stat().st_size} bytes; "
            f"{error}); copy it again or repeat the run"
        ) from error
    if metadata.get("format") != FORMAT:
        raise UserError(
            f"{path}: a safetensors file, but not a checkpoint of 'lion train' "
            f"(format {metadata.get('format')!r}, expected {FORMAT!r})"
        )
    # Version 0.1.0 wrote no checksum; where its name is damaged, it is one that no version wrote.
    unknown = not metadata.keys() <= _KEYS
    if unknown or metadata.get("sha256", "") not in ("", _digest(weights, metadata)):
        raise UserError(
            f"{path}: damaged: its weights or settings are not those that were written; copy it "
            "again or repeat the run"
        )
    return weights, metadata


def load_run(path: Path, backbone: FrozenBackbone | None = None) -> LoadedRun:
    """Rebuild a trained classifier.

    Args:
        path: a run's folder or its checkpoint file.
        backbone: a loaded one to use; None loads the one that the checkpoint names.

    Raises:
        UserError: no checkpoint, damaged, or trained on another backbone's weights.
    """
    file = path / CHECKPOINT if path.is_dir() else path
    if not file.exists() and (path / CONFIG).is_file():
        raise _unfinished(path)
    weights, metadata = read_checkpoint(file)
    backbone = load_backbone(metadata["backbone"]) if backbone is None else backbone
    if backbone.fingerprint != metadata["backbone_sha256"]:
        raise UserError(
            f"{file}: was trained on backbone '{metadata['backbone']}' with weights "
            f"{metadata['backbone_sha256'][:12]}, but '{backbone.name}' has weights "
            f"{backbone.fingerprint[:12]}; use the original backbone file or train again"
        )
    config = RunConfig.stored(json.loads(metadata["config"]))
    classes = tuple(json.loads(metadata["classes"]))
    model = build_model(config, backbone, len(classes))
    normalisation = json.dumps(model.backbone.normalisation)
    if metadata.get("normalisation", normalisation) != normalisation:
        raise UserError(
            f"{file}: was trained with pixels of mean and deviation {metadata['normalisation']}, "
            f"but '{backbone.name}' normalises by {normalisation}; use the original backbone"
        )
    unfit = (
        f"{file}: its weights do not fit method '{config.method.name}': {{}}; "
        "it was written by another version"
    )
    try:
        load_trained(model, weights)
    except (AttributeError, RuntimeError, ValueError) as error:
        raise UserError(unfit.format(error)) from error
    expected = {name: tuple(value.shape) for name, value in trained_state(model).items()}
    found = {name: tuple(value.shape) for name, value in weights.items()}
    if expected != found:
        raise UserError(unfit.format(sorted(set(expected.items()) ^ set(found.items()))[:4]))
    levels = Levels.from_dict(json.loads(metadata["levels"])) if "levels" in metadata else None
    return LoadedRun(model.eval(), config, classes, fingerprint(weights), levels)


def _unfinished(folder: Path) -> UserError:
    metrics = folder / METRICS
    done = len(metrics.read_text().splitlines()) if metrics.is_file() else 0
    epochs = json.loads((folder / CONFIG).read_text()).get("epochs", "?")
    where = folder.resolve()
    return UserError(
        f"{folder}: is not finished ({done} of {epochs} epochs) and has no checkpoint yet; train "
        f"it on with `resume` `name` {where.name} `runs` {where.parent}"
    )
