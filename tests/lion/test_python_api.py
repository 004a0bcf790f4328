"""Mistakes that Python code makes with models, tasks and configurations."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from lion_models.backbones import FrozenBackbone
from lion_models.base.errors import UserError
from lion_models.data import Task, make_task, open_source
from lion_models.methods import METHODS
from lion_models.methods.finetune import FineTune
from lion_models.methods.lion import Lion
from lion_models.run import RunConfig, build_model, fit
from lion_models.run.training import TrainingConfig


@pytest.fixture
def config(image_folder: Path) -> RunConfig:
    return RunConfig.of(str(image_folder))


@pytest.mark.parametrize("method", METHODS)
def test_model_called_with_the_bytes_of_a_task_says_what_it_takes(
    method: str, backbone: FrozenBackbone
):
    model = build_model(RunConfig.of("digits", method), backbone, 3)
    images = torch.randint(0, 256, (2, 1, 12, 12), dtype=torch.uint8)
    with pytest.raises(
        UserError, match=r"expected float pixels in \[0, 1\], got torch\.uint8; divide by 255"
    ):
        model(images)
    assert model(images.float() / 255).shape == (2, 3)
    assert model.double()(images.double() / 255).shape == (2, 3)


def test_check_of_pixels_costs_a_compiled_model_no_break(backbone: FrozenBackbone):
    model = build_model(RunConfig.of("digits", method="linear"), backbone, 3).eval()
    images = torch.rand(2, 1, 12, 12)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(images), model(images))
    exported = torch.export.export(model, (images,)).module()
    torch.testing.assert_close(exported(images), model(images))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"epochs": 2.5}, r"`epochs`: expected a whole number, got 2\.5"),
        ({"shots": "all"}, "`shots`: expected a whole number or None, got 'all'"),
        ({"lr": "a"}, "`lr`: expected a number or None, got 'a'"),
        ({"batch": True}, "`batch`: expected a whole number, got True"),
        ({"checkpoint_backbone": 1}, "`checkpoint_backbone`: expected True or False, got 1"),
        ({"method": None}, "`method`: expected a text, got None"),
    ],
)
def test_value_of_another_type_is_named(options: dict[str, Any], message: str):
    with pytest.raises(UserError, match=message):
        RunConfig.of("digits", **options)


def test_whole_number_stands_for_a_number():
    assert RunConfig.of("digits", lr=1, shots=None, strength=2).recipe.lr == 1


@pytest.mark.parametrize("method", METHODS)
def test_model_needs_a_class(method: str, backbone: FrozenBackbone):
    for classes in (0, -1):
        with pytest.raises(UserError, match=f"classes: expected 1 or more, got {classes}"):
            build_model(RunConfig.of("digits", method), backbone, classes)


def test_layer_needs_a_width(backbone: FrozenBackbone):
    for space in ("token", "pixel"):
        for hidden in (0, -1):
            with pytest.raises(UserError, match=f"`hidden`: expected 1 or more, got {hidden}"):
                Lion(backbone, 3, hidden=hidden, space=space)


def test_model_is_fitted_to_as_many_classes_as_the_task_has(task: Task, frozen: FrozenBackbone):
    for classes in (2, 4):
        with pytest.raises(
            UserError, match=f"expected a model of 3 classes, as the task has, got {classes}"
        ):
            fit(Lion(frozen, classes), task)


@pytest.mark.parametrize("part", ["all", "bias"])
def test_model_is_fitted_by_the_recipe_of_its_own_method(
    part: str, task: Task, frozen: FrozenBackbone
):
    state = fit(FineTune(frozen, 3, part), task, TrainingConfig(epochs=1))
    method = {"all": "full", "bias": "bias"}[part]
    own = METHODS[method].recipe.lr
    assert state.history[0]["lr"] == pytest.approx(own * 0.1 / 1.1)  # the warm-up's first step


def test_option_of_another_method_is_refused():
    with pytest.raises(UserError, match="`hidden`: is an option of lion, not of linear; leave it"):
        RunConfig.of("digits", "linear", hidden=4)
    with pytest.raises(UserError, match="`lora_rank`: is an option of lora, not of lion"):
        RunConfig.of("digits").but(lora_rank=4)


def test_misspelt_option_is_suggested():
    with pytest.raises(
        UserError, match=r"`hiden`: there is no such option; did you mean 'hidden'\?"
    ):
        RunConfig.of("digits", hiden=4)


def test_option_that_would_do_nothing_is_refused():
    with pytest.raises(UserError, match="`tau`: belongs to `robust` cdr, which is not there"):
        RunConfig.of("digits", tau=0.9)


def test_task_needs_an_image_of_each_class(config: RunConfig):
    source = open_source(config.data.data, 1, 12)
    for shots in (0, -2):
        with pytest.raises(UserError, match=f"`shots`: expected 1 or more, got {shots}"):
            make_task(source, 42, shots)
        with pytest.raises(UserError, match=f"`validation_shots`: expected 1 or more, got {shots}"):
            make_task(source, 42, 3, shots)
