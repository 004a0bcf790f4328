"""f that fails, and interrupts anywhere in a solve: the error comes out, nothing is left behind."""

from __future__ import annotations

import signal
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from torch import nn

import deqcore
from deqcore import Anderson, Broyden, Implicit, NewtonKrylov, Phantom, Picard, Unrolled
from deqcore.dropout import solving
from tests.support.problems import equal, generator

PACKAGE = str(Path(deqcore.__file__).parent)
ADJOINTS = {
    "implicit": Implicit(),
    "implicit, fallback": Implicit(on_failure="fallback", solver=Picard(max_steps=2)),
    "phantom": Phantom(steps=3),
    "unrolled": Unrolled(),
    "unrolled, checkpointed": Unrolled(checkpoint_every=2),
}
ERRORS = {
    "an error": ValueError("half-way"),
    "an interrupt": KeyboardInterrupt(),
    "memory": MemoryError("half-way"),
    "memory of a GPU": torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
}


class Failing(torch.autograd.Function):
    """x, which raises when told to, in forward or in backward."""

    at: ClassVar[dict[str, int | None]] = {"forward": None, "backward": None}
    error: ClassVar[BaseException | None] = None

    @classmethod
    def count(cls, where):
        left = cls.at[where]
        if left is None:
            return
        cls.at[where] = left - 1
        if left == 1:
            if cls.error is None:  # as Ctrl-C does it
                signal.raise_signal(signal.SIGINT)
            else:
                raise cls.error

    @staticmethod
    def forward(ctx, x):
        Failing.count("forward")
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad):
        Failing.count("backward")
        return grad


class Cell(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(5, 5)
        self.norm = nn.BatchNorm1d(5)
        with torch.no_grad():
            self.linear.weight.copy_(0.1 * torch.randn(5, 5, generator=generator(1)))
            self.linear.bias.zero_()

    def forward(self, z, x):
        return 0.5 * torch.tanh(self.norm(self.linear(Failing.apply(z)) + x))


@pytest.fixture(autouse=True)
def _never():
    yield
    Failing.at = {"forward": None, "backward": None}


def ambient():
    """What of the process a solve could leave in another state."""
    hooks = torch.nn.modules.module
    return (
        torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(),
        len(hooks._global_forward_pre_hooks),
        len(hooks._global_forward_hooks),
        torch._C._autograd._top_saved_tensors_default_hooks(True),
        torch.is_autocast_enabled("cpu"),
        solving.masks,
        torch.get_rng_state().tolist(),  # the last
    )


def solve(cell, batch, adjoint, solver=Anderson(max_steps=30)):
    """Value and gradients of one step of training."""
    x = torch.randn(6, 5, generator=generator(2)).requires_grad_()
    cell.zero_grad()
    options = {"solver": solver, "adjoint": adjoint, "batch": batch}
    solution = deqcore.fixed_point(cell, torch.zeros(6, 5), x, **options)
    solution.value.square().sum().backward()
    return [solution.value.detach(), x.grad, *(p.grad for p in cell.parameters())]


def same(a, b):
    return all(equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("error", ERRORS)
@pytest.mark.parametrize("adjoint", ADJOINTS)
@pytest.mark.parametrize(("where", "at"), [("forward", 1), ("forward", 3), ("backward", 1)])
def test_what_f_raises_comes_out_and_the_next_solve_is_right(adjoint, where, at, error):
    cell = Cell().eval()
    expected = solve(cell, "rows", ADJOINTS[adjoint])
    before = ambient()
    Failing.at[where], Failing.error = at, ERRORS[error]
    with pytest.raises(type(ERRORS[error])) as raised:
        solve(cell, "rows", ADJOINTS[adjoint])
    assert raised.value is ERRORS[error] or str(raised.value) == str(ERRORS[error])
    assert ambient() == before
    assert same(solve(cell, "rows", ADJOINTS[adjoint]), expected)


@pytest.fixture
def interrupts() -> Iterator[None]:
    """Python's own handler: a shell starts what runs in the background with the signal ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("interrupts")
@pytest.mark.parametrize("where", ["forward", "backward"])
@pytest.mark.parametrize("solver", [Picard(), Anderson(), Broyden(), NewtonKrylov()])
def test_a_signal_within_f_is_an_interrupt(solver, where):
    cell = Cell().eval()
    expected = solve(cell, "rows", Implicit(solver=solver), solver)
    before = ambient()
    Failing.at[where], Failing.error = 2, None
    with pytest.raises(KeyboardInterrupt):
        solve(cell, "rows", Implicit(solver=solver), solver)
    assert ambient() == before
    assert same(solve(cell, "rows", Implicit(solver=solver), solver), expected)


@pytest.mark.parametrize("at", [1, 4, "last"])
def test_running_statistics_are_what_they_were_before_a_solve_that_fails(at):
    cell = Cell()
    buffers = {name: value.clone() for name, value in cell.named_buffers()}
    if at == "last":  # the evaluation at the solution, which alone updates them
        counting = Cell()
        Failing.at["forward"], Failing.error = 1000, None
        solve(counting, "coupled", Implicit())
        at = 1000 - Failing.at["forward"]
    Failing.at["forward"], Failing.error = at, MemoryError()
    with pytest.raises(MemoryError):
        solve(cell, "coupled", Implicit())
    for name, value in cell.named_buffers():
        assert equal(value, buffers[name]), name
    fresh = Cell()
    assert same(solve(cell, "coupled", Implicit()), solve(fresh, "coupled", Implicit()))
    assert same(cell.buffers(), fresh.buffers())


def test_a_layer_works_on_after_an_error():
    layer = deqcore.ImplicitLayer(Cell().eval())
    x = torch.ones(2, 5)
    expected, report = layer(x), layer.report
    Failing.at["forward"], Failing.error = 2, MemoryError()
    with pytest.raises(MemoryError):
        layer(x)
    assert layer.report is report, "that of the last solve that came to an end"
    assert equal(layer(x), expected)


def test_a_backward_that_failed_may_be_repeated():
    cell, x = Cell().eval(), torch.ones(2, 5, requires_grad=True)
    value = deqcore.fixed_point(cell, torch.zeros(2, 5), x).value
    (expected,) = torch.autograd.grad(value.sum(), x, retain_graph=True)
    Failing.at["backward"], Failing.error = 3, MemoryError()
    with pytest.raises(MemoryError):
        torch.autograd.grad(value.sum(), x, retain_graph=True)
    (again,) = torch.autograd.grad(value.sum(), x)
    assert equal(again, expected)


class Interrupt:
    """Raises KeyboardInterrupt at one of the places where Python looks for signals.

    That is before a function of the package runs, and after a call of C from it has returned.
    """

    def __init__(self, at: int) -> None:
        self.at, self.seen, self.place = at, 0, ""

    def __call__(self, frame, event, arg):
        if event in ("call", "c_return") and frame.f_code.co_filename.startswith(PACKAGE):
            self.seen += 1
            if self.seen == self.at:
                self.place = f"{frame.f_code.co_filename}:{frame.f_lineno} {event} {arg}"
                raise KeyboardInterrupt

    def __enter__(self):
        sys.setprofile(self)
        return self

    def __exit__(self, *args):
        sys.setprofile(None)


# Of a generator that is being closed, Python only tells.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("batch", ["rows", "coupled"])
def test_interrupts_at_any_place_leave_nothing_behind(batch):
    options = (batch, Implicit(solver=Picard(max_steps=2)), Anderson(max_steps=2))

    def new():
        return Cell().train(batch == "coupled")  # by rows, every evaluation updates statistics

    first, last = list(new().buffers()), new()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", deqcore.ConvergenceWarning)
        expected = solve(last, *options)
    with Interrupt(0) as counting:
        solve(new(), *options)
    assert counting.seen > 100
    broken = []
    for at in range(1, counting.seen + 1):
        cell, before = new(), ambient()
        interrupt = Interrupt(at)
        try:
            with interrupt:
                solve(cell, *options)
        except KeyboardInterrupt:
            pass
        kept = same(cell.buffers(), first) or same(cell.buffers(), last.buffers())
        if ambient()[:-1] != before[:-1] or not kept or not same(solve(new(), *options), expected):
            broken.append(interrupt.place)
    assert not broken, "\n".join(broken)
