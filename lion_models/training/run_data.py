"""A run's data: opened, split and taken as its configuration says."""

from __future__ import annotations

from lion_models.backbones import FrozenBackbone
from lion_models.data import Source, Split, Task, check_fit, make_task, open_source, split_source
from lion_models.training.config import RunConfig

__all__ = ["open_data", "split_data", "take_task"]


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


def split_data(source: Source, config: RunConfig) -> Split:
    """The rows of a run; see `split_rows`."""
    return split_source(
        source,
        config.seed,
        config.shots,
        config.validation_shots,
        config.test_cap,
        config.imbalance,
    )


def take_task(source: Source, config: RunConfig, backbone: FrozenBackbone) -> Task:
    """A run's training and validation images.

    Raises:
        UserError: the source's images do not fit the backbone, or a class has too few.
    """
    check_fit(source, backbone.channels, backbone.image_size)
    return make_task(
        source,
        config.seed,
        config.shots,
        config.validation_shots,
        config.test_cap,
        config.imbalance,
    )
