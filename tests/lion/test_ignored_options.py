"""Options that would do nothing are refused, and axes of a sweep that would repeat runs too."""

from __future__ import annotations

from pathlib import Path

import pytest

from lion_models.base.errors import UserError
from lion_models.run.config import all_options
from lion_models.study.plan import Axis, Plan, parse_axis
from tests.support.command import Lion

LION = ("--method", "lion", "--sides")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--hidden", 8), "--hidden: is an option of lion, not of linear; leave it out"),
        (("--prompts", 3), "--prompts: is an option of vpt-shallow and vpt-deep, not of linear"),
        (("--sparsity", 0.5), "--sparsity: is an option of lion, not of linear"),
        (("--lora-alpha", 9), "--lora-alpha: is an option of lora, not of linear"),
        (("--tau", 0.9), "--tau: belongs to --robust cdr, which is not there; add it"),
        (("--method", "lion", "--robust-set", "fixed"), "--robust-set: belongs to --robust cdr"),
        (("--robust", "cdr"), "--robust: cdr leaves linear alone; add --robust-on all"),
        (("--checkpoint-backbone",), "--checkpoint-backbone: saves memory of the backward pass"),
        (("--method", "lion", "--iterations", 2, "--max-steps", 9), "--max-steps: is about"),
        (("--method", "lion", "--iterations", 2, "--solver", "picard"), "--iterations applies"),
        ((*LION, "output", "--space", "pixel"), "--space: is about the input layer, which --sides"),
        ((*LION, "input", "--output-input", "embedding"), "--output-input: is about the output"),
        ((*LION, "output", "--checkpoint-backbone"), "there is none with lion with --sides output"),
        (
            ("--robust", "cdr", "--robust-on", "all", "--robust-ramp", 2),
            "--robust-ramp: 2 epochs are more than the 1 of --epochs",
        ),
        (("--accumulate", 9, "--batch", 8), "--accumulate: 9 parts are more than the 8 images of"),
        (("--threads", 0), "--threads: expected 1 or more, got 0; leave it out for all cores"),
    ],
)
def test_train_refuses_options_that_would_do_nothing(
    lion: Lion, arguments: tuple[object, ...], message: str, tmp_path: Path
):
    refused = lion("train", "--data", "digits", "--method", "linear", "--runs", tmp_path,
                   "--epochs", 1, *arguments)  # fmt: skip
    assert refused.code == 2
    assert message in refused.err
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("command", ["compare", "sweep"])
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--hidden", 8), "--hidden: is an option of lion, not of linear and lora; leave it out"),
        (("--tau", 0.9), "--tau: belongs to --robust cdr"),
        (("--robust", "cdr", "--tau", 0.9), "leaves linear and lora alone; add --robust-on all"),
    ],
)
def test_compare_and_sweep_refuse_options_that_no_method_has(
    lion: Lion, command: str, arguments: tuple[object, ...], message: str, tmp_path: Path
):
    refused = lion(command, "--data", "digits", "--methods", "linear,lora", "--runs", tmp_path,
                   "--epochs", 1, *arguments)  # fmt: skip
    assert refused.code == 2
    assert message in refused.err
    assert not any(tmp_path.iterdir())


def test_options_that_act_are_taken(
    lion: Lion, image_folder: Path, backbone_file: Path, tmp_path: Path
):
    shared = ("--data", image_folder, "--backbone", backbone_file, "--shots", 3,
              "--validation-shots", 2, "--epochs", 1, "--runs", tmp_path)  # fmt: skip
    for arguments in (
        ("train", "--method", "linear", "--robust", "cdr", "--robust-on", "all", "--tau", 0.3),
        ("compare", "--methods", "linear,lora", "--lora-rank", 2, "--seeds", 1),
        ("sweep", "--methods", "linear", "--grid", "robust=none,cdr", "--over",
         "robust_on=all", "--tau", 0.3),
    ):  # fmt: skip
        done = lion(*arguments, *shared, "--name", arguments[0])
        assert done.code == 0, done.err
    # A resumed run has the method that is stored, not the command's default.
    done = lion("train", *shared, "--name", "train", "--tau", 0.3, "--resume")
    assert done.code == 0, done.err


def test_options_that_act_in_some_run_of_a_sweep_are_taken(
    lion: Lion, image_folder: Path, backbone_file: Path, tmp_path: Path
):
    shared = ("sweep", "--data", image_folder, "--backbone", backbone_file, "--shots", 3,
              "--validation-shots", 2, "--epochs", 1, "--runs", tmp_path, "--methods",
              "lion")  # fmt: skip
    axes = ("--sides", "output", "--space", "pixel", "--batch", 2, "--accumulate", 4, "--robust",
            "cdr", "--robust-ramp", 2, "--robust-on", "implicit")  # fmt: skip
    refused = lion(*shared, *axes, "--grid", "epochs=1,2", "--grid", "batch=4,8")
    assert "--space: is about the input layer" in refused.err
    done = lion(*shared, *axes, "--name", "s", "--grid", "epochs=1,2", "--over", "batch=4,8",
                "--over", "sides=input,output")  # fmt: skip
    assert done.code == 0, done.err


def test_axis_of_a_method_that_lacks_the_option_is_refused():
    with pytest.raises(UserError, match="`grid`: linear has no option hidden, lion has"):
        parse_axis("grid", "linear.hidden=4,8")


@pytest.mark.parametrize(
    "axis",
    [Axis("hidden", (4, 8)), Axis("lr", (0.1, 0.2), "lion"), Axis("tau", (0.1, 0.2)),
     Axis("robust", ("none", "cdr"))],
)  # fmt: skip
def test_axis_that_no_listed_method_feels_is_refused(axis: Axis):
    with pytest.raises(UserError, match=f"{axis.key}.*changes no run of linear and lora"):
        Plan(all_options(data="digits"), ("linear", "lora"), (1,), (axis,))


def test_robust_axes_do_not_repeat_the_runs_of_methods_that_they_leave_alone():
    base = all_options(data="digits")
    axes = (Axis("robust", ("none", "cdr")), Axis("tau", (0.2, 0.5)), Axis("lr", (0.1,)))
    plan = Plan(base, ("linear", "lion"), (1,), axes)
    assert plan.settings("linear") == [{"lr": 0.1}]
    assert len(plan.settings("lion")) == 4
    assert len(plan.settings("linear", {"robust_on": "all"})) == 4
    both = Plan(base, ("linear",), (1,), (*axes, Axis("robust_on", ("implicit", "all"))))
    assert len(both.settings("linear")) == 5
