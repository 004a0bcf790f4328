"""`tune`: a method around a backbone as one module, in other people's training loops."""

from __future__ import annotations

import copy
import json
import shutil
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import deqcore
from lion_models import CDR, LionConfig, RobustOptimizer, TunedModel, tune
from lion_models.backbones import FrozenBackbone, freeze_vit
from lion_models.backbones.blocks import CheckpointedBlock
from lion_models.base.errors import UserError
from lion_models.methods import METHODS
from lion_models.methods.lion import Lion as LionClassifier
from lion_models.run import RunConfig, load_run
from lion_models.run.checkpoint import CHECKPOINT
from lion_models.run.pretrained import ABOUT
from tests.support.command import CLASSES, Lion
from tests.support.small import noise, small_vit


def pictures(count: int = 6, seed: int = 1) -> Tensor:
    return torch.rand(count, 1, 12, 12, generator=torch.Generator().manual_seed(seed))


def train(model: TunedModel, optimizer: torch.optim.Optimizer, steps: int = 3) -> None:
    images, labels = pictures(9), torch.arange(9) % 3
    model.train()
    for _ in range(steps):
        optimizer.zero_grad()
        F.cross_entropy(model(images), labels).backward()
        optimizer.step()
    model.eval()


def trained_model(
    backbone: str | FrozenBackbone, method: str = "lion", **options: Any
) -> TunedModel:
    torch.manual_seed(3)
    model = tune(backbone, method, CLASSES, **options)
    train(model, torch.optim.AdamW(model.trainable_parameters(), lr=0.02))
    return model


@pytest.mark.parametrize("method", METHODS)
def test_every_method_trains_and_comes_back_bit_for_bit(
    method: str, backbone_file: Path, tmp_path: Path
):
    before = tune(str(backbone_file), method, CLASSES)
    frozen = copy.deepcopy(before.backbone.state_dict())
    model = trained_model(str(backbone_file), method)
    assert all(
        torch.equal(value, frozen[key]) for key, value in model.backbone.state_dict().items()
    )
    model.save_pretrained(tmp_path / "saved")
    loaded = TunedModel.from_pretrained(tmp_path / "saved")
    assert not loaded.training
    assert (loaded.run_config, loaded.classes) == (model.run_config, tuple(CLASSES))
    pairs = zip(
        model.named_trainable_parameters(), loaded.named_trainable_parameters(), strict=True
    )
    for (name, one), (same, other) in pairs:
        assert name == same
        assert torch.equal(one, other)
    with torch.no_grad():
        assert torch.equal(loaded(pictures()), model(pictures()))


def test_what_is_trained_is_what_is_listed_and_counted(backbone: FrozenBackbone):
    model = tune(backbone, LionConfig(hidden=4), 3)
    listed = dict(model.named_trainable_parameters())
    assert [id(p) for p in listed.values()] == [id(p) for p in model.trainable_parameters()]
    assert {name for name, p in model.named_parameters() if p.requires_grad} == set(listed)
    assert not any("backbone" in name for name in listed)
    assert sum(p.numel() for p in listed.values()) == model.count().trained
    model(pictures()).sum().backward()
    assert all(p.grad is not None for p in listed.values())
    assert not any(p.grad is not None for p in backbone.parameters())


def test_training_mode_leaves_the_backbone_in_eval_mode(backbone: FrozenBackbone):
    model = tune(backbone, "vpt-deep", 3).train()
    assert model.training
    assert model.classifier.training
    assert not any(module.training for module in model.backbone.modules())


def test_answer_to_hugging_faces_names_has_loss_and_logits(backbone: FrozenBackbone):
    model = tune(backbone, LionConfig(), 3).eval()
    images, labels = pictures(), torch.arange(6) % 3
    logits = model(images)
    answer = model(pixel_values=images, labels=labels)
    assert list(answer) == ["loss", "logits"]
    torch.testing.assert_close(answer["logits"], logits)
    torch.testing.assert_close(answer["loss"], F.cross_entropy(logits, labels))
    assert list(model(pixel_values=images)) == ["logits"]
    with pytest.raises(TypeError, match="one of the two"):
        model()
    with pytest.raises(TypeError, match="one of the two"):
        model(images, pixel_values=images)
    with pytest.raises(TypeError, match="labels: go with pixel_values"):
        model(images, labels=labels)


def test_normalised_pixels_give_what_their_unit_pixels_give():
    vit = freeze_vit(small_vit(), "small")
    vit.normalisation = (0.3, 0.4)
    embed = vit.embed
    vit.embed = lambda images: embed((images - 0.3) / 0.4)
    torch.manual_seed(0)
    unit = tune(vit, LionConfig(), 3).eval()
    torch.manual_seed(0)
    normalised = tune(vit, LionConfig(), 3, pixels="normalised").eval()
    images = pictures()
    torch.testing.assert_close(normalised((images - 0.3) / 0.4), unit(images))


def test_normalised_pixels_in_place_of_unit_ones_are_warned_of_once(backbone: FrozenBackbone):
    model = tune(backbone, LionConfig(), 3)
    with pytest.warns(UserWarning, match=r"expected pixels in \[0, 1\], got -2 to .* tune\("):
        model(pictures() * 0 - 2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model(pictures() * 4 - 2)
        tune(backbone, LionConfig(), 3)(pictures())


class Outer(nn.Module):
    """Holds a model, as Lightning's modules do."""

    def __init__(self, model: TunedModel) -> None:
        super().__init__()
        self.model = model


@pytest.mark.parametrize("nested", [False, True])
def test_state_dict_has_what_is_trained_alone_where_asked(nested: bool, backbone: FrozenBackbone):
    def wrap(model: TunedModel) -> nn.Module:
        return Outer(model) if nested else model

    full = trained_model(backbone)
    assert any("backbone" in name for name in wrap(full).state_dict())
    small = trained_model(backbone, trained_state_only=True)
    state = wrap(small).state_dict()
    trained = {name for name, p in wrap(small).named_parameters() if p.requires_grad}
    assert set(state) == trained
    fresh = tune(backbone, "lion", CLASSES).eval()
    wrap(fresh).load_state_dict(state)  # strict: nothing is missing
    with torch.no_grad():
        assert torch.equal(fresh(pictures()), small(pictures()))
    incomplete = {name: value for name, value in state.items() if "head.bias" not in name}
    with pytest.raises(RuntimeError, match=r"Missing key.*head\.bias"):
        wrap(fresh).load_state_dict(incomplete)
    changed = wrap(full).state_dict()
    del changed[next(name for name in changed if "backbone" in name)]
    with pytest.raises(RuntimeError, match="Missing key"):
        wrap(fresh).load_state_dict(changed)


def test_pruned_model_comes_back_with_its_kept_weights(backbone_file: Path, tmp_path: Path):
    model = trained_model(str(backbone_file))
    dense = model.count()
    model.prune(0.5)
    train(model, torch.optim.AdamW(model.trainable_parameters(), lr=0.01))
    assert model.count().trained == dense.trained
    assert model.count().kept < dense.kept
    model.save_pretrained(tmp_path)
    loaded = TunedModel.from_pretrained(tmp_path)
    assert isinstance(loaded.classifier, LionClassifier)
    assert any(isinstance(module, deqcore.MaskedLinear) for module in loaded.modules())
    assert loaded.count() == model.count()
    with torch.no_grad():
        assert torch.equal(loaded(pictures()), model(pictures()))


def test_share_to_prune_is_the_methods_own_or_given(backbone: FrozenBackbone):
    model = tune(backbone, LionConfig(sparsity=0.75), 3)
    model.prune()
    # Of two matrices in each of two layers, 8 x 8 each, a quarter is kept.
    assert model.count().trained - model.count().kept == 4 * 48
    with pytest.raises(
        UserError, match=r"sparsity: expected a share above 0 and below 1, got 0\.0"
    ):
        tune(backbone, LionConfig(), 3).prune()
    with pytest.raises(UserError, match="this model has none"):
        tune(backbone, "vpt-deep", 3).prune(0.5)


def test_robustly_trained_model_comes_back(backbone_file: Path, tmp_path: Path):
    torch.manual_seed(3)
    model = tune(str(backbone_file), LionConfig(), CLASSES)
    robust = model.robust_parameters()
    assert [tuple(p.shape) for p in robust] == [(8, 8)] * 4
    others = [p for p in model.trainable_parameters() if all(p is not r for r in robust)]
    base = torch.optim.SGD([{"params": robust}, {"params": others}], lr=0.05)
    train(model, RobustOptimizer(base, robust, CDR(tau=0.5, decay=2.0)), steps=8)
    assert model.count().nonzero < model.count().trained
    model.save_pretrained(tmp_path)
    loaded = TunedModel.from_pretrained(tmp_path)
    assert loaded.count() == model.count()
    with torch.no_grad():
        assert torch.equal(loaded(pictures()), model(pictures()))


def test_folder_says_what_the_model_is(backbone_file: Path, tmp_path: Path):
    model = trained_model(str(backbone_file))
    model.save_pretrained(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [CHECKPOINT, ABOUT]
    about = json.loads((tmp_path / ABOUT).read_text())
    assert about["method"] == "lion"
    assert about["options"]["hidden"] == 8
    assert about["classes"] == list(CLASSES)
    assert about["pixels"] == "unit"
    assert about["backbone"]["backbone"] == str(backbone_file)
    assert about["backbone"]["sha256"] == model.backbone.fingerprint
    assert about["preprocessing"]["resize"]["height"] == 12
    assert about["parameters"]["trained"] == model.count().trained
    assert about["versions"]["torch"] == torch.__version__
    assert (tmp_path / CHECKPOINT).stat().st_size < 20_000


def test_options_of_tune_come_back(backbone_file: Path, tmp_path: Path):
    model = trained_model(
        str(backbone_file),
        pixels="normalised",
        normalisation="half",
        transform="fgvc",
        checkpoint_backbone=True,
    )
    model.save_pretrained(tmp_path)
    loaded = TunedModel.from_pretrained(tmp_path, trained_state_only=True)
    assert loaded.pixels == "normalised"
    assert loaded.geometry.transform == "fgvc"
    assert loaded.backbone.normalisation == (0.5, 0.5)
    assert isinstance(loaded.backbone.blocks[0], CheckpointedBlock)
    assert not any("backbone" in name for name in loaded.state_dict())
    with torch.no_grad():
        assert torch.equal(loaded(pictures()), model(pictures()))


def test_saved_model_predicts_from_the_command_line(
    backbone_file: Path, tmp_path: Path, lion: Lion
):
    trained_model(str(backbone_file)).save_pretrained(tmp_path / "saved")
    done = lion("predict", tmp_path / "saved", noise(tmp_path / "a.png"), "--format", "json")
    assert done.code == 0, done.err
    assert set(json.loads(done.out)[0]["probabilities"]) == set(CLASSES)


def test_run_of_the_command_line_is_a_pretrained_model(trained: Path):
    model, run = TunedModel.from_pretrained(trained), load_run(trained)
    with torch.no_grad():
        assert torch.equal(model(pictures()), run.model(pictures()))
    with pytest.raises(UserError, match=r"holds a config\.json, .* choose another folder"):
        model.save_pretrained(trained)


def test_backbone_may_be_given_again(backbone: FrozenBackbone, tmp_path: Path):
    model = trained_model(backbone)  # of a name that is not registered
    model.save_pretrained(tmp_path)
    with pytest.raises(
        UserError, match=r"its backbone 'small' does not load .* from_pretrained\(folder, backbone"
    ):
        TunedModel.from_pretrained(tmp_path)
    loaded = TunedModel.from_pretrained(tmp_path, backbone)
    with torch.no_grad():
        assert torch.equal(loaded(pictures()), model(pictures()))
    with pytest.raises(UserError, match=r"was trained on backbone 'small' .* but 'other' has"):
        TunedModel.from_pretrained(tmp_path, freeze_vit(small_vit(seed=1), "other"))
    same = freeze_vit(small_vit(), "same")
    same.normalisation = (0.5, 0.5)
    with pytest.raises(UserError, match=r"mean and deviation \[0\.0, 1\.0\], but 'same' norm"):
        TunedModel.from_pretrained(tmp_path, same)


def test_what_cannot_be_read_says_why(backbone_file: Path, tmp_path: Path):
    with pytest.raises(UserError, match=r"no checkpoint; expected .* of save_pretrained"):
        TunedModel.from_pretrained(tmp_path / "nothing")
    trained_model(str(backbone_file)).save_pretrained(tmp_path / "one")
    trained_model(str(backbone_file), "linear").save_pretrained(tmp_path / "two")
    about = json.loads((tmp_path / "one" / ABOUT).read_text())
    newer = about | {"format": "lion_models 7", "versions": {"deqcore": "9.1"}}
    (tmp_path / "one" / ABOUT).write_text(json.dumps(newer))
    with pytest.raises(UserError, match=r"format 'lion_models 7', .* written by deqcore 9\.1"):
        TunedModel.from_pretrained(tmp_path / "one")
    (tmp_path / "one" / ABOUT).write_text("{")
    with pytest.raises(UserError, match=r"model\.json: damaged"):
        TunedModel.from_pretrained(tmp_path / "one")
    shutil.copy(tmp_path / "two" / ABOUT, tmp_path / "one" / ABOUT)
    with pytest.raises(UserError, match="are of two different saves"):
        TunedModel.from_pretrained(tmp_path / "one")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("tiny-vit", "vpt", 3), "`method`: expected one of .* did you mean"),
        (("tiny-vit", LionConfig, 3), r"config: expected options .* got LionConfig; write Lion"),
        (("tiny-vit", RunConfig.of("digits"), 3), "config: expected options .* got RunConfig"),
        (("tiny-vit", "lion", 0), "classes: expected 1 or more, or names that differ, got 0"),
        (("tiny-vit", "lion", ["a", "a"]), "names that differ"),
        (("tiny-vit", "lion", "cats"), "names that differ, got 'cats'"),
        (("tiny-vi", "lion", 3), "`backbone`: expected one of .* did you mean 'tiny-vit'"),
        ((nn.Linear(3, 3), "lion", 3), "torch.nn.modules.linear.Linear; say where its tokens"),
        ((3, "lion", 3), "model: expected a name or a network, got int"),
    ],
)
def test_mistakes_of_a_caller_are_named(arguments: tuple[Any, ...], message: str):
    with pytest.raises(UserError, match=message):
        tune(*arguments)


def test_options_that_do_not_fit_are_named(backbone: FrozenBackbone):
    with pytest.raises(UserError, match="`pixels`: expected one of"):
        tune(backbone, "lion", 3, pixels="bytes")
    with pytest.raises(UserError, match="image_size: 'small' takes 12 pixels, got 24"):
        tune(backbone, "lion", 3, image_size=24)
    with pytest.raises(UserError, match="a backbone by name knows its own"):
        tune(backbone, "lion", 3, normalisation=(0.5, 0.5))
