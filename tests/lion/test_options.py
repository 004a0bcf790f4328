"""An option is declared once: Python, the command line and config.json agree on it."""

from __future__ import annotations

import ast
import importlib
import json
import math
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, fields
from pathlib import Path

import pytest
import torch
from torch import Tensor

import lion_models
from lion_models import LionConfig
from lion_models.base.errors import UserError
from lion_models.base.options import declared, kinds_of, option
from lion_models.cli.app import COMMANDS
from lion_models.cli.fitting import AUTO
from lion_models.methods import METHODS, MethodConfig, register
from lion_models.methods.base import TunedClassifier
from lion_models.methods.registry import _methods, colour_of
from lion_models.run import RunConfig
from lion_models.run.config import GROUPS, all_options, owners_of
from tests.support.command import Lion

ROOT = Path(lion_models.__file__).parent
QUICK = ("--shots", 3, "--validation-shots", 2, "--epochs", 1)


def python(code: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", code]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)


def commands() -> dict[str, list[str]]:
    """The options of each command, as it spells them."""
    made = {name: importlib.import_module(f"lion_models.cli.{name}").command for name in COMMANDS}
    return {name: [o for p in each.params for o in p.opts] for name, each in made.items()}


def test_every_declared_option_is_one_of_the_command_line_with_its_default(lion: Lion):
    train = importlib.import_module("lion_models.cli.train").command
    made = {parameter.name: parameter for parameter in train.params}
    for group in (*GROUPS.values(), *METHODS.values()):
        for each, _ in kinds_of(group):
            assert declared(each).help.endswith("."), each.name
            assert f"--{each.name.replace('_', '-')}" in made[each.name].opts
            if each.name != "data":
                default = AUTO if each.name == "backbone" else each.default
                assert made[each.name].default == default, each.name
    assert "--test-cap" in commands()["compare"]
    assert "--prompt-dropout" in commands()["sweep"]


def test_no_text_outside_the_command_line_spells_an_option_as_it_does():
    """Messages name options as Python does; the command line alone adds the dashes."""
    known = {name for names in commands().values() for name in names}
    found = [
        f"{path.name}:{node.lineno}: {name}"
        for path in ROOT.rglob("*.py")
        if path.parent.name != "cli"
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
        for name in re.findall(r"--[a-z][a-z-]*", node.value)
        if name in known
    ]
    assert found == []


def test_python_and_the_command_line_say_the_same_of_a_value(lion: Lion, tmp_path: Path):
    with pytest.raises(UserError) as raised:
        RunConfig.of("digits", output_input="poold")
    assert str(raised.value) == (
        "`output_input`: expected one of embedding, pooled, got 'poold'; did you mean 'pooled'?"
    )
    refused = lion("train", "--data", "digits", "--output-input", "poold", "--runs", tmp_path)
    assert refused.code == 2
    assert refused.err == (
        "error: --output-input: expected one of embedding, pooled, got 'poold'; did you mean "
        "'pooled'?"
    )


def test_open_option_says_what_leaving_it_out_means():
    with pytest.raises(UserError, match=r"got 0\.0; leave it out for the rank"):
        RunConfig.of("digits", "lora", lora_alpha=0.0)


def test_flat_options_are_those_of_the_method_alone():
    config = RunConfig.of("digits", "lora", lora_rank=3)
    assert config.options()["lora_rank"] == 3
    assert "hidden" not in config.options()
    assert config.but(method="lion", hidden=3).options()["hidden"] == 3
    assert config.but(lora_rank=2) == RunConfig.of("digits", "lora")
    assert RunConfig.from_dict(config.options()) == config
    everything = all_options(data="digits")
    assert set(everything) == set(owners_of())
    assert RunConfig.from_dict(everything | {"method": "lora", "lora_rank": 3}) == config


def test_options_of_a_file_hold_where_the_command_line_has_none(
    lion: Lion, trained: Path, tmp_path: Path
):
    kept = ("train", "--config", trained, "--runs", tmp_path)
    assert lion(*kept, "--epochs", 1, "--no-test").code == 0
    [made] = tmp_path.glob("*/config.json")
    stored = json.loads((trained / "config.json").read_text())
    assert json.loads(made.read_text()) == stored | {"epochs": 1}
    (tmp_path / "all.json").write_text(json.dumps(stored | {"shots": None, "method": "linear"}))
    done = lion("train", "--config", tmp_path / "all.json", "--runs", tmp_path, "--name", "all",
                "--no-test")  # fmt: skip
    assert done.code == 0, done.err
    written = json.loads((tmp_path / "all" / "config.json").read_text())
    assert written["shots"] is None
    assert written["method"] == "linear"
    for content, message in (
        ("{", "cannot be read"),
        ('{"data": "digits", "hiden": 3}', "unknown keys hiden"),
    ):
        (tmp_path / "bad.json").write_text(content)
        refused = lion("train", "--config", tmp_path / "bad.json")
        assert refused.code == 2
        assert message in refused.err


@pytest.fixture
def shift() -> Iterator[type[MethodConfig]]:
    """A method as its file would register it."""

    class Shift(TunedClassifier):
        method = "shift"

        def __init__(self, backbone, classes: int, scale: float) -> None:
            super().__init__(backbone, classes)
            self.scale, self.shift = scale, torch.nn.Parameter(torch.zeros(backbone.feature_dim))

        @torch.no_grad()
        def frozen(self, images: Tensor) -> Tensor:
            return self.backbone(images)

        def tuned(self, fixed: Tensor) -> Tensor:
            return self.head(fixed + self.scale * self.shift)

    @register("shift", Shift)
    @dataclass(frozen=True)
    class ShiftConfig(MethodConfig):
        shift_scale: float = option(1.0, "Of the shift.", above=0)

    yield ShiftConfig
    del _methods["shift"]


def test_the_docstring_of_a_group_says_what_is_declared(shift: type[MethodConfig]):
    assert "    shift_scale: Of the shift. Default: 1.0. A number above 0." in shift.__doc__
    assert "    solver: Of the equilibrium. Default: anderson. One of" in LionConfig.__doc__


def test_options_that_no_dataclass_would_keep_are_refused():
    class Careless(MethodConfig):
        shift_scale: float = option(1.0, "Of the shift.", above=0)

    with pytest.raises(TypeError, match="shift_scale would be lost; put @dataclass"):
        register("careless", TunedClassifier)(Careless)
    assert "careless" not in METHODS


def test_registered_method_is_trained_compared_and_drawn(
    lion: Lion, shift: type[MethodConfig], image_folder: Path, backbone_file: Path, tmp_path: Path
):
    config = RunConfig.of(str(image_folder), "shift", shift_scale=2)
    assert config.options()["shift_scale"] == 2
    with pytest.raises(UserError, match="`shift_scale`: is an option of shift, not of lora"):
        RunConfig.of("digits", "lora", shift_scale=2)
    assert colour_of("shift") not in {each.colour for name, each in METHODS.items()
                                      if name != "shift"}  # fmt: skip
    done = lion("sweep", "--data", image_folder, "--backbone", backbone_file, *QUICK, "--runs",
                tmp_path, "--methods", "linear,shift", "--name", "s", "--grid",
                "shift.shift_scale=1,2", "--test-best")  # fmt: skip
    assert done.code == 0, done.err
    assert len(list(tmp_path.glob("s/shift-shift_scale=*/result.json"))) == 2
    assert (tmp_path / "s" / "tested.png").is_file()


def test_shared_option_means_the_same_to_all_methods_that_have_it():
    shared: dict[str, tuple[object, object]] = {}
    for group in (*GROUPS.values(), *METHODS.values()):
        for each in fields(group):
            said = (each.default, declared(each))
            assert shared.setdefault(each.name, said) == said, each.name


def test_help_and_the_list_of_data_load_no_torch():
    code = (
        "import sys; from lion_models.cli.app import lion; lion({}, standalone_mode=False); "
        "print('torch' in sys.modules)"
    )
    for arguments in (["--help"], ["data", "list"], ["data", "--help"]):
        done = python(code.format(arguments))
        assert done.returncode == 0, done.stderr
        assert done.stdout.rstrip().endswith("False"), arguments


def test_script_without_its_extra_says_what_to_install():
    hide = "import sys; sys.modules['{}'] = None; sys.argv = ['lion', 'info']; "
    for package in ("rich_click", "safetensors"):
        done = python(hide.format(package) + "from lion_models.cli import main; main()")
        assert done.returncode != 0
        assert "Traceback" not in done.stderr
        assert f"lion needs the package '{package}'" in done.stderr
        assert "pip install 'deqcore[lion]'" in done.stderr


def test_misspelt_command_is_suggested(lion: Lion):
    refused = lion("trian")
    assert refused.code == 2
    assert "did you mean 'train'?" in refused.err


def test_warning_is_a_message_with_the_options_of_the_command_line(
    image_folder: Path, backbone_file: Path, tmp_path: Path
):
    for name in ("dark", "light"):
        for index in range(6):
            (tmp_path / "data" / name).mkdir(parents=True, exist_ok=True)
            image = sorted((image_folder / name).iterdir())[index]
            (tmp_path / "data" / name / image.name).write_bytes(image.read_bytes())
    (tmp_path / "data" / "dark" / "bad.png").write_bytes(b"cut")
    done = python(
        "from lion_models.cli.app import lion; "
        f"lion(['train', '--data', r'{tmp_path / 'data'}', '--backbone', r'{backbone_file}', "
        "'--shots', '2', '--validation-shots', '1', '--epochs', '1', '--method', 'linear', "
        f"'--bad-files', 'skip', '--runs', r'{tmp_path}'])"
    )
    assert done.returncode == 0, done.stderr
    assert "warning: --data: left out 1 unusable file" in done.stderr


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("amp", "fp8", "`amp`: expected one of bf16, fp16, none, got 'fp8'"),
        ("accumulate", 0, "`accumulate`: expected 1 or more, got 0"),
        ("ema", 1.0, "`ema`: expected a decay such as 0.999, got 1.0"),
        ("ema", math.nan, "`ema`: expected a decay"),
        ("lr", 1e6, r"`lr`: expected a number above 0 and below 1,000, got 1000000\.0"),
        ("lr", 0.0, r"`lr`: expected a number above 0 and below 1,000, got 0\.0"),
        ("rtol", math.inf, "`rtol`: expected a number above 0 and below 1,000, got inf"),
        ("imbalance", 1e9, "`imbalance`: expected 1 or more and below 1,000,000, got 1000000000"),
        ("imbalance", 0.5, r"`imbalance`: expected 1 or more and below 1,000,000, got 0\.5"),
        ("patience", 0, "`patience`: expected 1 or more, got 0"),
        ("class_weights", "balancd", "did you mean 'balanced'"),
        ("weight_decay", math.nan, "`weight_decay`: expected 0 or more, got nan"),
        ("strength", math.nan, "`strength`: expected a number such as 1.0, got nan"),
        ("weight_decay", math.inf, "`weight_decay`: expected 0 or more, got inf"),
        ("seed", 99999999999999, "`seed`: expected a whole number within ±4294967295, got 99999"),
    ],
)
def test_bad_values_are_named(option: str, value: object, message: str):
    with pytest.raises(UserError, match=message):
        RunConfig.of(data="digits", **{option: value})
