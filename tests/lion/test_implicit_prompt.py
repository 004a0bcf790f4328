"""The implicit layer: parameters, gradients, convergence, and LION around a backbone."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import deqcore
import lion_models
from lion_models.backbones import FrozenBackbone, freeze_vit
from lion_models.base.errors import UserError
from lion_models.methods.base import count_parameters
from lion_models.methods.linear import LinearProbe
from lion_models.methods.lion import SIDES, Lion
from lion_models.methods.vpt import VPTDeep
from lion_models.prompts.implicit_prompt import BottleneckCell, ImplicitPrompt
from tests.support.small import SMALL, small_vit

EXACT = deqcore.Anderson(rtol=1e-13, atol=1e-14, max_steps=200)


def layer_parameters(dim: int, hidden: int) -> int:
    return dim * (2 * hidden + 1) + 2 * hidden + 1


@given(dim=st.integers(1, 40), hidden=st.integers(1, 40))
def test_layer_has_the_documented_number_of_parameters(dim: int, hidden: int):
    count = sum(p.numel() for p in ImplicitPrompt(dim, hidden).parameters())
    assert count == layer_parameters(dim, hidden)


@pytest.mark.parametrize("sides", SIDES)
def test_lion_counts_one_layer_per_side(backbone: FrozenBackbone, sides: str):
    counts = count_parameters(Lion(backbone, 3, sides=sides, hidden=4))
    layers = 2 if sides == "both" else 1
    assert counts.without_head == layers * layer_parameters(SMALL.dim, 4)
    assert counts.head == 3 * SMALL.dim + 3
    assert counts.trained == counts.without_head + counts.head


def test_baselines_have_the_counts_of_their_papers(backbone: FrozenBackbone):
    assert count_parameters(LinearProbe(backbone, 3)).without_head == 0
    vpt = count_parameters(VPTDeep(backbone, 3, prompts=7))
    assert vpt.without_head == SMALL.depth * 7 * SMALL.dim


def test_vpt_prompts_start_in_the_paper_s_range(backbone: FrozenBackbone):
    prompts = VPTDeep(backbone, 3, prompts=200).prompts
    bound = (6 / (SMALL.patch_size**2 + SMALL.dim)) ** 0.5
    assert prompts.abs().max() <= bound
    assert prompts.abs().max() > 0.98 * bound


def test_vpt_needs_blocks(backbone: FrozenBackbone):
    backbone.blocks = ()
    with pytest.raises(UserError, match="needs a backbone made of transformer blocks"):
        VPTDeep(backbone, 3)


def test_vpt_without_prompts_effect_is_the_backbone(backbone: FrozenBackbone):
    """Prompts of each block are dropped after it: the class token alone carries on."""
    model = VPTDeep(backbone, 3, prompts=2).eval()
    tokens = backbone.embed(torch.rand(4, 1, 12, 12))
    x = tokens
    for block, prompts in zip(backbone.blocks, model.prompts, strict=True):
        x = block(torch.cat([x[:, :1], prompts.expand(4, -1, -1), x[:, 1:]], 1))
        x = torch.cat([x[:, :1], x[:, 3:]], 1)
    torch.testing.assert_close(model.tuned(tokens), model.head(backbone.pool(x)))


def test_layer_returns_the_fixed_point_of_its_cell():
    layer = ImplicitPrompt(6, 4, strength=0.7, solver=EXACT).double()
    x = torch.randn(5, 3, 6, dtype=torch.float64)
    z = (layer(x) - x) / layer.strength
    injected = torch.nn.functional.layer_norm(x, (6,))
    torch.testing.assert_close(layer.layer.cell(z, injected), z, rtol=1e-9, atol=1e-11)
    assert layer.layer.report.converged.all()


@pytest.mark.parametrize("hidden", [4, 8, 16])
def test_untrained_solves_converge_in_few_steps(hidden: int):
    layer = ImplicitPrompt(96, hidden)
    layer(torch.randn(32, 17, 96))
    report = layer.layer.report
    assert report.converged.all()
    assert report.steps.max() <= 10


@pytest.mark.parametrize("gain", [1.0, 10.0, 1000.0])
def test_cell_is_bounded_whatever_its_weights(gain: float):
    cell = BottleneckCell(8, 4)
    with torch.no_grad():
        cell.up.weight.mul_(gain)
    z, x = 1e6 * torch.randn(100, 8), torch.randn(100, 8)
    assert cell(z, x).norm(dim=1).max() <= cell.up.weight.norm() * 4**0.5 + 1e-3


def test_gradients_pass_gradcheck():
    layer = ImplicitPrompt(3, 2, strength=0.5, solver=EXACT).double()
    x = torch.randn(1, 2, 3, dtype=torch.float64, requires_grad=True)
    names = [name for name, _ in layer.named_parameters()]
    values = [p.detach().clone().requires_grad_() for p in layer.parameters()]

    def call(x: torch.Tensor, *values: torch.Tensor) -> torch.Tensor:
        return torch.func.functional_call(layer, dict(zip(names, values, strict=True)), (x,))

    assert torch.autograd.gradcheck(call, (x, *values), atol=1e-6)


@pytest.mark.parametrize("sides", SIDES)
def test_lion_gradients_equal_backpropagation_through_many_explicit_steps(sides: str):
    backbone = freeze_vit(small_vit().double(), "small")
    images, labels = torch.rand(4, 1, 12, 12, dtype=torch.float64), torch.tensor([0, 1, 2, 0])
    gradients = []
    for iterations in (None, 60):
        torch.manual_seed(1)
        model = Lion(backbone, 3, sides, 4, 0.5, EXACT, iterations).double()
        torch.nn.functional.cross_entropy(model(images), labels).backward()
        gradients.append({n: p.grad for n, p in model.named_parameters() if p.requires_grad})
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradient, gradients[1][name], rtol=1e-7, atol=1e-10, msg=name)
    assert all(p.grad is None for p in backbone.parameters())


def test_explicit_layers_report_no_trace_and_no_solve(backbone: FrozenBackbone):
    model = Lion(backbone, 3, hidden=4, iterations=2)
    fixed = model.frozen(torch.rand(2, 1, 12, 12))
    assert model.residual_traces(fixed) == {}


def test_traces_fall_to_the_tolerance(backbone: FrozenBackbone):
    model = Lion(backbone, 3, hidden=4)
    fixed = model.frozen(torch.rand(6, 1, 12, 12))
    traces = model.residual_traces(fixed)
    assert set(traces) == {"input", "output"}
    for trace in traces.values():
        assert trace.shape[0] == 6
        assert (trace[:, -1] < 1e-2 * trace[:, 0]).all()


def test_output_side_alone_caches_features_and_input_side_tokens(backbone: FrozenBackbone):
    images = torch.rand(2, 1, 12, 12)
    assert Lion(backbone, 3, "output").frozen(images).shape == (2, SMALL.dim)
    assert Lion(backbone, 3, "both").frozen(images).shape == (2, 5, SMALL.dim)


def colour_network() -> FrozenBackbone:
    """A backbone without tokens: `embed` gives the normalised image."""
    torch.manual_seed(0)
    network = torch.nn.Conv2d(3, 5, 3)
    return FrozenBackbone(
        network, embed=lambda x: 2 * x - 1, encode=lambda x: network(x).relu().mean((2, 3)),
        name="colour", channels=3, image_size=10, token_dim=3, feature_dim=5, space="pixel",
    )  # fmt: skip


@given(channels=st.integers(1, 4), hidden=st.integers(1, 9))
def test_pixel_layer_has_the_documented_number_of_parameters(channels: int, hidden: int):
    layer = ImplicitPrompt(channels, hidden, space="pixel")
    count = sum(p.numel() for p in layer.parameters())
    assert count == channels * (18 * hidden + 1) + 2 * hidden + 1


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("kind", ["noise", "smooth", "black", "stripes"])
def test_untrained_pixel_solves_converge_in_few_steps(channels: int, kind: str):
    images = torch.rand(8, channels, 32, 32)
    if kind == "smooth":
        images = torch.nn.functional.avg_pool2d(images, 7, 1, 3)
    elif kind == "black":
        images = torch.zeros_like(images)
    elif kind == "stripes":
        images = torch.arange(32).remainder(2).float().expand_as(images)
    layer = ImplicitPrompt(channels, 8, space="pixel")
    layer(images)
    assert layer.layer.report.converged.all()
    assert layer.layer.report.steps.max() <= 15


def test_pixel_layer_s_gradients_equal_many_explicit_steps():
    gradients = []
    for iterations in (None, 80):
        torch.manual_seed(1)
        layer = ImplicitPrompt(2, 3, 0.5, EXACT, iterations, "pixel").double()
        x = torch.rand(3, 2, 6, 6, dtype=torch.float64, requires_grad=True)
        layer(x).square().sum().backward()
        gradients.append([x.grad, *(p.grad for p in layer.parameters())])
    for implicit, explicit in zip(*gradients, strict=True):
        torch.testing.assert_close(implicit, explicit, rtol=1e-7, atol=1e-10)


def test_backbone_without_tokens_is_prompted_in_pixels():
    backbone = colour_network()
    model, images = Lion(backbone, 3, hidden=4), torch.rand(2, 3, 10, 10)
    assert model.space == "pixel"
    prompted = backbone.encode(model.input_prompt(2 * images - 1))
    expected = model.head(model.output_prompt(prompted))
    torch.testing.assert_close(model(images), expected)
    expected.sum().backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    with pytest.raises(UserError, match="`space` token: 'colour' has no tokens"):
        Lion(backbone, 3, space="token")
    with pytest.raises(UserError, match="`output_input` embedding: needs tokens as wide"):
        Lion(backbone, 3, output_input="embedding")
    traces = model.residual_traces(model.frozen(images))
    assert set(traces) == {"input", "output"}


def test_vision_transformer_can_be_prompted_in_pixels(backbone: FrozenBackbone):
    model, images = Lion(backbone, 3, hidden=4, space="pixel"), torch.rand(2, 1, 12, 12)
    feature = backbone(model.input_prompt(images))
    torch.testing.assert_close(model(images), model.head(model.output_prompt(feature)))
    counts = count_parameters(model)
    assert counts.without_head == (18 * 4 + 1) + 2 * 4 + 1 + layer_parameters(SMALL.dim, 4)


@pytest.mark.parametrize("sides", ["both", "output"])
@pytest.mark.parametrize("space", ["token", "pixel"])
def test_output_layer_can_be_driven_by_the_embedding(
    sides: str, space: str, backbone: FrozenBackbone
):
    model = Lion(backbone, 3, sides, 4, space=space, output_input="embedding")
    images = torch.rand(2, 1, 12, 12)
    tokens = backbone.embed(images)
    prompted, source = tokens, tokens.mean(1)
    if sides == "both" and space == "token":
        prompted = model.input_prompt(tokens)
    elif sides == "both":
        prompted = backbone.embed(model.input_prompt(images))
        source = prompted.mean(1)
    feature = backbone.encode(prompted)
    z = (model.output_prompt(feature, source) - feature) / model.output_prompt.strength
    injected = torch.nn.functional.layer_norm(source, (SMALL.dim,))
    torch.testing.assert_close(model.output_prompt.layer(injected), z, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(model(images), model.head(model.output_prompt(feature, source)))
    traces = model.residual_traces(model.frozen(images))
    assert len(traces) == (2 if sides == "both" else 1)


def test_lion_models_uses_public_names_of_deqcore_only():
    for path in Path(lion_models.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
                assert node.value.id != "deqcore" or node.attr in deqcore.__all__, path
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("deqcore"):
                assert node.module == "deqcore", path
            if isinstance(node, ast.Import):
                assert not any(a.name.startswith("deqcore.") for a in node.names), path
