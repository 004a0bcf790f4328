"""Mistakes that Python code makes with models, tasks and configurations."""

from __future__ import annotations

import pytest
import torch

from lion_models.backbones import FrozenBackbone
from lion_models.errors import UserError
from lion_models.training import RunConfig, build_model
from lion_models.training.config import METHODS


@pytest.mark.parametrize("method", METHODS)
def test_model_called_with_the_bytes_of_a_task_says_what_it_takes(
    method: str, backbone: FrozenBackbone
):
    model = build_model(RunConfig("digits", method=method, prompts=2), backbone, 3)
    images = torch.randint(0, 256, (2, 1, 12, 12), dtype=torch.uint8)
    with pytest.raises(
        UserError, match=r"expected float pixels in \[0, 1\], got torch\.uint8; divide by 255"
    ):
        model(images)
    assert model(images.float() / 255).shape == (2, 3)
    assert model.double()(images.double() / 255).shape == (2, 3)


def test_check_of_pixels_costs_a_compiled_model_no_break(backbone: FrozenBackbone):
    model = build_model(RunConfig("digits", method="linear"), backbone, 3).eval()
    images = torch.rand(2, 1, 12, 12)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(images), model(images))
    exported = torch.export.export(model, (images,)).module()
    torch.testing.assert_close(exported(images), model(images))
