"""`deqcore.diagnose`: each finding on an f that shows it and on one that does not."""

from __future__ import annotations

import dataclasses
import random
import runpy
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import deqcore
from deqcore.diagnosis._findings import best_damping
from tests.support.problems import affine, generator

STATE = torch.zeros(4, 6)


def contraction(z, x=1.0):
    return 0.5 * torch.tanh(z) + x


def late(z):
    """Rows depend on each other only beyond z0 and its neighbourhood."""
    return torch.stack([0.1 * z[0] + torch.relu(z[1] - 3), 0.9 * z[1] + 1])


class Raises(torch.autograd.Function):
    @staticmethod
    def forward(ctx, z):
        return 0.5 * z + 1

    @staticmethod
    def backward(ctx, grad):
        raise RuntimeError("this op has no derivative")


def in_bfloat16(z):
    return (0.5 * z.bfloat16() + 1).float()


def normed(z):
    return 0.5 * nn.functional.batch_norm(z, None, None, training=True) + z * 0.1 + 1


def spectral():
    """Its power iteration, far from done, goes on in every call in training mode."""
    linear = nn.utils.parametrizations.spectral_norm(nn.Linear(6, 6))
    linear.parametrizations.weight[0]._v.fill_(6**-0.5)
    return lambda z: 0.5 * linear(z) + torch.arange(6.0)


def with_module(module):
    return lambda z: 0.5 * module(z) + 1


SHOWING = {
    "in place": lambda z: z.mul_(0.5) + 1,
    "in place, behind autograd's back": lambda z: z.data.mul_(0.5) + 1,
    "repeatable": with_module(nn.Dropout(0.5)),
    "repeatable, a state": spectral(),
    "repeatable, NumPy's numbers": lambda z: 0.5 * z + float(np.random.rand()),
    "rows": lambda z: 0.5 * z.flip(0) + 1,
    "rows, batch norm": normed,
    "rows, far from the start": late,
    "finite": lambda z: torch.sqrt(z - 1),
    "gradient": lambda z: 0.5 * z.detach() + 1,
    "gradient, raised": Raises.apply,
    "contraction": lambda z: -3 * z + 1,
    "dtype": in_bfloat16,
    "solvers": lambda z: z + 1 + z * z,
}


@pytest.mark.parametrize("case", SHOWING)
def test_what_is_wrong_is_found(case):
    z0 = torch.zeros(2, 1) if "far" in case else torch.linspace(-1, 1, 24).view(4, 6)
    diagnosis = deqcore.diagnose(SHOWING[case], z0, max_steps=40)
    assert not diagnosis[case.split(",")[0]].ok
    assert not diagnosis.ok
    assert "!!" in str(diagnosis)


@pytest.mark.parametrize("batch", ["rows", "coupled"])
def test_nothing_is_found_in_a_contraction(batch):
    diagnosis = deqcore.diagnose(contraction, STATE, torch.ones(6), batch=batch)
    assert diagnosis.ok, str(diagnosis)
    assert "!!" not in str(diagnosis)


def test_findings_name_what_to_do():
    def text(case, name):
        return deqcore.diagnose(SHOWING[case], torch.rand(4, 6), max_steps=10)[name].text

    assert "z.clone()" in text("in place", "in place")
    assert "draws random numbers (Dropout in training mode)" in text("repeatable", "repeatable")
    assert "keeps a state" in text("repeatable, a state", "repeatable")
    assert "batch='coupled'" in text("rows", "rows")
    assert "no derivative" in text("gradient, raised", "gradient")
    assert "damping=0.25" in text("contraction", "contraction")
    assert "bfloat16, of a float32 state" in text("dtype", "dtype")


@pytest.mark.parametrize("mode", [True, False])
def test_modules_in_eval_mode_are_repeatable_and_row_wise(mode):
    net = nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(6), nn.Dropout(0.2)).train(mode)
    with torch.no_grad():
        net[0].weight.mul_(0.5)
    diagnosis = deqcore.diagnose(with_module(net), torch.rand(4, 6, generator=generator(1)))
    assert diagnosis["repeatable"].ok is not mode
    assert diagnosis["rows"].ok is not mode
    assert diagnosis.coupled_rows == ((0, 1, 2, 3) if mode else ())


def test_a_dropout_that_is_fixed_for_a_solve_is_repeatable():
    torch.manual_seed(1)
    dropout = deqcore.FixedDropout(0.5)
    diagnosis = deqcore.diagnose(lambda z: 0.25 * dropout(z) + 1, torch.rand(4, 6))
    assert diagnosis.ok, str(diagnosis)
    ordinary = deqcore.diagnose(with_module(nn.Dropout(0.5)), torch.rand(4, 6), max_steps=10)
    assert "take deqcore.FixedDropout" in ordinary["repeatable"].text


def test_rows_that_do_not_depend_on_others_are_not_named():
    def f(z):
        z = 0.5 * z
        return torch.cat([z[:3], z[3:] + 0.1 * z[:1]]) + 1

    assert deqcore.diagnose(f, torch.rand(5, 3)).coupled_rows == (3, 4)


def test_a_constant_f_has_the_gradient_that_it_should_have():
    x = torch.ones(4, 6)
    diagnosis = deqcore.diagnose(lambda z: x, STATE)
    assert diagnosis["gradient"].ok
    assert diagnosis.radius.tolist() == [0, 0, 0, 0]


def test_radius_and_damping_are_those_of_the_eigenvalues():
    """A has -1.4 and 0.93 + 0.76i, and is no contraction; its negative has 1.4."""
    A, b = affine(8, 1.4)
    for sign, damping in ((1, "damping=0.1 makes that 0.996"), (-1, "no damping")):
        J = sign * A
        values = torch.linalg.eigvals(J)
        diagnosis = deqcore.diagnose(
            lambda z, J: z @ J.T + b, torch.zeros(2, 8).double(), J, rtol=1e-9
        )
        assert diagnosis.radius.tolist() == pytest.approx([1.4, 1.4])
        assert not diagnosis["contraction"].ok
        assert damping in diagnosis["contraction"].text
        found = diagnosis.eigenvalues[0]
        assert (found - values[:, None]).abs().amin(1).max() < 1e-6


def test_best_damping_of_known_eigenvalues():
    assert best_damping(torch.tensor([[-3.0 + 0j]])) == 0.25
    assert best_damping(torch.tensor([[-3.0 + 0j, 0.0]])) == 0.4
    assert best_damping(torch.tensor([[0.0 + 0j]])) is None
    assert best_damping(torch.tensor([[1.1 + 0j]])) is None
    assert best_damping(torch.tensor([[torch.nan + 0j]])) is None


@pytest.mark.parametrize(
    ("f", "z0", "options"),
    [
        (contraction, STATE, {}),
        (lambda z: 0.5 * z.flip(0) + 1, STATE, {}),
        (lambda z: -3 * z + 1, STATE + 1, {"rtol": 1e-6}),
        (lambda z: 0.97 * z.roll(1, 1) + torch.arange(6.0), STATE, {"max_steps": 60}),
        (lambda z: torch.cos(z), STATE.double(), {"rtol": 1e-12, "atol": 0.0}),
        (torch.cos, STATE, {"rtol": 0.0, "atol": 1e-9}),
        (torch.cos, STATE + torch.rand(6), {"rtol": 1e-9, "atol": 0.0}),
        (in_bfloat16, STATE, {"rtol": 1e-5, "atol": 0.0}),
    ],
)
def test_the_call_that_is_written_converges(f, z0, options):
    diagnosis = deqcore.diagnose(f, z0, **options)
    solution = eval(diagnosis.call, {"deqcore": deqcore, "f": f, "z0": z0, "args": ()})
    assert solution.converged.all(), str(diagnosis)
    for name, value in options.items():
        if name != "max_steps" and diagnosis["solvers"].ok:
            assert f"{name}={value!r}" in diagnosis.call


def test_the_number_of_calls_is_that_of_a_solve():
    x = torch.randn(3, 6, generator=generator(3))
    diagnosis = deqcore.diagnose(contraction, torch.zeros(3, 6), x)
    for trace in diagnosis.traces:
        solver = dataclasses.replace(trace.solver, rtol=None, atol=1e-6)
        with torch.no_grad():
            solution = deqcore.fixed_point(contraction, torch.zeros(3, 6), x, solver=solver)
        assert trace.evaluations == solution.steps.max()
        assert trace.converged == 3


def test_slow_convergence_is_told_from_none():
    slow = deqcore.diagnose(lambda z: 0.999 * z + torch.arange(6.0) * 0.001, STATE, rtol=1e-6,
                            atol=0.0, max_steps=3)  # fmt: skip
    assert slow["contraction"].ok
    none = deqcore.diagnose(lambda z: z + 1 + z * z, STATE)
    assert "Lipschitz" in none.advice


def test_diagnosing_leaves_nothing_behind():
    net = nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(6), nn.Dropout(0.5))
    before = {name: value.clone() for name, value in net.state_dict().items()}
    z0, x = torch.rand(4, 6), torch.rand(4, 6, requires_grad=True)
    kept = z0.clone()
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()

    def f(z, x):
        random.random(), np.random.rand()
        return net(z) + x

    deqcore.diagnose(f, z0, x)
    assert torch.equal(torch.get_rng_state(), states[0])
    assert random.getstate() == states[1]
    assert (np.random.get_state()[1] == states[2]).all()
    assert torch.equal(z0, kept)
    for name, value in net.state_dict().items():
        assert torch.equal(value, before[name]), name
    assert x.grad is None
    assert all(p.grad is None for p in net.parameters())
    assert not torch.nn.modules.module._global_forward_pre_hooks


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_dtypes_and_pytrees(dtype):
    z0 = {"a": torch.zeros(3, 2, 2, dtype=dtype), "b": torch.zeros(3, 5)}
    diagnosis = deqcore.diagnose(lambda z: {k: 0.5 * v + 1 for k, v in z.items()}, z0)
    assert diagnosis["solvers"].ok
    assert (diagnosis.rows, diagnosis.dim) == (3, 9)
    if dtype != torch.float64:
        assert diagnosis.floor == torch.finfo(dtype).eps


def test_inference_mode_and_a_single_number():
    with torch.inference_mode():
        assert deqcore.diagnose(torch.cos, torch.tensor(0.5)).ok


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: deqcore.diagnose(3, STATE), TypeError, "f: expected a callable"),
        (lambda: deqcore.diagnose(torch.cos, STATE[:0]), ValueError, "at least one row"),
        (lambda: deqcore.diagnose(torch.cos, STATE, rtol=-1.0), ValueError, "rtol"),
        (lambda: deqcore.diagnose(torch.cos, STATE, rtol=0, atol=0), ValueError, "above 0"),
        (lambda: deqcore.diagnose(torch.cos, STATE, krylov=0), ValueError, "krylov"),
        (lambda: deqcore.diagnose(torch.cos, STATE, batch="row"), ValueError, "batch"),
        (lambda: deqcore.diagnose(lambda z: z[:1], STATE), ValueError, "expected shape"),
        (lambda: deqcore.diagnose(torch.cos, STATE)["speed"], KeyError, "there are in place"),
    ],
)
def test_errors_name_what_was_wrong(call, error, message):
    with pytest.raises(error, match=message):
        call()


@pytest.mark.parametrize("case", ["in place", "rows", "finite", "contraction"])
def test_picture_is_written(case, tmp_path):
    pytest.importorskip("matplotlib")
    from matplotlib.image import imread

    path = tmp_path / "diagnosis.png"
    deqcore.diagnose(SHOWING[case], torch.linspace(-1, 1, 24).view(4, 6)).save(path)
    picture = imread(path)
    assert picture.shape[1] > 1500
    assert picture[..., :3].std() > 0.05, "it is not blank"


def test_without_matplotlib_the_error_says_what_to_install(tmp_path):
    code = f"""
import sys
sys.modules["matplotlib"] = None
import deqcore, torch
diagnosis = deqcore.diagnose(torch.cos, torch.zeros(2, 3))
print(diagnosis)
diagnosis.save({str(tmp_path / "x.png")!r})
"""
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "deqcore.diagnose: 2 rows of 3" in out.stdout
    assert "ImportError: Diagnosis.save needs matplotlib" in out.stderr
    assert "pip install 'deqcore[plot]'" in out.stderr


def test_the_example_finds_a_solver_where_the_default_has_none(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["diagnose.py"])
    runpy.run_path(str(Path(__file__).parents[1] / "examples/diagnose.py"), run_name="__main__")
    out = capsys.readouterr().out
    assert "by default 4 of 8 rows converge" in out
    assert "deqcore.fixed_point(f, z0, *args, solver=deqcore.Broyden(max_steps=" in out
