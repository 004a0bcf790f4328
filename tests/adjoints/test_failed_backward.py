"""A backward solve that fails says so, raises, or is solved in another way, as one chooses."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
import warnings
from pathlib import Path

import pytest
import torch
from torch.utils.checkpoint import checkpoint

import deqcore
from deqcore import (
    Anderson,
    Broyden,
    ConvergenceError,
    ConvergenceWarning,
    Implicit,
    Picard,
    Status,
)

STEEP = torch.tensor([3.0, -3.0, 0.5], dtype=torch.float64)
FORWARD = Broyden(rtol=1e-12, atol=1e-13, max_steps=60)
ROOT = Path(deqcore.__file__).parents[1]
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT)}  # for processes of their own
EXACT = 1 / (1 - STEEP)  # -0.5, 0.25, 2


def steep(z, w):
    return STEEP * z + w


def gradient(on_failure, solver=Picard(), w=None, rows=1, **options):
    w = torch.ones(rows, 3, dtype=torch.float64, requires_grad=True) if w is None else w
    adjoint = Implicit(solver=solver, on_failure=on_failure)
    solution = deqcore.fixed_point(
        steep, torch.zeros(rows, 3, dtype=torch.float64), w, solver=FORWARD, adjoint=adjoint,
        **options,
    )  # fmt: skip
    solution.raise_for_status()
    solution.value.sum().backward()
    return w.grad, solution


def test_a_failed_backward_warns_by_default():
    assert Implicit().on_failure == "warn"
    with pytest.warns(ConvergenceWarning, match=r"backward.*on_failure='fallback'"):
        grad, solution = gradient("warn")
    assert not solution.backward.converged.any()
    assert not torch.allclose(grad, EXACT[None])


def test_a_failed_backward_raises_where_that_is_chosen():
    with pytest.raises(ConvergenceError, match=r"backward.*1 of 1 rows"):
        gradient("raise")


@pytest.mark.parametrize("batch", ["rows", "coupled"])
def test_a_failed_backward_falls_back(batch):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        grad, solution = gradient("fallback", rows=2, batch=batch)
    torch.testing.assert_close(grad, EXACT.expand(2, 3), rtol=1e-9, atol=0)
    assert solution.backward.converged.all()


def test_a_failed_backward_can_be_ignored():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        _, solution = gradient("ignore", Picard(max_steps=2))
    assert not solution.backward.converged.any()


def test_a_cause_is_told_once_in_a_process():
    code = """
        import warnings, torch, deqcore
        from deqcore import Implicit, Picard, Broyden
        torch.set_num_threads(1)
        for step in range(4):
            with warnings.catch_warnings():  # as libraries do; it makes Python forget
                pass
            w = torch.ones(1, 3, requires_grad=True)
            f = lambda z, w: torch.tensor([3.0, -3.0, 0.5]) * z + w
            value = deqcore.fixed_point(
                f, torch.zeros(1, 3), w, solver=Broyden(), adjoint=Implicit(solver=Picard())
            ).value
            value.sum().backward()
    """
    run = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        capture_output=True,
        text=True,
        timeout=300,
        env=ENVIRONMENT,
    )
    assert run.returncode == 0, run.stderr
    assert run.stderr.count("ConvergenceWarning") == 1


def test_rows_that_converged_keep_their_bits_in_a_fallback():
    """Row 1 is easy; row 0 needs another solver."""
    factors = torch.stack([STEEP, torch.tensor([0.1, 0.2, 0.3]).double()])

    def run(on_failure, rows):
        w = torch.ones(2, 3, dtype=torch.float64)[rows].requires_grad_()
        solution = deqcore.fixed_point(
            lambda z, w: factors[rows] * z + w, torch.zeros_like(w), w, solver=FORWARD,
            adjoint=Implicit(solver=Picard(), on_failure=on_failure),
        )  # fmt: skip
        solution.value.sum().backward()
        return w.grad, solution

    both, solution = run("fallback", slice(None))
    easy, _ = run("raise", slice(1, 2))
    assert torch.equal(both[1:], easy)
    torch.testing.assert_close(both[0], EXACT, rtol=1e-9, atol=0)
    assert solution.backward.converged.all()
    assert solution.backward.steps[0] > 0


@pytest.mark.parametrize("dim", [40, 300])
def test_a_fallback_solves_what_a_default_adjoint_cannot(dim):
    """With 40 elements by a dense solve, with 300 by more steps with more memory."""
    generator = torch.Generator().manual_seed(0)
    size = torch.rand(dim, generator=generator, dtype=torch.float64) * 0.8
    size[:10] = torch.tensor([3.0, -3.0] * 5)
    Q = torch.linalg.qr(torch.randn(dim, dim, generator=generator, dtype=torch.float64)).Q
    A = Q @ torch.diag(size) @ Q.T
    w = torch.ones(2, dim, dtype=torch.float64, requires_grad=True)
    loss = torch.randn(2, dim, generator=generator, dtype=torch.float64)
    eye = torch.eye(dim, dtype=torch.float64)
    exact = torch.linalg.solve((eye - A).T, loss.T).T
    z0 = torch.linalg.solve(eye - A, w.detach().T).T  # row-vectors: f(z) = z A^T + w
    solution = deqcore.fixed_point(
        lambda z, w: z @ A.T + w, z0, w,
        adjoint=Implicit(solver=Picard(), on_failure="fallback"),
    )  # fmt: skip
    (solution.value * loss).sum().backward()
    assert solution.backward.converged.all()
    torch.testing.assert_close(w.grad, exact, rtol=1e-2, atol=1e-3)


def test_a_fallback_that_fails_too_warns():
    w = torch.ones(1, 2, requires_grad=True)
    adjoint = Implicit(solver=Picard(max_steps=5), on_failure="fallback")
    solution = deqcore.fixed_point(lambda z, w: z + 0 * w, torch.ones(1, 2), w, adjoint=adjoint)
    with pytest.warns(ConvergenceWarning, match="fallback"):
        solution.value.sum().backward()
    assert not solution.backward.converged.any()


def test_a_fallback_solves_coupled_rows_as_one():
    """What one row takes from the other no solver by rows can know."""
    for scale in (0.0, 1.0, 50.0):
        w = torch.ones(2, 1, dtype=torch.float64, requires_grad=True)
        solution = deqcore.fixed_point(
            lambda z, w: 0.5 * z.flip(0) + w, torch.zeros(2, 1).double(), w,
            solver=Anderson(rtol=1e-10),
            adjoint=Implicit(solver=Anderson(rtol=1e-9, atol=1e-9), on_failure="fallback"),
        )  # fmt: skip
        (solution.value * torch.tensor([[1.0], [scale]]).double()).sum().backward()
        exact = torch.tensor([[4 + 2 * scale], [2 + 4 * scale]]).double() / 3
        torch.testing.assert_close(w.grad, exact, rtol=1e-4, atol=1e-6)
        assert solution.backward.status.tolist() == [Status.CONVERGED] * 2


def test_a_fallback_works_under_activation_checkpointing():
    w = torch.ones(2, 3, dtype=torch.float64, requires_grad=True)

    def block(w):
        return deqcore.fixed_point(
            steep, torch.zeros(2, 3, dtype=torch.float64), w, solver=FORWARD,
            adjoint=Implicit(solver=Picard(), on_failure="fallback"),
        ).value  # fmt: skip

    checkpoint(block, w, use_reentrant=False).sum().backward()
    torch.testing.assert_close(w.grad, EXACT.expand(2, 3), rtol=1e-9, atol=0)


def test_a_failed_backward_warns_under_activation_checkpointing():
    w = torch.ones(1, 3, dtype=torch.float64, requires_grad=True)

    def block(w):
        return deqcore.fixed_point(
            steep, torch.zeros(1, 3, dtype=torch.float64), w, solver=FORWARD,
            adjoint=Implicit(solver=Picard()),
        ).value  # fmt: skip

    with pytest.warns(ConvergenceWarning, match="backward"):
        checkpoint(block, w, use_reentrant=False).sum().backward()


def test_a_policy_of_another_name_is_refused():
    with pytest.raises(
        ValueError, match="on_failure must be 'warn', 'raise', 'fallback' or 'ignore'"
    ):
        Implicit(on_failure="rise")
