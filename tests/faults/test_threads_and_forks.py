"""Several threads in one solver or layer at a time, and solves in a process that was forked."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import nn

import deqcore
from deqcore import Anderson, Broyden, Implicit, NewtonKrylov, Phantom, Picard, Unrolled
from tests.support.problems import equal, generator

THREADS, ROUNDS = 5, 4


class Cell(nn.Module):
    def __init__(self, dim=12):
        super().__init__()
        self.weight = nn.Parameter(0.15 * torch.randn(dim, dim, generator=generator(1)))
        self.norm = nn.BatchNorm1d(dim)

    def forward(self, z, x):
        return torch.tanh(self.norm(z) @ self.weight + x)


def inputs(thread, dim=12):
    return torch.randn(3 + thread, dim, generator=generator(thread))


def at_once(work):
    """work(0), work(1), ... in threads that begin together, ROUNDS times; the results."""
    together = threading.Barrier(THREADS)

    def run(thread):
        together.wait()
        return [work(thread) for _ in range(ROUNDS)]

    with ThreadPoolExecutor(THREADS) as pool:
        return list(pool.map(run, range(THREADS)))


def check(work):
    expected = [work(thread) for thread in range(THREADS)]
    for thread, rounds in enumerate(at_once(work)):
        for found in rounds:
            for a, b in zip(found, expected[thread], strict=True):
                assert equal(a, b)


@pytest.mark.parametrize(
    ("solver", "adjoint"),
    [
        (Picard(), Implicit()),
        (Anderson(), Implicit()),
        (Anderson(), Phantom()),
        (Anderson(), Unrolled()),
        (Broyden(memory=3), Implicit(reuse_forward=True)),
        (NewtonKrylov(memory=3, max_steps=20), Implicit()),
    ],
)
def test_threads_that_share_solver_adjoint_and_cell_get_their_own_answers(solver, adjoint):
    cell = Cell().eval()

    def work(thread):
        x = inputs(thread).requires_grad_()
        solution = deqcore.fixed_point(cell, torch.zeros_like(x), x, solver=solver, adjoint=adjoint)
        (grad,) = torch.autograd.grad(solution.value.square().sum(), x)
        return solution.value.detach(), solution.steps, grad

    check(work)


def test_threads_that_share_a_layer_get_their_own_answers():
    layer = deqcore.ImplicitLayer(Cell().eval())

    def work(thread):
        x = inputs(thread).requires_grad_()
        value = layer(x)
        (grad,) = torch.autograd.grad(value.sum(), x)
        return value.detach(), grad

    check(work)


def test_running_statistics_of_each_threads_own_cell():
    """Modules are seen by a hook of the process: each thread heeds its own calls alone."""

    def work(thread):
        cell, x = Cell(), inputs(thread)
        solution = deqcore.fixed_point(cell, torch.zeros_like(x), x, batch="coupled")
        return solution.value.detach(), *(b.clone() for b in cell.buffers())

    check(work)
    assert not torch.nn.modules.module._global_forward_pre_hooks


def test_kernels_with_threads_of_their_own_under_several_python_threads():
    """A state so large that each step is shared by OpenMP's threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        shift = torch.rand(2, 70_000, generator=generator(5))

        def work(thread):
            x = shift + thread
            with torch.no_grad():
                return (deqcore.fixed_point(lambda z: 0.5 * torch.cos(z) + x, x).value,)

        check(work)
    finally:
        torch.set_num_threads(before)


def test_an_error_in_one_thread_leaves_the_others_alone():
    cell = Cell().eval()

    def work(thread):
        x = inputs(thread)
        if thread == 2:

            def broken(z, x):
                raise MemoryError

            with pytest.raises(MemoryError):
                deqcore.fixed_point(broken, torch.zeros_like(x), x)
            return (x,)
        return (deqcore.fixed_point(cell, torch.zeros_like(x), x).value.detach(),)

    check(work)


FORK = """
import os, signal, sys, warnings, torch, deqcore
parent = os.getpid()
torch.set_num_threads(2)
pattern = deqcore.SparsityPattern.from_scores(
    torch.rand(512, 512, generator=torch.Generator().manual_seed(1)), 0.9)
linear = deqcore.MaskedLinear(pattern, bias=False)
with torch.no_grad():
    linear.values.copy_(torch.linspace(-0.1, 0.1, pattern.kept))
# Large enough for two threads in the step, in the product and in its gradient. Made here: before
# the first solve, the child's operations of this size are torch's own, and wait.
x, z0 = torch.ones(600, 512, requires_grad=True), torch.zeros(600, 512)

def run():
    x.grad = linear.values.grad = None
    solution = deqcore.fixed_point(lambda z, x: torch.tanh(linear(z) + x), z0, x)
    solution.value.square().mean().backward()
    return solution.value.detach(), x.grad.clone(), linear.values.grad.clone()

def check():
    if os.getpid() != parent:
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            run()
        assert any("forked" in str(each.message) for each in told), told
    assert all(torch.equal(a, b) for a, b in zip(run(), expected))

expected = run()
"""
OS_FORK = """
children = []
for _ in range(3):
    pid = os.fork()
    if pid == 0:
        signal.alarm(60)  # a child that hangs is ended, and counts as failed
        try:
            check()
        except BaseException as error:
            print(repr(error), file=sys.stderr, flush=True)
            os._exit(1)
        os._exit(0)
    children.append(pid)
print([os.waitpid(pid, 0)[1] for pid in children])
check()
"""
MULTIPROCESSING = """
context = torch.multiprocessing.get_context("fork")
children = [context.Process(target=check) for _ in range(2)]
for child in children: child.start()
for child in children: child.join(60)
print([child.exitcode for child in children])
for child in children: child.kill()
check()
"""


HAS_FORK = pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")


@HAS_FORK
@pytest.mark.parametrize(("code", "expected"), [(OS_FORK, [0] * 3), (MULTIPROCESSING, [0] * 2)])
def test_solves_in_forked_processes_end_with_the_same_bits(code, expected):
    """The parent's threads do not exist in the child: it must start its own, or hang."""
    assert run(FORK + code) == str(expected)


def run(code):
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "2"}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=200, env=environment
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@HAS_FORK
@pytest.mark.parametrize(
    ("threads", "lost", "expected"), [(2, True, 1), (2, False, 2), (1, True, 1)]
)
def test_a_child_keeps_its_threads_where_none_are_lost(threads, lost, expected):
    code = f"""
import os, warnings, torch, deqcore
from deqcore import _forked
torch.set_num_threads({threads})
pid = os.fork()
if pid == 0:
    _forked._is_child_of_threads = {lost}
    deqcore.fixed_point(torch.cos, torch.zeros(2, 3))
    os._exit(10 + torch.get_num_threads())
deqcore.fixed_point(torch.cos, torch.zeros(2, 3))
print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), 10 + torch.get_num_threads())
"""
    assert run(code) == f"{10 + expected} {10 + threads}"
