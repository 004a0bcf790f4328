"""A method around a backbone, as one module, for people with a training loop of their own."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, overload

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lion_models.backbones import FrozenBackbone, fingerprint, load_backbone
from lion_models.backbones.config import BackboneConfig
from lion_models.backbones.frozen import Normalisation
from lion_models.backbones.given import freeze_network
from lion_models.base.errors import UserError, choose
from lion_models.data.config import DataConfig
from lion_models.data.levels import Levels
from lion_models.data.transforms import Geometry
from lion_models.methods.base import (
    ParameterCount,
    TunedClassifier,
    count_parameters,
    trained_state,
)
from lion_models.methods.registry import METHODS, MethodConfig, method_named
from lion_models.prompts.pruning import check_prunable, prune_model
from lion_models.run.checkpoint import LoadedRun
from lion_models.run.config import RunConfig, build_model
from lion_models.run.pretrained import read_pretrained, write_pretrained

__all__ = ["PIXELS", "TunedModel", "tune"]

PIXELS = ("unit", "normalised")
NO_DATA = "none"  # what a model that no run trained says of its data
_FROZEN = "classifier.backbone."
_OUTSIDE = 0.1  # beyond [0, 1] by more than this no resampling or jitter goes


class TunedModel(nn.Module):
    """A frozen backbone and what a method trains around it, as one module; `tune` makes it.

    `model(images)` gives logits. Called by Hugging Face's names it answers as their models do:
    `model(pixel_values=..., labels=...)` gives a dictionary of `loss` (mean cross-entropy, where
    there are labels) and `logits`.

    `train()` leaves the backbone in eval mode. A state dict is loaded with or without the frozen
    weights, so that what `trained_state_only` leaves out is no missing key.

    Args:
        classifier: what is trained, around its backbone.
        config: the method's options, and how the backbone is used.
        classes: their names, in the order of the logits.
        pixels: what `images` are: `unit`, in [0, 1], or `normalised`, by the backbone's own mean
            and deviation, as image processors and torchvision's presets give them.
        trained_state_only: whether `state_dict` leaves out the frozen weights, and with it the
            checkpoints of trainers.
        levels: how pictures of more than 8 bits were read; see `Geometry`.

    Attributes:
        classifier, classes, pixels, trained_state_only, levels: as given.
        run_config: `config`, under a name that trainers do not take for a language model's.
    """

    def __init__(
        self,
        classifier: TunedClassifier,
        config: RunConfig,
        classes: Sequence[str],
        pixels: str = "unit",
        trained_state_only: bool = False,
        levels: Levels | None = None,
    ) -> None:
        super().__init__()
        self.classifier = classifier
        self.run_config = config
        self.classes = tuple(classes)
        self.pixels = choose("pixels", pixels, PIXELS)
        self.trained_state_only = trained_state_only
        self.levels = levels
        self._looked_at_pixels = False
        self.register_state_dict_post_hook(_leave_out_frozen)
        self.register_load_state_dict_pre_hook(_fill_in_frozen)

    @overload
    def forward(self, images: Tensor) -> Tensor: ...
    @overload
    def forward(
        self, *, pixel_values: Tensor, labels: Tensor | None = None
    ) -> dict[str, Tensor]: ...
    def forward(
        self,
        images: Tensor | None = None,
        *,
        pixel_values: Tensor | None = None,
        labels: Tensor | None = None,
    ) -> Tensor | dict[str, Tensor]:
        """Logits (B, classes) of images (B, C, S, S), or a dictionary; see the class.

        Args:
            images: float; what `pixels` says.
            pixel_values: the same, by Hugging Face's name.
            labels: int64 (B,), for `loss`.
        """
        if (images is None) == (pixel_values is None):
            raise TypeError(
                "expected model(images) or model(pixel_values=..., labels=...), one of the two"
            )
        if images is not None:
            if labels is not None:
                raise TypeError("labels: go with pixel_values=..., not with images")
            return self._logits(images)
        assert pixel_values is not None
        logits = self._logits(pixel_values)
        if labels is None:
            return {"logits": logits}
        return {"loss": F.cross_entropy(logits, labels), "logits": logits}

    def _logits(self, images: Tensor) -> Tensor:
        if not self._looked_at_pixels and not torch.compiler.is_compiling():
            self._look_at_pixels(images)
        if self.pixels == "normalised":
            mean, std = (_per_channel(value, images) for value in self.backbone.normalisation)
            images = images * std + mean
        return self.classifier(images)

    def _look_at_pixels(self, images: Tensor) -> None:
        """Warn, at the first images, where they are not what was said."""
        self._looked_at_pixels = True
        if self.pixels != "unit" or not images.is_floating_point() or not images.numel():
            return
        low, high = images.amin().item(), images.amax().item()
        if low < -_OUTSIDE or high > 1 + _OUTSIDE:
            warnings.warn(
                f"expected pixels in [0, 1], got {low:.3g} to {high:.3g}. The backbone normalises "
                "them itself: leave that out (do_normalize=False, no Normalize), or say "
                "tune(..., pixels='normalised')",
                stacklevel=5,
            )

    @property
    def backbone(self) -> FrozenBackbone:
        """The frozen network."""
        return self.classifier.backbone

    @property
    def method(self) -> MethodConfig:
        """The method's options."""
        return self.run_config.method

    @property
    def geometry(self) -> Geometry:
        """How pictures become its input: `geometry.picture(image)` fits one of Pillow's."""
        return self._as_run().geometry

    def trainable_parameters(self) -> Iterator[nn.Parameter]:
        """What an optimizer takes: everything that is trained, the head included."""
        return (parameter for _, parameter in self.named_trainable_parameters())

    def named_trainable_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """The same with their names in `named_parameters`."""
        return (pair for pair in self.named_parameters() if pair[1].requires_grad)

    def robust_parameters(self) -> list[nn.Parameter]:
        """The dense matrices of the implicit layers, which CDR acts on; see `RobustOptimizer`."""
        prompts = self.classifier.implicit_layers.values()
        return [matrix for prompt in prompts for matrix in prompt.matrices]

    def count(self) -> ParameterCount:
        """Trained, kept, non-zero, head and frozen parameters."""
        return count_parameters(self.classifier)

    def prune(self, sparsity: float | None = None) -> None:
        """Remove the smallest weights of LION's implicit layers for good.

        What is left are other parameters: make the optimizer anew from `trainable_parameters`.

        Args:
            sparsity: share of each matrix that is removed; None means the method's `sparsity`.

        Raises:
            UserError: no share, or nothing to prune.
        """
        share = getattr(self.method, "sparsity", 0.0) if sparsity is None else sparsity
        if not 0 < share < 1:
            raise UserError(f"sparsity: expected a share above 0 and below 1, got {share}")
        check_prunable(self.classifier)
        prune_model(self.classifier, share)

    def save_pretrained(self, folder: str | Path) -> None:
        """Write what was trained, and nothing of the backbone, to a folder.

        checkpoint.safetensors is that of a run: `lion predict` and `load_run` read it. model.json
        says for people and other programs what it is. Each is written under another name, then
        renamed.

        Args:
            folder: made if it is not there; an older save in it is replaced.

        Raises:
            UserError: the folder is a run's, or cannot be written.
        """
        write_pretrained(Path(folder), self._as_run(), self.pixels)

    @classmethod
    def from_pretrained(
        cls,
        folder: str | Path,
        backbone: str | nn.Module | None = None,
        *,
        trained_state_only: bool = False,
    ) -> TunedModel:
        """The model of a folder that `save_pretrained` wrote, or `lion train`; in eval mode.

        Args:
            folder: with checkpoint.safetensors in it.
            backbone: what it was tuned around: a name, a `FrozenBackbone` or a network, as `tune`
                takes them. None loads it by name; a network that was given has none.
            trained_state_only: see the class.

        Raises:
            UserError: nothing was saved there, it is damaged or of another version, or the backbone
                is another one.
        """
        run, pixels = read_pretrained(Path(folder), backbone)
        model = cls(run.model, run.config, run.classes, pixels, trained_state_only, run.levels)
        return model.eval()

    def _as_run(self) -> LoadedRun:
        weights = fingerprint(trained_state(self.classifier))
        return LoadedRun(self.classifier, self.run_config, self.classes, weights, self.levels)


def tune(
    model: str | nn.Module,
    config: MethodConfig | str,
    classes: int | Sequence[str],
    *,
    image_size: int | None = None,
    normalisation: str | Normalisation = "backbone",
    pixels: str = "unit",
    transform: str = "square",
    checkpoint_backbone: bool = False,
    trained_state_only: bool = False,
) -> TunedModel:
    """A method around a frozen backbone, freshly initialised, for a training loop of your own.

    Only what the method trains has `requires_grad`; torch's generator initialises it.

    Args:
        model: a name or file for `load_backbone`, a `FrozenBackbone`, or a network of timm, of
            torchvision.models or of transformers. A network shares its weights: they are frozen.
        config: options of a method, `LionConfig(hidden=16)`, or its name, `"vpt-deep"`.
        classes: how many, or their names in the order of the labels.
        image_size: height and width of the input in pixels; None means the backbone's own.
        normalisation: the backbone's own, `imagenet` or `half`; for a network also (mean,
            deviation). A model of transformers needs one: its image processor's.
        pixels: what the model is called with: `unit`, pixels in [0, 1], or `normalised`, by the
            backbone's mean and deviation.
        transform: how pictures are fitted to the input, for `geometry`, `lion predict` and the
            record that is saved; see `Geometry`.
        checkpoint_backbone: recompute the frozen blocks in the backward pass: less memory, slower.
        trained_state_only: whether `state_dict` leaves out the frozen weights.

    Raises:
        UserError: unknown names, options that do not fit the backbone, or no class.
    """
    config = _method(config)
    names = _names(classes)
    backbone, named = _backbone(model, image_size, normalisation)
    run = RunConfig(
        DataConfig(NO_DATA, transform=transform),
        BackboneConfig(backbone.name, named, checkpoint_backbone),
        method=config,
    )
    classifier = build_model(run, backbone, len(names))
    return TunedModel(classifier, run, names, pixels, trained_state_only)


def _method(config: MethodConfig | str) -> MethodConfig:
    if isinstance(config, str):
        return method_named(config)()
    if type(config) not in METHODS.values():
        kind: type = config if isinstance(config, type) else type(config)
        shown = kind.__name__
        hint = f"; write {shown}()" if kind in METHODS.values() else ""
        raise UserError(
            f"config: expected options of a method, such as LionConfig(hidden=16), or the name of "
            f"one ({', '.join(METHODS)}), got {shown}{hint}"
        )
    return config


def _names(classes: int | Sequence[str]) -> tuple[str, ...]:
    if isinstance(classes, int) and not isinstance(classes, bool) and classes >= 1:
        return tuple(map(str, range(classes)))
    if isinstance(classes, (bool, int, str)) or not classes or len(set(classes)) < len(classes):
        raise UserError(f"classes: expected 1 or more, or names that differ, got {classes!r}")
    return tuple(map(str, classes))


def _backbone(
    model: str | nn.Module, image_size: int | None, normalisation: str | Normalisation
) -> tuple[FrozenBackbone, str]:
    """The backbone, and the normalisation that has to be put before it."""
    if isinstance(model, nn.Module) and not isinstance(model, FrozenBackbone):
        network = freeze_network(model, image_size=image_size, normalisation=normalisation)
        return network, "backbone"
    if not isinstance(normalisation, str):
        raise UserError(
            "normalisation: a backbone by name knows its own; expected backbone, imagenet or half, "
            f"got {normalisation}"
        )
    if isinstance(model, str):
        return load_backbone(model, image_size=image_size), normalisation
    if not isinstance(model, FrozenBackbone):
        raise UserError(f"model: expected a name or a network, got {type(model).__name__}")
    if image_size not in (None, model.image_size):
        raise UserError(
            f"image_size: '{model.name}' takes {model.image_size} pixels, got {image_size}; load "
            "it for that size"
        )
    return model, normalisation


def _per_channel(value: float | tuple[float, ...], images: Tensor) -> Tensor:
    return images.new_tensor(value).view(-1, 1, 1)


def _leave_out_frozen(
    model: nn.Module, state: dict[str, Any], prefix: str, metadata: Mapping[str, Any]
) -> None:
    if isinstance(model, TunedModel) and model.trained_state_only:
        for key in [key for key in state if key.startswith(prefix + _FROZEN)]:
            del state[key]


def _fill_in_frozen(model: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
    """Where a state has none of the frozen weights, they are those that are there."""
    if any(key.startswith(prefix + _FROZEN) for key in state):
        return
    assert isinstance(model, TunedModel)
    state |= model.backbone.state_dict(prefix=prefix + _FROZEN)
