"""Features and images that runs share."""

from __future__ import annotations

import pytest
import torch

from lion_models.backbones import FrozenBackbone
from lion_models.data import Task, open_source
from lion_models.methods.base import TunedClassifier
from lion_models.run import Run, RunConfig, build_model
from lion_models.run.features import FeatureCache, Inputs, freeze_images
from lion_models.run.trainer import score
from lion_models.run.workbench import Workbench


def test_features_are_shared_by_runs_with_the_same_frozen_part_alone(
    config: RunConfig, frozen: FrozenBackbone, task: Task, monkeypatch: pytest.MonkeyPatch
):
    features = FeatureCache()
    images, labels = task.train_images, task.train_labels
    computed = []

    def freeze(model: TunedClassifier, some: torch.Tensor) -> torch.Tensor:
        computed.append(len(some))
        return freeze_images(model, some)

    monkeypatch.setattr("lion_models.run.features.freeze_images", freeze)
    for options in ({"method": "linear"}, {"sides": "both"}, {"sides": "output"}):
        model = build_model(config.but(**options), frozen, 3)
        inputs = Inputs(model, images, labels, features=features)
        taken = inputs.take(torch.arange(len(labels)))
        assert torch.equal(taken, freeze_images(model, images))
    # The linear probe and the output side read the same feature; the input side reads tokens.
    # One image gives the size, one of noise tells the frozen part.
    assert computed == [1, 1, 12, 1, 1, 12, 1, 1]


def test_images_are_decoded_once_for_many_runs(config: RunConfig, monkeypatch: pytest.MonkeyPatch):
    from lion_models.data import base

    decoded = []
    real = base.decode_file
    monkeypatch.setattr(
        base, "decode_file", lambda path, *rest: decoded.append(path) or real(path, *rest)
    )
    bench = Workbench()
    first, second = (
        bench.images.images(Run(name, each, bench=bench).source, torch.tensor(rows))[:]
        for name, each, rows in (("a", config, [0, 5, 7]), ("b", config.but(seed=9), [7, 1, 0]))
    )
    assert len(decoded) == len(set(decoded)) == 4
    assert torch.equal(second[0], first[2])
    assert torch.equal(second[2], first[0])
    assert torch.equal(second[1], open_source(config.data.data, 1, 12).load(torch.tensor([1]))[0])


def test_frozen_parts_that_agree_on_a_black_image_are_told_apart(frozen: FrozenBackbone):
    images = torch.randint(0, 256, (4, 1, 12, 12), dtype=torch.uint8)
    images[0] = 0
    features = FeatureCache()
    for method, pad in (("vpt-pad", 1), ("vpt-pad", 3), ("full", 2), ("bias", 2), ("linear", 2)):
        config = RunConfig.from_dict({"data": "digits", "method": method, "pad": pad})
        model = build_model(config, frozen, 3)
        inputs = Inputs(model, images, torch.zeros(4, dtype=torch.int64), features=features)
        assert torch.equal(inputs.take(torch.arange(4)), freeze_images(model, images))


def test_process_without_a_validation_image_adds_nothing(frozen: FrozenBackbone):
    model = build_model(RunConfig.of(data="digits", method="lion"), frozen, 3)
    nothing = freeze_images(model, torch.zeros(1, 1, 12, 12, dtype=torch.uint8))[:0]
    sums = score(model, nothing, torch.zeros(0, dtype=torch.int64))
    assert sums == {"accuracy": 0.0, "loss": 0.0}
