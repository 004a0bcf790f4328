"""What the runs of one process share, so that the second run starts at once."""

from __future__ import annotations

from typing import Literal
from weakref import WeakSet

import torch

from lion_models.backbones import FrozenBackbone, load_backbone
from lion_models.data import Source, open_source
from lion_models.data.config import DataConfig
from lion_models.data.levels import Levels, parse_range
from lion_models.data.loader import IMAGE_CACHE, ImageCache
from lion_models.run.data_record import levels_of
from lion_models.run.features import FeatureCache

__all__ = ["Workbench"]

MOST_WORKERS = 8  # by default; more decode faster than a GPU tunes


class Workbench:
    """Loaded backbones, opened sources, decoded images, outputs of frozen parts.

    Args:
        device: where to train: `cpu`, `cuda`, `cuda:1` or `mps`.
        workers: processes that decode images ahead of a pass over them; None means none on the
            CPU, which has enough to do, and otherwise as many as torch has threads, 8 at most.
        image_cache: GiB of decoded images to keep.

    Attributes:
        images, features: what is kept of images, and of frozen parts' outputs.
        looked_at: sources that were judged by what the backbone sees of them.
    """

    def __init__(
        self, device: str = "cpu", workers: int | None = None, image_cache: float = IMAGE_CACHE
    ) -> None:
        if workers is None:
            workers = 0 if device == "cpu" else min(MOST_WORKERS, torch.get_num_threads())
        self.device = device
        self.images = ImageCache(image_cache, workers)
        self.features = FeatureCache()
        self.looked_at: WeakSet[Source] = WeakSet()
        self._backbones: dict[str, FrozenBackbone] = {}
        self._sources: dict[tuple[object, ...], Source] = {}

    def backbone(self, name: str) -> FrozenBackbone:
        """What `load_backbone` gives for a name, on the device."""
        if name not in self._backbones:
            self._backbones[name] = load_backbone(name).to(self.device)
        return self._backbones[name]

    def source(
        self,
        data: DataConfig,
        backbone: FrozenBackbone,
        levels: Levels | Literal["auto"] | None = "auto",
    ) -> Source:
        """The data that is asked for, as a backbone takes it; see `open_source` for `levels`."""
        if data.value_range is not None:
            levels = parse_range(data.value_range)
        shape = backbone.channels, backbone.image_size
        reading = {key: getattr(data, key) for key in ("transform", "bad_files", "verify", "draft")}

        def key(rule: object) -> tuple[object, ...]:
            return (data.data, *shape, *reading.values(), rule)

        if key(levels) not in self._sources:
            source = open_source(data.data, *shape, levels=levels, **reading)
            self._sources[key(levels)] = source
            # Those who ask for a rule, and those who ask for what is found, share one source.
            rule = levels_of(source)
            self._sources[key(rule)] = source
            if getattr(source, "own_levels", rule) == rule:
                self._sources[key("auto")] = source
        return self._sources[key(levels)]
