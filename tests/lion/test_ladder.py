"""LION's ladder: an equilibrium over the tokens of every block of a frozen backbone."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

import deqcore
from lion_models.backbones import FrozenBackbone
from lion_models.base.errors import UserError
from lion_models.methods.base import count_parameters
from lion_models.methods.linear import LinearProbe
from lion_models.methods.lion_ladder import LADDER_RECIPE, LADDER_STRENGTH, LionLadder, rungs
from lion_models.prompts.ladder import ImplicitLadder, LadderCell
from lion_models.prompts.pruning import prune_model
from lion_models.run import Run, RunConfig, load_run
from lion_models.run.export import unrolled
from tests.support.command import Lion
from tests.support.small import SMALL

EXACT = deqcore.Anderson(rtol=1e-13, atol=1e-14, max_steps=200)
PLACES = SMALL.depth * (1 + (SMALL.image_size // SMALL.patch_size) ** 2)
IMAGES = torch.rand(5, 1, SMALL.image_size, SMALL.image_size)


def moved(ladder: ImplicitLadder) -> ImplicitLadder:
    """The ladder after some training, as it were: nothing is zero."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in ladder.parameters():
            shape = weight.shape
            weight += 0.2 * torch.randn(shape, generator=generator, dtype=weight.dtype)
    return ladder


@given(
    dim=st.integers(1, 12), places=st.integers(1, 9), classes=st.integers(2, 5),
    hidden=st.integers(1, 12),
)  # fmt: skip
def test_ladder_has_the_documented_number_of_parameters(
    dim: int, places: int, classes: int, hidden: int
):
    count = sum(p.numel() for p in ImplicitLadder(dim, places, classes, hidden).parameters())
    assert count == hidden * (dim + 2 * hidden + 3 + places * classes)


def test_the_start_is_the_linear_probe(backbone: FrozenBackbone):
    probe, model = LinearProbe(backbone, 3), LionLadder(backbone, 3, hidden=4)
    model.head.load_state_dict(probe.head.state_dict())
    assert torch.equal(model(IMAGES), probe(IMAGES))


def test_what_counts_beside_the_head_is_the_ladder(backbone: FrozenBackbone):
    counts = count_parameters(LionLadder(backbone, 3, hidden=4))
    assert counts.head == 3 * SMALL.dim + 3
    assert counts.without_head == 4 * (SMALL.dim + 2 * 4 + 3 + PLACES * 3)


def test_every_weight_gets_a_gradient_once_the_ladder_has_moved(backbone: FrozenBackbone):
    model = LionLadder(backbone, 3, hidden=4)
    moved(model.ladder)
    model(IMAGES).square().sum().backward()
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert len(trained) == 9
    for name, weight in trained.items():
        assert weight.grad is not None, name
        assert weight.grad.abs().max() > 0, name


def test_the_first_step_moves_what_reads_the_ladder(backbone: FrozenBackbone):
    model = LionLadder(backbone, 3, hidden=4)
    F.cross_entropy(model(IMAGES), torch.tensor([0, 1, 2, 0, 1])).backward()
    assert model.ladder.out.weight.grad.abs().max() > 0


def test_gradients_are_those_of_the_equilibrium():
    torch.manual_seed(0)
    ladder = moved(ImplicitLadder(5, 4, 2, 3, EXACT).double())
    with torch.no_grad():
        ladder.layer.cell.up.weight *= 0.3  # a contraction
    x = torch.randn(2, 4, 5, dtype=torch.float64, requires_grad=True)
    weights = tuple(ladder.parameters())

    def call(x: torch.Tensor, *weights: torch.Tensor) -> torch.Tensor:
        names = [name for name, _ in ladder.named_parameters()]
        return torch.func.functional_call(ladder, dict(zip(names, weights, strict=True)), (x,))

    assert torch.autograd.gradcheck(call, (x, *weights))


def test_explicit_steps_tend_to_the_equilibrium():
    torch.manual_seed(1)
    solved = moved(ImplicitLadder(5, 4, 2, 3, EXACT).double())
    with torch.no_grad():
        solved.layer.cell.up.weight *= 0.3
    x = torch.randn(2, 4, 5, dtype=torch.float64)
    distances = []
    for iterations in (1, 4, 60):
        explicit = ImplicitLadder(5, 4, 2, 3, iterations=iterations).double()
        explicit.load_state_dict(solved.state_dict())
        distances.append((explicit(x) - solved(x)).abs().max().item())
    assert distances[0] > distances[1] > distances[2]
    assert distances[2] < 1e-10


def test_training_leaves_out_whole_places_and_measuring_none():
    torch.manual_seed(0)
    ladder = moved(ImplicitLadder(5, 4, 4, 3, EXACT, strength=0.5, dropout=0.75).double())
    with torch.no_grad():
        ladder.layer.cell.up.weight *= 0.3
        ladder.out.weight.copy_(torch.eye(4).repeat_interleave(3, 1))  # class c reads place c
    x = torch.randn(200, 4, 5, dtype=torch.float64)
    whole = ladder.eval()(x)
    torch.testing.assert_close(whole, 0.5 * ladder.solve(ladder.injected(x)).sum(2))
    share = ladder.train()(x) / whole
    left_out = share.abs() < 1e-9
    torch.testing.assert_close(share[~left_out], torch.full_like(share[~left_out], 4.0))
    assert 0.7 < left_out.double().mean() < 0.8
    assert len(left_out.unique(dim=0)) > 10  # each image for itself
    assert not torch.equal(ladder(x), ladder(x))


def test_each_form_has_its_own_strength_and_a_run_writes_it_down():
    def strength(**options: object) -> object:
        return RunConfig.of(data="digits", **options).resolved().to_dict()["strength"]

    assert strength() == 1.0
    assert strength(form="ladder") == LADDER_STRENGTH == 0.1
    assert strength(form="ladder", strength=1.0) == 1.0
    assert RunConfig.of(data="digits").but(form="ladder").resolved().method.strength == 0.1


def test_the_form_goes_by_the_backbone_unless_it_or_a_layer_of_the_ends_is_named():
    def form(backbone: str, **options: object) -> object:
        return RunConfig.of(data="digits", backbone=backbone, **options).method.form

    assert form("tiny-vit") == form("timm:vit_tiny_patch16_224") == "ends"
    assert form("vit-s14-focus") == form("vit-s14-focus,image_size=56,readout=11") == "ladder"
    assert form("vit-s14-focus", form="ends") == form("vit-s14-focus", sides="output") == "ends"
    assert form("tiny-vit", form="ladder") == "ladder"


@pytest.mark.parametrize("form", ["ends", "ladder"])
def test_what_is_stored_has_its_form_whatever_the_default_is(form: str):
    config = RunConfig.of(data="digits", backbone="vit-s14-focus", form=form).resolved()
    assert config.to_dict().get("form", "ends") == form
    assert RunConfig.stored(config.to_dict()) == config
    before = config.to_dict().items()  # as versions without a form wrote it
    without = {key: value for key, value in before if key not in ("form", "place_dropout")}
    assert RunConfig.stored(without).method.form == "ends"


def test_places_know_of_each_other():
    cell = LadderCell(3)
    torch.nn.init.normal_(cell.up.weight)
    z, u = torch.randn(2, 4, 3), torch.randn(2, 4, 3)
    other = z.clone()
    other[0, 3] += 1
    changed = (cell(other, u) - cell(z, u)).abs().amax(2) > 0
    assert changed[0].all()
    assert not changed[1].any()  # another image


def test_weights_cannot_make_the_iteration_run_off():
    torch.manual_seed(0)
    ladder = ImplicitLadder(5, 4, 2, 3)
    torch.nn.init.normal_(ladder.layer.cell.up.weight, std=100)
    ladder(torch.randn(2, 4, 5))
    assert ladder(torch.randn(2, 4, 5)).isfinite().all()


@pytest.mark.parametrize("in_front", [0, 1, 5])
def test_rungs_are_the_class_token_and_the_grid(in_front: int):
    tokens = torch.randn(2, in_front + 36, 8)
    read = rungs(tokens, grid=3)
    assert read.shape == (2, 10, 8)
    patches = tokens[:, in_front:].view(2, 3, 2, 3, 2, 8).mean((2, 4)).flatten(1, 2)
    first = tokens[:, :1] if in_front else tokens.mean(1, keepdim=True)
    expected = F.layer_norm(torch.cat([first, patches], 1), (8,))
    torch.testing.assert_close(read, expected)
    assert rungs(tokens, grid=6).shape == (2, 37, 8)


def test_half_of_a_ladder_is_pruned(backbone: FrozenBackbone):
    model = LionLadder(backbone, 3, hidden=4)
    moved(model.ladder)
    before = count_parameters(model)
    prune_model(model, 0.5)
    after = count_parameters(model)
    matrices = 4 * (SMALL.dim + 2 * 4 + PLACES * 3)
    assert before.without_head - after.kept_without_head == matrices // 2
    assert model(IMAGES).isfinite().all()


def test_unrolled_ladder_is_near_the_solved_one(backbone: FrozenBackbone):
    model = LionLadder(backbone, 3, hidden=4, solver=EXACT).eval()
    moved(model.ladder)
    with torch.no_grad():
        model.ladder.layer.cell.up.weight *= 0.3
        torch.testing.assert_close(unrolled(model, 30)(IMAGES), model(IMAGES), atol=1e-4, rtol=0)


def test_a_backbone_without_blocks_is_refused(backbone: FrozenBackbone):
    backbone.blocks = ()
    with pytest.raises(UserError, match=r"`form` ladder: needs a backbone made of transformer"):
        LionLadder(backbone, 3)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"form": "ladder", "sides": "input"}, "`sides`: is about the layers of `form` ends"),
        ({"patch_grid": 2}, "`patch_grid`: is about `form` ladder"),
        ({"place_dropout": 0.5}, "`place_dropout`: is about `form` ladder"),
        ({"form": "ladder", "place_dropout": 1}, "`place_dropout`: expected a share from 0 to"),
        ({"form": "stairs"}, "`form`: expected one of ends, ladder, got 'stairs'"),
        (
            {"form": "ladder", "checkpoint_backbone": True},
            "there is none with lion with `form` ladder",
        ),
    ],
)
def test_options_that_would_do_nothing_are_named(options: dict[str, object], message: str):
    with pytest.raises(UserError, match=message):
        RunConfig.of(data="digits", **options)


def test_a_ladder_is_trained_pruned_stored_and_exported(
    lion: Lion, config: RunConfig, tmp_path: Path
):
    folder = tmp_path / "run"
    config = config.but(
        form="ladder", lr=None, sparsity=0.5, prune_at=2, robust="cdr", patch_grid=1
    )
    assert config.resolved().training.lr == LADDER_RECIPE.lr
    result = Run(folder, config).train()
    assert result["parameters"]["kept_without_head"] < result["parameters"]["without_head"]
    run = load_run(folder)
    assert isinstance(run.model, LionLadder)
    assert run.config.method.form == "ladder"
    done = lion("export", folder, "--steps", 6)
    assert done.code == 0, done.err
    pixels = Run.open(folder).validation_images(4).float() / 255
    program = torch.export.load(str(folder / "model.pt2")).module()
    with torch.no_grad():
        torch.testing.assert_close(program(pixels), run.model(pixels), atol=1e-3, rtol=0)
