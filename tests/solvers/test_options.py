"""Options: validated when a solver or an adjoint is made, with messages that help."""

from __future__ import annotations

import copy
import dataclasses
import inspect
import math
import pickle

import pytest
import torch

import deqcore
from deqcore import Anderson, Broyden, Implicit, Phantom, Picard, Unrolled
from tests.support.problems import halving_damping

SOLVERS = [Picard, Anderson, Broyden]
OPTION_CLASSES = [*SOLVERS, Implicit, Phantom, Unrolled]
NAN, INF = math.nan, math.inf


@pytest.mark.parametrize("kind", SOLVERS)
@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("rtol", [-1e-3, NAN, "1e-3", True]),
        ("atol", [-1.0, NAN, None]),
        ("max_steps", [0, -1, 2.0, True, None, "5"]),
        ("patience", [0, -3, 1.5, None]),
        ("check_every", [-1, 0.5, None, False]),
        ("record_trace", [0, 1, None, "yes"]),
        ("damping", [0.0, -0.5, 2.1, NAN, None, "0.5", True]),
    ],
)
def test_bad_value_of_a_common_option_is_a_value_error(kind, name, values):
    for value in values:
        with pytest.raises(ValueError, match=f"{kind.__name__}: {name} must be .*{value!r}$"):
            kind(**{name: value})


@pytest.mark.parametrize(
    ("kind", "name", "values"),
    [
        (Anderson, "memory", [0, 65, -1, 5.0, None]),
        (Anderson, "ridge", [-1e-9, NAN, INF, None]),
        (Anderson, "start", [-1, 1.0, None]),
        (Anderson, "restart", [0, -1, 2.5, False]),
        (Anderson, "safeguard", [0.99, NAN, None]),
        (Anderson, "max_weight", [0.5, NAN, None]),
        (Broyden, "memory", [0, 65, 3.0]),
        (Broyden, "history_dtype", [torch.float16, torch.float64, torch.int16, "bfloat16", 16]),
        (Implicit, "solver", [None, "anderson", Anderson]),
        (Implicit, "reuse_forward", [None, 1]),
        (Phantom, "steps", [0, 1.0, None]),
        (Phantom, "damping", [0.0, 1.01, NAN, None]),
        (Unrolled, "checkpoint_every", [0, -1, 2.0, True]),
    ],
)
def test_bad_value_is_a_value_error_that_names_class_option_and_value(kind, name, values):
    for value in values:
        with pytest.raises(ValueError, match=f"{kind.__name__}: {name} must be") as info:
            kind(**{name: value})
        assert repr(value) in str(info.value)


@pytest.mark.parametrize(
    ("kind", "typo", "meant"),
    [
        (Anderson, "memery", "memory"),
        (Anderson, "max_step", "max_steps"),
        (Anderson, "safegaurd", "safeguard"),
        (Picard, "dampening", "damping"),
        (Broyden, "memmory", "memory"),
        (Broyden, "history_dtyp", "history_dtype"),
        (Implicit, "solvers", "solver"),
        (Phantom, "step", "steps"),
        (Unrolled, "checkpoint_evry", "checkpoint_every"),
    ],
)
def test_misspelt_option_is_a_type_error_that_names_the_right_one(kind, typo, meant):
    with pytest.raises(TypeError, match=f"unknown option '{typo}'; did you mean '{meant}'"):
        kind(**{typo: 4})


def test_unknown_option_lists_the_known_ones():
    with pytest.raises(TypeError, match=r"unknown option 'tol'.*Options: .*rtol.*atol"):
        Anderson(tol=1e-3)
    with pytest.raises(TypeError, match="unknown option 'memory'"):
        Picard(memory=5)


@pytest.mark.parametrize("kind", OPTION_CLASSES)
def test_options_are_keywords(kind):
    with pytest.raises(TypeError, match="options are keywords"):
        kind(3)


@pytest.mark.parametrize("kind", OPTION_CLASSES)
def test_options_are_frozen_hashable_comparable_and_picklable(kind):
    default = kind()
    field = dataclasses.fields(kind)[0].name
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(default, field, getattr(default, field))
    assert default == kind()
    assert hash(default) == hash(kind())
    assert {default: 1}[kind()] == 1
    for same in (copy.copy(default), copy.deepcopy(default), pickle.loads(pickle.dumps(default))):
        assert same == default
        assert type(same) is kind
    assert eval(repr(default), vars(deqcore)) == default
    assert inspect.signature(kind).parameters.keys() == {f.name for f in dataclasses.fields(kind)}


def test_options_of_different_classes_or_values_differ():
    assert Anderson(memory=4) != Anderson()
    assert Anderson(memory=1) != Picard()
    assert len({Anderson(), Anderson(memory=4), Picard(), Broyden(), Picard(damping=0.5)}) == 5


def test_a_solver_with_a_damping_function_can_be_pickled():
    solver = Anderson(damping=halving_damping)
    assert pickle.loads(pickle.dumps(solver)) == solver


def test_a_solver_with_a_history_dtype_can_be_pickled_and_compared():
    solver = Broyden(history_dtype=torch.bfloat16)
    assert pickle.loads(pickle.dumps(solver)) == solver != Broyden()
    assert {solver: 1}[copy.deepcopy(solver)] == 1


def test_replace_validates_again():
    assert dataclasses.replace(Anderson(), memory=9).memory == 9
    with pytest.raises(ValueError, match="memory must be"):
        dataclasses.replace(Anderson(), memory=0)


@pytest.mark.parametrize("kind", SOLVERS)
@pytest.mark.parametrize("bad", [0.0, -1.0, 2.5, NAN])
def test_damping_function_out_of_range_names_the_step(kind, bad):
    solver = kind(damping=lambda step: bad if step == 3 else 1.0)
    with pytest.raises(ValueError, match=rf"{kind.__name__}: damping\(3\) must be .*{bad!r}"):
        deqcore.fixed_point(lambda z: 0.5 * z, torch.ones(2, 3), solver=solver)


@pytest.mark.parametrize(
    "solver",
    [
        Anderson(safeguard=INF, max_weight=INF),
        Anderson(memory=64, max_steps=70),
        Broyden(memory=64, max_steps=70),
        Anderson(rtol=INF),
        Picard(damping=2),
        Anderson(ridge=0),
        Anderson(max_steps=10**30, patience=2**63, restart=2**64),
        Broyden(max_steps=2**63, patience=10**30),
    ],
    ids=repr,
)
def test_extreme_but_valid_options_solve(solver):
    z0 = torch.zeros(3, 80, dtype=torch.float64)
    shift = torch.linspace(-1, 1, 80, dtype=torch.float64)
    solution = deqcore.fixed_point(
        lambda z: 0.9 * torch.sin(z).roll(1, 1) - 0.9 * z + shift, z0, solver=solver
    )
    if solver != Picard(damping=2):
        solution.raise_for_status()
    assert solution.value.isfinite().all()
