"""torchdeq's interface: the same calls and solutions, and nothing dropped in silence."""

from __future__ import annotations

import argparse
import copy
import pickle

import pytest
import torch
from torch import nn

from deqcore.compat.torchdeq import KNOWN, get_deq
from tests.support.problems import Counted, affine

F64 = torch.float64
SOLVERS = ["fixed_point_iter", "simple_fixed_point_iter", "anderson", "broyden"]
TIGHT = {"f_tol": 1e-9, "b_tol": 1e-10, "f_max_iter": 150, "b_max_iter": 150}


def problem(batch=3, dim=8):
    A, b = affine(dim, 0.6)
    x = (b * torch.linspace(0.5, 2, batch, dtype=F64)[:, None]).requires_grad_()
    return A, x, torch.zeros(batch, dim, dtype=F64)


def exact(A, x):
    return torch.linalg.solve(torch.eye(len(A), dtype=F64) - A, x.mT).mT


def solved(get, options, A, x, z0):
    z_out, info = get(options)(lambda z: z @ A.T + x, z0)
    (grad,) = torch.autograd.grad(z_out[-1].square().sum(), x)
    return z_out, grad, info


# Against torchdeq


@pytest.mark.parametrize("f_solver", SOLVERS)
@pytest.mark.parametrize("mode", ["abs", "rel"])
def test_solution_and_gradient_are_torchdeqs(f_solver, mode):
    torchdeq = pytest.importorskip("torchdeq")
    A, x, z0 = problem()
    options = dict(TIGHT, f_solver=f_solver, b_solver="broyden", f_stop_mode=mode, ift=True)
    ours, our_grad, our_info = solved(get_deq, options, A, x, z0)
    theirs, their_grad, their_info = solved(torchdeq.get_deq, dict(options), A, x, z0)
    assert len(ours) == len(theirs) == 1
    torch.testing.assert_close(ours[0], theirs[0], rtol=1e-7, atol=1e-7)
    torch.testing.assert_close(our_grad, their_grad, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(ours[0], exact(A, x), rtol=1e-7, atol=1e-7)
    assert set(our_info) == set(their_info)
    for name in ("abs_lowest", "rel_lowest", "nstep"):
        assert our_info[name].shape == their_info[name].shape == (3,)
        assert our_info[name].is_floating_point()
    limit = 1e-14 if f_solver == "simple_fixed_point_iter" else 1e-9
    assert (our_info[f"{mode}_lowest"] < limit).all()


def test_plain_iteration_stops_where_torchdeq_does():
    torchdeq = pytest.importorskip("torchdeq")
    A, x, z0 = problem(batch=1)
    for mode in ("abs", "rel"):
        options = {"f_tol": 1e-5, "f_stop_mode": mode, "f_max_iter": 100}
        infos = [solved(get, dict(options), A, x, z0)[2] for get in (get_deq, torchdeq.get_deq)]
        assert infos[0]["nstep"].item() == infos[1]["nstep"].item()
        steps = int(infos[0]["nstep"].item())
        torch.testing.assert_close(
            infos[0]["abs_trace"][:, :steps], infos[1]["abs_trace"][:, 1 : steps + 1]
        )


@pytest.mark.parametrize(("grad", "tau"), [(1, 1.0), (4, 1.0), (3, 0.6)])
def test_phantom_gradient_is_torchdeqs(grad, tau):
    torchdeq = pytest.importorskip("torchdeq")
    A, x, z0 = problem()
    options = dict(TIGHT, grad=grad, tau=tau)
    grads = [solved(get, dict(options), A, x, z0)[1] for get in (get_deq, torchdeq.get_deq)]
    torch.testing.assert_close(*grads, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("options", "ours", "theirs"),
    [
        ({"n_states": 3}, [4, 8, 12], [6, 12, 18]),
        ({"indexing": [4, 9]}, [3, 7, 12], [5, 11, 18]),
    ],
)
def test_states_on_the_way_are_torchdeqs_but_for_the_steps_after_them(options, ours, theirs):
    torchdeq = pytest.importorskip("torchdeq")
    A, x, z0 = problem()
    iterates = [z0]
    for _ in range(20):
        iterates.append(iterates[-1] @ A.T + x)
    # torchdeq returns, and goes on from, f of a slice's last value; we the last one measured.
    for get, numbers in ((get_deq, ours), (torchdeq.get_deq, theirs)):
        z_out, _ = get(dict(options, f_max_iter=15, f_tol=0.0))(lambda z: z @ A.T + x, z0)
        assert len(z_out) == 3
        for state, number in zip(z_out, numbers, strict=True):
            assert state.requires_grad
            torch.testing.assert_close(state, iterates[number])


def test_a_namespace_of_torchdeqs_parser_is_accepted_as_it_is():
    pytest.importorskip("torchdeq")
    from torchdeq.utils import add_deq_args

    parser = argparse.ArgumentParser()
    add_deq_args(parser)
    A, x, z0 = problem()
    z_out, _, info = solved(get_deq, parser.parse_args(["--f_solver", "anderson"]), A, x, z0)
    torch.testing.assert_close(z_out[0], exact(A, x), atol=2e-3, rtol=0)
    assert (info["abs_lowest"] < 1e-3).all()


# By itself


def test_a_list_of_states_is_spread_over_the_call_and_returned_as_a_list():
    x = torch.randn(4, 3)
    z_out, _ = get_deq(f_tol=1e-5)(
        lambda a, b: (0.5 * torch.tanh(b.mean(2)) + x, 0.3 * b + a[..., None]),
        (torch.zeros(4, 3), torch.zeros(4, 3, 2)),
    )
    a, b = z_out[0]
    assert isinstance(z_out[0], list)
    torch.testing.assert_close(b, a[..., None].expand(4, 3, 2) / 0.7, rtol=1e-4, atol=1e-4)


def test_evaluation_mode_has_its_own_budget_and_keeps_gradients():
    A, x, z0 = problem()
    f = Counted(lambda z: z @ A.T + x)
    deq = get_deq(f_max_iter=10, f_tol=0.0, eval_factor=2, n_states=2, ift=True).eval()
    z_out, _ = deq(f, z0)
    assert (len(z_out), f.calls) == (1, 21)  # the last one is for the gradient
    assert z_out[0].requires_grad
    with torch.no_grad():
        assert not deq(f, z0)[0][0].requires_grad
    assert get_deq(f_max_iter=10, eval_factor=2, eval_f_max_iter=3).eval_f_max_iter == 3


def test_options_of_a_call():
    A, x, z0 = problem()
    f = Counted(lambda z: z @ A.T + x)
    with torch.no_grad():
        get_deq(f_tol=0.0)(f, z0, solver_kwargs={"f_max_iter": 5, "tau": 0.5})
        assert f.calls == 5
        deq = get_deq(f_solver="anderson", f_tol=1e-8)
        _, info = deq(f, z0, {"m": 9, "lam": 1e-4}, sradius_mode=True)
    torch.testing.assert_close(info["sradius"], torch.full((3,), 0.6, dtype=F64))
    assert deq.report.converged.all()
    assert deq(f, z0)[1]["sradius"].tolist() == [-1]


def test_the_backward_solve_is_reported():
    A, x, z0 = problem()
    deq = get_deq(ift=True, b_solver="anderson")
    z_out, _ = deq(lambda z: z @ A.T + x, z0)
    (1e-7 * z_out[0].sum()).backward()
    assert deq.report.backward.converged.all()
    # An absolute tolerance would have been met by zero.
    dense = 1e-7 * torch.linalg.solve((torch.eye(8, dtype=F64) - A).mT, torch.ones(8, dtype=F64))
    torch.testing.assert_close(x.grad, dense.expand(3, 8), rtol=1e-4, atol=1e-12)


def test_the_callers_options_are_not_changed():
    options = {"f_solver": "anderson", "grad": [2], "indexing": []}
    before = copy.deepcopy(options)
    namespace = argparse.Namespace(**options)
    get_deq(options, f_solver="broyden", ift=True)
    get_deq(namespace, f_solver="broyden", ift=True)
    assert options == before
    assert vars(namespace) == before
    kwargs = {"tau": 0.5}
    get_deq()(lambda z: 0.5 * z, torch.ones(2, 3), solver_kwargs=kwargs)
    assert kwargs == {"tau": 0.5}


def test_keywords_override_and_the_module_is_copied_and_pickled():
    deq = get_deq({"f_solver": "anderson"}, f_solver="broyden", ift=True)
    assert "f_solver='broyden'" in repr(nn.Sequential(deq))
    z0 = torch.zeros(2, 3)
    for twin in (copy.deepcopy(deq), pickle.loads(pickle.dumps(deq))):
        torch.testing.assert_close(twin(torch.cos, z0)[0], deq(torch.cos, z0)[0])


@pytest.mark.parametrize(
    ("name", "nearest"),
    [
        ("f_max_iters", "f_max_iter"),
        ("fsolver", "f_solver"),
        ("stop_mode", "f_stop_mode"),
        ("IFT", "n_states"),  # whatever it is, one is named
    ],
)
def test_an_unknown_option_names_the_nearest(name, nearest):
    with pytest.raises(TypeError, match=f"unknown option '{name}'; the nearest known is") as error:
        get_deq({name: 1})
    assert any(known in str(error.value) for known in KNOWN)
    if name != "IFT":
        assert nearest in str(error.value)
    with pytest.raises(TypeError, match=f"unknown option '{name}'"):
        get_deq(**{name: 1})
    with pytest.raises(TypeError, match=f"solver_kwargs: unknown option '{name}'"):
        get_deq()(torch.cos, torch.ones(2, 2), solver_kwargs={name: 1})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"core": "indexing", "n_states": 2}, "use core='sliced'"),
        ({"core": "indexing", "indexing": [3]}, "use core='sliced'"),
        ({"sup_gap": 2}, "use core='sliced'"),
        ({"sup_loc": [2]}, "use core='sliced'"),
        ({"norm_type": "spectral_norm"}, "use deqcore.normalization"),
        ({"jac_loss_weight": 0.1}, "use deqcore.jacobian_penalty"),
        ({"sradius_mode": True}, r"deq\(f, z0, sradius_mode=True\)"),
        ({"f_solver": "newton"}, "f_solver must be one of fixed_point_iter.*got 'newton'"),
        ({"b_stop_mode": "max"}, "b_stop_mode must be one of abs, rel"),
        ({"core": "custom"}, "core must be one of sliced, indexing"),
        ({"f_max_iter": 0}, "f_max_iter must be an integer"),
        ({"b_tol": -1.0}, "b_tol must be a number"),
        ({"ift": "yes"}, "ift must be True or False"),
        ({"grad": 0}, "steps must be an integer"),
        ({"grad": [1, 2]}, r"grad must hold 1 or 1 numbers, got \[1, 2\]"),
        ({"tau": 0.0}, "damping must be a number above 0"),
        ({"n_states": 2, "indexing": [3]}, "pass one of them"),
        ({"n_states": 50}, "leaves a state without a step"),
        ({"indexing": [30, 20]}, "leaves a state without a step"),
        ({"indexing": 3}, "indexing must be a list"),
        ({"eval_factor": 0.001}, "max_steps must be an integer"),
    ],
)
def test_a_behaviour_that_is_not_offered_or_a_bad_value_says_what_to_use(options, message):
    with pytest.raises(ValueError, match=message):
        get_deq(options)


@pytest.mark.parametrize("which", ["ift", "hook_ift"])
def test_tau_of_a_phantom_gradient_is_checked_only_where_there_is_one(which):
    deq = get_deq({which: True}, f_solver="anderson", tau=1.5)
    z_out, _ = deq(lambda z: 0.5 * z + 1, torch.zeros(2, 3))
    torch.testing.assert_close(z_out[-1], torch.full((2, 3), 2.0), rtol=1e-2, atol=1e-2)
    with pytest.raises(ValueError, match="damping must be a number above 0 and at most 1"):
        get_deq({which: True}, n_states=2, tau=1.5)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"lam": 1e-3}, r"Anderson\(ridge=\.\.\.\)"),
        ({"ls": True}, "no line search"),
        ({"return_final": True}, "best measured iterate"),
        ({"m": 4}, "fixed_point_iter has no m"),
    ],
)
def test_options_of_a_call_that_have_no_effect_are_refused(kwargs, message):
    with pytest.raises(ValueError, match=message):
        get_deq()(torch.cos, torch.ones(2, 2), solver_kwargs=kwargs)


def test_a_backward_writer_is_refused():
    with pytest.raises(ValueError, match=r"deq\.report\.backward"):
        get_deq()(torch.cos, torch.ones(2, 2), backward_writer=print)
