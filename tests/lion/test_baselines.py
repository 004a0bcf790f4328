"""The methods that LION is compared with: counts, starts, gradients, and the shared backbone."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import nn

from lion_models.backbones import FrozenBackbone, freeze_vit, load_backbone
from lion_models.backbones.blocks import checkpoint_blocks
from lion_models.base.errors import UserError
from lion_models.methods import METHODS
from lion_models.methods.adapter import Adapters
from lion_models.methods.base import TunedClassifier, count_parameters, trained_state
from lion_models.methods.finetune import FineTune
from lion_models.methods.lion import Lion
from lion_models.methods.lora import LoRA
from lion_models.methods.vpt import VPTDeep, VPTPad, VPTShallow
from lion_models.run import RunConfig, build_model
from tests.support.small import SMALL, small_vit

D, DEPTH = SMALL.dim, SMALL.depth
BACKBONE = sum(p.numel() for p in small_vit().parameters()) - 3 * D - 3
IMAGES, LABELS = torch.rand(6, 1, 12, 12), torch.tensor([0, 1, 2, 0, 1, 2])
Build = Callable[[FrozenBackbone], TunedClassifier]


def build(method: str, backbone: FrozenBackbone, **options: object) -> TunedClassifier:
    torch.manual_seed(3)
    config = RunConfig.from_dict({"data": "digits", "method": method, **options})
    return build_model(config, backbone, 3)


def convolutional() -> FrozenBackbone:
    """A network without blocks; its feature is the mean over the picture."""
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5), nn.ReLU())
    return FrozenBackbone(
        network, embed=lambda x: 2 * x - 1, encode=lambda x: network(x).mean((2, 3)), name="conv",
        channels=3, image_size=10, token_dim=3, feature_dim=5, space="pixel",
        normalisation=(0.5, 0.5),
    )  # fmt: skip


class WeightReader(nn.Module):
    """Attention that reads its projection's weight and bias, as BEiT's does, not its output."""

    def __init__(self, attention: nn.Module) -> None:
        super().__init__()
        self.qkv = attention.qkv

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(x, self.qkv.weight, self.qkv.bias).chunk(3, -1)[2]


def test_lora_reaches_blocks_that_read_the_projection_s_weight():
    backbone = load_backbone("tiny-vit")
    for block in backbone.blocks:
        block.attn = WeightReader(block.attn)
    model = LoRA(backbone, 3, rank=2, alpha=3.0)
    images = torch.rand(2, 1, 28, 28)
    assert torch.allclose(model(images), model.head(backbone(images)), atol=1e-6)
    with torch.no_grad():
        for parameter in model.deltas.parameters():
            parameter.normal_()
    x = torch.randn(5, 96)
    merged = model._blocks[0].attn.qkv
    torch.testing.assert_close(
        nn.functional.linear(x, merged.weight, merged.bias), merged(x), rtol=1e-4, atol=1e-4
    )
    model(images).sum().backward()
    assert all(parameter.grad is not None for parameter in model.deltas.parameters())


def take_steps(model: TunedClassifier, images: torch.Tensor, count: int = 3) -> None:
    """AdamW steps with a large rate: what can move, moves."""
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=0.05, weight_decay=0.1)
    model.train()
    for _ in range(count):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(images), LABELS[: len(images)])
        loss.backward()
        optimizer.step()


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (lambda b: FineTune(b, 3), BACKBONE),
        (lambda b: FineTune(b, 3, "bias"), D + DEPTH * (3 * D + D + 2 * D + D + 2 * D) + D),
        (lambda b: Adapters(b, 3, 4), DEPTH * 2 * (2 * D * 4 + 4 + D)),
        (lambda b: Adapters(b, 3, 4, "mlp"), DEPTH * (2 * D * 4 + 4 + D)),
        (lambda b: LoRA(b, 3, 3), DEPTH * 4 * 3 * D),
        (lambda b: VPTShallow(b, 3, 7), 7 * D),
        (lambda b: VPTPad(b, 3, 2), 12**2 - 8**2),
    ],
)
def test_methods_have_the_documented_number_of_parameters(
    make: Build, expected: int, backbone: FrozenBackbone
):
    counts = count_parameters(make(backbone))
    assert counts.without_head == expected
    assert counts.head == 3 * D + 3


def test_replaced_weights_do_not_count_as_frozen(backbone: FrozenBackbone):
    assert count_parameters(FineTune(backbone, 3)).frozen == 0
    bias = count_parameters(FineTune(backbone, 3, "bias"))
    assert bias.frozen == BACKBONE - bias.without_head
    assert count_parameters(LoRA(backbone, 3)).frozen == BACKBONE


@pytest.mark.parametrize("method", ["full", "bias", "adapter", "lora"])
def test_methods_that_change_the_backbone_start_as_the_backbone(
    method: str, backbone: FrozenBackbone
):
    model = build(method, backbone)
    assert torch.equal(model(IMAGES), model.head(backbone(IMAGES)))


def snapshot(module: nn.Module) -> dict[str, tuple[int, object]]:
    """Identity, place of the parameters and mode of every module of a tree."""
    return {
        name: (id(each), (each.training, *(id(p) for p in each._parameters.values()),
                          *map(id, each._modules.values()), len(each._forward_hooks)))
        for name, each in module.named_modules()
    }  # fmt: skip


@pytest.mark.parametrize("method", METHODS)
def test_shared_backbone_is_the_same_object_with_the_same_bits_after_training(
    method: str, backbone: FrozenBackbone
):
    state, tree = copy.deepcopy(backbone.state_dict()), snapshot(backbone.eval())
    before = backbone(IMAGES)
    model = build(method, backbone, hidden=4, prompts=2)
    start = trained_state(model)
    take_steps(model, IMAGES)
    assert snapshot(backbone) == tree
    assert all(torch.equal(state[name], value) for name, value in backbone.state_dict().items())
    assert torch.equal(backbone(IMAGES), before)
    assert all(p.grad is None and not p.requires_grad for p in backbone.parameters())
    end = trained_state(model)
    assert not torch.equal(model.eval()(IMAGES), model.head(before)) or method == "linear"
    assert all(not torch.equal(start[name], end[name]) for name in start)


@pytest.mark.parametrize("method", METHODS)
def test_gradients_reach_everything_that_is_trained(method: str, backbone: FrozenBackbone):
    model = build(method, backbone, hidden=4, prompts=2)
    take_steps(model, IMAGES, 1)  # away from zeros that hide their partner's gradient
    model.zero_grad()
    nn.functional.cross_entropy(model(IMAGES), LABELS).backward()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None, name
            assert parameter.grad.abs().max() > 0, name


@pytest.mark.parametrize("method", METHODS)
def test_trained_state_is_all_that_a_model_needs(method: str, backbone: FrozenBackbone):
    model = build(method, backbone, hidden=4, prompts=2)
    take_steps(model, IMAGES)
    state = trained_state(model)
    assert not any(name.startswith("backbone") for name in state)
    other = build(method, freeze_vit(small_vit(), "small"), hidden=4, prompts=2)
    other.load_state_dict(state, strict=False)
    assert torch.equal(other.eval()(IMAGES), model.eval()(IMAGES))


@pytest.mark.parametrize("method", METHODS)
def test_a_copy_of_a_model_is_independent_and_computes_the_same(
    method: str, backbone: FrozenBackbone
):
    model = build(method, backbone, hidden=4, prompts=2).eval()
    twin, before = copy.deepcopy(model), model(IMAGES)
    assert torch.equal(twin(IMAGES), before)
    take_steps(model, IMAGES)
    assert torch.equal(twin.eval()(IMAGES), before)


def test_adapter_output_is_that_of_the_formula(backbone: FrozenBackbone):
    model = Adapters(backbone, 3, 4)
    for parameter in model.adapters.parameters():
        nn.init.normal_(parameter)
    tokens = backbone.embed(IMAGES)
    x = tokens
    for index, block in enumerate(backbone.blocks):
        attention, mlp = model.adapters[2 * index], model.adapters[2 * index + 1]
        h = block.attn(block.norm1(x))
        x = x + h + attention.up(nn.functional.gelu(attention.down(h)))
        h = block.mlp(block.norm2(x))
        x = x + h + mlp.up(nn.functional.gelu(mlp.down(h)))
    torch.testing.assert_close(model.tuned(tokens), model.head(backbone.pool(x)))


def test_lora_equals_a_backbone_with_merged_weights(backbone: FrozenBackbone):
    model = LoRA(backbone, 3, rank=3, alpha=6.0)
    merged = copy.deepcopy(backbone)
    for delta, block in zip(model.deltas, merged.blocks, strict=True):
        nn.init.normal_(delta.b)
        with torch.no_grad():
            for part, row in ((0, 0), (1, 2)):  # query and value of query, key, value
                addition = 2.0 * delta.b[part] @ delta.a[part]
                block.attn.qkv.weight[row * D : (row + 1) * D] += addition
    expected = model.head(merged(IMAGES))
    torch.testing.assert_close(model(IMAGES), expected, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(expected, model.head(backbone(IMAGES)), atol=1e-2)


def test_shallow_prompts_pass_through_all_blocks(backbone: FrozenBackbone):
    model = VPTShallow(backbone, 3, 2)
    tokens = backbone.embed(IMAGES)
    x = torch.cat([tokens[:, :1], model.prompts.expand(6, -1, -1), tokens[:, 1:]], 1)
    for block in backbone.blocks:
        x = block(x)
    torch.testing.assert_close(model.tuned(tokens), model.head(backbone.pool(x)))


def test_deep_prompts_differ_from_shallow_ones(backbone: FrozenBackbone):
    deep, shallow = VPTDeep(backbone, 3, 2, 0.0), VPTShallow(backbone, 3, 2)
    shallow.head = deep.head
    with torch.no_grad():
        shallow.prompts.copy_(deep.prompts[0])
    assert not torch.allclose(deep(IMAGES), shallow(IMAGES), atol=1e-3)


def test_pad_frames_the_smaller_image():
    backbone = convolutional()
    model = VPTPad(backbone, 3, 2)
    seen: list[torch.Tensor] = []
    embed = backbone.embed
    backbone.embed = lambda images: (seen.append(images), embed(images))[1]
    nn.init.constant_(model.frame, 0.25)
    model(torch.full((2, 3, 10, 10), 0.75))
    image = seen[-1]
    assert image.shape == (2, 3, 10, 10)
    torch.testing.assert_close(image[..., 2:8, 2:8], torch.full((2, 3, 6, 6), 0.75))
    image[..., 2:8, 2:8] = 0.25
    assert torch.equal(image, torch.full((2, 3, 10, 10), 0.25))
    assert torch.equal(VPTPad(backbone, 3, 2).frame, torch.full((3, 64), 0.5))


@pytest.mark.parametrize("method", ["full", "bias", "vpt-pad", "linear", "lion"])
def test_a_convolutional_backbone_trains_and_keeps_its_statistics(method: str):
    backbone = convolutional()
    state = copy.deepcopy(backbone.state_dict())
    model = build(method, backbone)
    start = trained_state(model)
    take_steps(model, torch.rand(6, 3, 10, 10))
    assert all(torch.equal(state[name], value) for name, value in backbone.state_dict().items())
    assert all(not torch.equal(start[name], value) for name, value in trained_state(model).items())


@pytest.mark.parametrize("method", ["adapter", "lora", "vpt-shallow", "vpt-deep"])
def test_methods_inside_blocks_say_that_there_are_none(method: str):
    with pytest.raises(
        UserError, match=rf"`method` {method}: needs a backbone made of transformer"
    ):
        build(method, convolutional())


@pytest.mark.parametrize(("method", "path"), [("lora", "attn.qkv"), ("adapter", "attn.proj")])
def test_blocks_with_other_names_are_named(method: str, path: str, backbone: FrozenBackbone):
    backbone.blocks = (nn.TransformerEncoderLayer(D, 2, batch_first=True).eval(),)
    with pytest.raises(
        UserError, match=rf"expected blocks with a linear layer '{path}'.*found not"
    ):
        build(method, backbone)


def test_bias_needs_biases():
    network = nn.Linear(4, 5, bias=False)
    backbone = FrozenBackbone(
        network, embed=lambda images: network(images).flatten(2), encode=lambda x: x.mean((1, 2)),
        name="plain", channels=1, image_size=4, token_dim=5, feature_dim=5,
    )  # fmt: skip
    with pytest.raises(UserError, match="'plain' has no parameter of this kind"):
        FineTune(backbone, 3, "bias")


def test_a_frame_must_leave_an_image(backbone: FrozenBackbone):
    with pytest.raises(UserError, match="`pad`: expected less than half of the backbone's 12"):
        VPTPad(backbone, 3, 6)


@pytest.mark.parametrize("method", ["lion", "vpt-deep", "vpt-shallow", "adapter", "lora"])
def test_checkpointed_backbone_gives_the_same_gradients(method: str, backbone: FrozenBackbone):
    gradients = []
    for checkpoint in (False, True):
        model = build(method, backbone, hidden=4, prompts=2, checkpoint_backbone=checkpoint)
        torch.manual_seed(5)
        nn.functional.cross_entropy(model(IMAGES), LABELS).backward()
        gradients.append({n: p.grad for n, p in model.named_parameters() if p.requires_grad})
    assert all(torch.equal(gradients[0][name], gradients[1][name]) for name in gradients[0])


def test_checkpointed_backbone_keeps_fewer_tensors(backbone: FrozenBackbone):
    kept = []
    for view in (backbone, checkpoint_blocks(backbone)):
        model, sizes = Lion(view, 3, "input", 4), []
        with torch.autograd.graph.saved_tensors_hooks(
            lambda x, sizes=sizes: (sizes.append(x.numel()), x)[1], lambda x: x
        ):
            model(IMAGES)
        kept.append(sum(sizes))
    assert kept[1] < kept[0] / 2


@pytest.mark.parametrize("method", ["full", "bias"])
def test_checkpointing_is_refused_where_the_blocks_train(method: str, backbone: FrozenBackbone):
    with pytest.raises(UserError, match="`checkpoint_backbone`: saves the activations of frozen"):
        build(method, backbone, checkpoint_backbone=True)
