"""What the runs of one process share, so that the second run starts at once."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

import torch
from torch import Tensor

from lion_models.backbones import FrozenBackbone, load_backbone
from lion_models.data import Source, open_source
from lion_models.run.config import RunConfig
from lion_models.run.features import FeatureCache

__all__ = ["Workbench", "open_data"]

DECODED_LIMIT_BYTES = 2**30


def open_data(config: RunConfig, backbone: FrozenBackbone) -> Source:
    """Open `config.data` for a backbone; see `open_source`."""
    return open_source(
        config.data,
        backbone.channels,
        backbone.image_size,
        transform=config.transform,
        bad_files=config.bad_files,
        verify=config.verify,
    )


class Workbench:
    """Loaded backbones, opened sources with their decoded images, outputs of frozen parts.

    Args:
        device: where to train: `cpu` or `cuda`.
    """

    def __init__(self, device: str = "cpu") -> None:
        self.device = device
        self.features = FeatureCache()
        self._backbones: dict[str, FrozenBackbone] = {}
        self._sources: dict[tuple[object, ...], Source] = {}

    def backbone(self, config: RunConfig) -> FrozenBackbone:
        """The backbone that a configuration names, on the device."""
        if config.backbone not in self._backbones:
            self._backbones[config.backbone] = load_backbone(config.backbone).to(self.device)
        return self._backbones[config.backbone]

    def source(self, config: RunConfig) -> Source:
        """The data that a configuration names, for its backbone."""
        backbone = self.backbone(config)
        geometry = (backbone.channels, backbone.image_size, config.transform)
        key = (config.data, *geometry, config.bad_files, config.verify)
        if key not in self._sources:
            self._sources[key] = _Remembering(open_data(config, backbone))
        return self._sources[key]


class _Remembering(Source):
    """A source whose images are decoded once, as far as they fit in memory."""

    def __init__(self, source: Source) -> None:
        self.name, self.classes, self.labels = source.name, source.classes, source.labels
        self.official, self.skipped = source.official, source.skipped
        self._source = source
        self._decoded: OrderedDict[int, Tensor] = OrderedDict()

    def load(self, rows: Tensor) -> Tensor:
        missing = [row for row in rows.tolist() if row not in self._decoded]
        loaded = self._source.load(torch.tensor(missing, dtype=torch.int64))
        if len(missing) == len(rows):
            images = loaded
        else:
            found = {row: self._decoded[row] for row in rows.tolist() if row in self._decoded}
            found.update(zip(missing, loaded, strict=True))
            images = torch.stack([found[row] for row in rows.tolist()])
        if loaded.numel() <= DECODED_LIMIT_BYTES // 4:
            self._decoded.update(zip(missing, loaded, strict=True))
        while sum(image.numel() for image in self._decoded.values()) > DECODED_LIMIT_BYTES:
            self._decoded.popitem(last=False)
        return images

    def load_training(self, rows: Tensor) -> Tensor:
        return self._source.load_training(rows)

    def row_names(self) -> Sequence[str]:
        return self._source.row_names()
