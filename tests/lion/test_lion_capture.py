"""LION's two implicit layers replay their solves in training and evaluation."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from deqcore._layer_graphs import CALLS_BEFORE
from lion_models import Lion
from lion_models.backbones.vit import VisionTransformer, ViTConfig, freeze_vit
from tests.support.captured_layers import Gpu, captured_here, count


@pytest.fixture(params=["host", "graph"])
def gpu(request: Any, monkeypatch: pytest.MonkeyPatch) -> Gpu:
    on_host = request.param == "host"
    gpu = Gpu(torch.device("cpu") if on_host else request.getfixturevalue("cuda_device"))
    captured_here(gpu, monkeypatch.setattr)
    return gpu


def train(model: Lion, device: torch.device, amp: bool) -> list[torch.Tensor]:
    """Losses of a few steps, and outputs between them."""
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-3)
    found = []
    for step in range(CALLS_BEFORE + 3):
        generator = torch.Generator().manual_seed(step)
        images = torch.rand(4, 3, 28, 28, generator=generator).to(device)
        labels = torch.randint(0, 10, (4,), generator=generator).to(device)
        model.train()
        optimizer.zero_grad()
        with torch.autocast(device.type, torch.bfloat16, enabled=amp):
            loss = F.cross_entropy(model.tuned(model.frozen(images)), labels)
        loss.backward()
        nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        with torch.no_grad():
            found += [loss.detach(), model.eval()(images)]
    return found


@pytest.mark.parametrize("amp", [False, True])
def test_lion_trains_with_both_of_its_layers_captured(gpu: Gpu, amp: bool) -> None:
    torch.manual_seed(0)
    config = ViTConfig(image_size=28, patch_size=7, channels=3, dim=48, depth=2, heads=4)
    model = Lion(freeze_vit(VisionTransformer(config), "vit"), 10).to(gpu.device)
    eager = copy.deepcopy(model)
    for prompt in eager.implicit_layers.values():
        prompt.layer.capture = False
    captured, expected = (train(one, gpu.device, amp) for one in (model, eager))
    for a, b in zip(captured, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
    modes = 2  # training and evaluation
    assert [count(prompt.layer) for prompt in model.implicit_layers.values()] == [modes, modes]
