"""``deqcore.capture``: on a GPU against eager solves; its parts, joined on the host, anywhere."""

from __future__ import annotations

import contextlib
import dataclasses
import sys
import types

import pytest
import torch

import deqcore
from deqcore import Anderson, Broyden, Implicit, Phantom, Picard, _graphs, _kernels
from deqcore._graphs import CudaGraphs, Parts
from deqcore.capture import _capture
from examples.own_solver import Aitken
from tests.support.problems import equal, wave, wave_batch

SOLVERS = [
    Picard(damping=0.7, max_steps=40),
    Anderson(memory=3, max_steps=40),
    Anderson(max_steps=3),
    Broyden(memory=5, max_steps=40),
    Broyden(memory=30, max_steps=9, damping=0.8),
    Aitken(max_steps=40),
]
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
PARTS = ("status", "steps", "residual")  # of a report


@dataclasses.dataclass
class OnTheHost:
    """Stands in for CUDA graphs: runs the same parts in the same order, and decides here."""

    exits_early: bool = True
    replays_alone: bool = False  # it calls the parts again

    def check(self, device):
        pass

    def set_up(self):
        return contextlib.nullcontext()

    def warm_up(self, run):
        run()

    def record(self, parts):
        def launch():
            parts.first()
            for _ in range(parts.max_steps):
                if self.exits_early and not parts.remaining.item():
                    break
                parts.body()
            if parts.last is not None:
                parts.last()

        return launch


@pytest.fixture(params=["host", "graph"])
def capture(request):
    """``deqcore.capture`` on a GPU, and its stand-in on the CPU, with the device to use."""
    if request.param == "graph":
        device = request.getfixturevalue("cuda_device")
        return deqcore.capture, device

    def on_the_host(f, z0, *args, solver, adjoint=Implicit(), recorder=None):
        return _capture(f, z0, args, solver, adjoint, recorder or OnTheHost())

    return on_the_host, torch.device("cpu")


def batches(dtype, device, n=3):
    return [tuple(t.to(device) for t in wave_batch(6, 33, seed, dtype)) for seed in range(n)]


def check_same(captured: deqcore.Solution, eager: deqcore.Solution) -> None:
    assert equal(captured.value, eager.value)
    for name in PARTS:
        assert equal(getattr(captured, name), getattr(eager, name)), name


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_solution_keeps_what_it_reports_when_the_solver_is_called_again(capture, dtype):
    make, device = capture
    first, second, _ = batches(dtype, device)
    solve = make(wave, *first, solver=Anderson(max_steps=3))
    solution = solve(*first)
    kept = {name: getattr(solution, name).clone() for name in ("value", *PARTS)}
    solve(*second)
    for name, before in kept.items():
        assert equal(getattr(solution, name), before), name


@pytest.mark.parametrize("solver", SOLVERS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_replays_have_the_bits_of_eager_solves(capture, solver, dtype):
    make, device = capture
    inputs = batches(dtype, device)
    with torch.no_grad():
        solve = make(wave, *inputs[0], solver=solver)
        for batch in inputs:
            captured = solve(*batch)
            check_same(captured, deqcore.fixed_point(wave, *batch, solver=solver))
            if solve.exits_early:
                assert captured.evaluations == captured.steps.max()


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_replays_with_a_bfloat16_history_have_the_bits_of_eager_solves(capture, dtype):
    make, device = capture
    solver = Broyden(memory=9, max_steps=40, history_dtype=torch.bfloat16)
    inputs = batches(dtype, device)
    with torch.no_grad():
        solve = make(wave, *inputs[0], solver=solver)
        for batch in inputs:
            check_same(solve(*batch), deqcore.fixed_point(wave, *batch, solver=solver))


def test_earlier_solutions_are_not_overwritten(capture):
    make, device = capture
    first, second = batches(torch.float32, device, 2)
    with torch.no_grad():
        solve = make(wave, *first, solver=Anderson())
        kept = solve(*first)
        copy = kept.value.clone(), kept.status.clone(), kept.steps.clone()
        solve(*second)
    assert equal(kept.value, copy[0])
    assert equal(kept.status, copy[1])
    assert equal(kept.steps, copy[2])


@pytest.mark.parametrize("adjoint", [Implicit(), Implicit(solver=Broyden())], ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_gradients_have_the_bits_of_eager_ones(capture, adjoint, dtype):
    make, device = capture
    torch.manual_seed(0)
    weight = torch.rand(33, dtype=dtype).to(device).requires_grad_()

    def f(z, shift, strength):  # a gemm may be another kernel under capture
        return torch.tanh(0.6 * z.roll(1, 1) * weight - 0.3 * z) * strength + shift

    inputs = [(z0, s.requires_grad_(), c) for z0, s, c in batches(dtype, device)]
    solve = make(f, *inputs[0], solver=Anderson(), adjoint=adjoint)
    for index, (z0, shift, strength) in enumerate(inputs):
        results = []
        for run in (
            lambda *a: solve(*a),
            lambda *a: deqcore.fixed_point(f, *a, solver=Anderson(), adjoint=adjoint),
        ):
            weight.grad = shift.grad = None
            solution = run(z0, shift, strength)
            factor = torch.linspace(0, index + 1, 6, dtype=dtype, device=device)[:, None]
            (solution.value * factor).pow(2).sum().backward()  # row 0: a zero gradient
            results.append((solution, weight.grad, shift.grad))
        (captured, *captured_grads), (eager, *eager_grads) = results
        check_same(captured, eager)
        assert all(equal(a, b) for a, b in zip(captured_grads, eager_grads, strict=True))
        assert equal(captured.backward.status, eager.backward.status)
        assert equal(captured.backward.steps, eager.backward.steps)
        assert captured.evaluations == captured.steps.max() + 1
        with torch.no_grad():
            weight.mul_(0.9)  # as an optimiser would


def test_a_pytree_of_several_dtypes_is_captured(capture):
    make, device = capture
    inputs = {"a": torch.randn(4, 5, 3), "b": torch.randn(4, 2).half()}
    inputs = {name: t.to(device) for name, t in inputs.items()}

    def f(z, c):
        return {"a": 0.5 * z["a"].cos() + c, "b": 0.3 * z["b"].sin()}

    c = torch.randn(4, 1, 1, device=device)
    with torch.no_grad():
        solve = make(f, inputs, c, solver=Anderson(rtol=1e-3))
        captured = solve(inputs, 2 * c)
        eager = deqcore.fixed_point(f, inputs, 2 * c, solver=Anderson(rtol=1e-3))
    assert all(equal(captured.value[name], eager.value[name]) for name in inputs)
    assert equal(captured.steps, eager.steps)


def test_rows_that_fail_end_alone(capture):
    make, device = capture
    z0, shift, strength = batches(torch.float32, device, 1)[0]
    shift[2, 5] = torch.nan
    with torch.no_grad():
        solve = make(wave, z0, shift, strength, solver=Anderson())
        check_same(
            solve(z0, shift, strength),
            deqcore.fixed_point(wave, z0, shift, strength, solver=Anderson()),
        )


def test_another_call_before_backward_is_refused(capture):
    make, device = capture
    z0, shift, strength = batches(torch.float32, device, 1)[0]
    shift.requires_grad_()
    solve = make(wave, z0, shift, strength, solver=Anderson())
    solution = solve(z0, shift, strength)
    solve(z0, shift, strength)
    with pytest.raises(RuntimeError, match="called again before backward"):
        solution.value.sum().backward()


def test_a_parameter_changed_before_backward_is_refused(capture):
    make, device = capture
    z0, shift, _ = batches(torch.float32, device, 1)[0]
    scale = torch.full((1,), 0.5, device=device, requires_grad=True)
    solve = make(lambda z, b: scale * z.cos() + b, z0, shift, solver=Anderson())
    solution = solve(z0, shift)
    with torch.no_grad():
        scale.mul_(2)
    with pytest.raises(RuntimeError, match="changed in place between forward and backward"):
        solution.value.sum().backward()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda z, s, c: (z[:4], s, c), "z0: expected what was captured"),
        (lambda z, s, c: (z.double(), s, c), "z0: expected what was captured"),
        (lambda z, s, c: (z, s), "args: expected the structure"),
        (lambda z, s, c: (z, s[:4], c), "args: leaf 0"),
        (lambda z, s, c: (z, s, 2.0), "args: leaf 1"),
    ],
)
def test_other_inputs_than_captured_are_named(capture, change, message):
    make, device = capture
    batch = batches(torch.float32, device, 1)[0]
    with torch.no_grad():
        solve = make(wave, *batch, solver=Anderson())
        with pytest.raises(ValueError, match=message):
            solve(*change(*batch))


def test_what_cannot_be_captured_is_refused(capture):
    make, device = capture
    z0, shift, strength = batches(torch.float32, device, 1)[0]
    with pytest.raises(ValueError, match="record_trace"):
        make(wave, z0, shift, strength, solver=Anderson(record_trace=True))
    shift.requires_grad_()
    for adjoint in (Phantom(), Implicit(reuse_forward=True)):
        with pytest.raises(ValueError, match="gradients need adjoint"):
            make(wave, z0, shift, strength, solver=Broyden(), adjoint=adjoint)


class ReplaysAlone(OnTheHost):
    """Notes when f is called, and forgets it as a recorded graph may."""

    def __init__(self):
        super().__init__()
        self.replays_alone = True
        self.inside = False

    @contextlib.contextmanager
    def set_up(self):
        self.inside = True
        yield
        self.inside = False


def test_f_meets_no_stream_but_the_captured_one_and_its_graph_is_dropped():
    """A node of autograd made on another stream, or kept alive there, breaks a capture."""
    z0, shift, _ = batches(torch.float32, torch.device("cpu"), 1)[0]
    weight = torch.rand(33, requires_grad=True)
    recorder, calls = ReplaysAlone(), []

    def f(z, shift):
        assert recorder.inside
        calls.append(z)
        out = torch.exp(-(z * weight).square()) + shift
        edge = torch.autograd.graph.get_gradient_edge(weight).node
        edge.metadata["used"] = True  # lives as long as the node does
        return out

    solve = _capture(f, z0, (shift,), Anderson(), Implicit(), recorder)
    assert len(calls) > 3
    assert solve._backward.inputs == [weight]
    assert not torch.autograd.graph.get_gradient_edge(weight).node.metadata


def test_a_graph_of_fixed_length_gives_the_same_bits():
    """What is recorded where the device cannot decide."""
    inputs = batches(torch.float32, torch.device("cpu"))
    with torch.no_grad():
        solve = _capture(
            wave, inputs[0][0], inputs[0][1:], Anderson(), Implicit(), OnTheHost(False)
        )
        for batch in inputs:
            captured = solve(*batch)
            check_same(captured, deqcore.fixed_point(wave, *batch))
            assert captured.evaluations == Anderson().max_steps


def test_the_cpu_is_refused_with_the_way_out():
    with pytest.raises(ValueError, match=r"expected z0 on a GPU, got cpu.*deqcore\.fixed_point"):
        deqcore.capture(torch.cos, torch.zeros(2, 3))


def test_missing_kernels_are_named(monkeypatch):
    monkeypatch.setattr(_kernels, "CUDA_KERNELS", False)
    monkeypatch.setitem(_kernels.missing, "cuda", "nvcc is not on PATH")
    with pytest.raises(RuntimeError, match="capture: no CUDA kernels: nvcc is not on PATH"):
        CudaGraphs().check(torch.device("cuda"))


class FakeCuda:
    """Streams and graphs of torch.cuda by name, and what was done with them in order."""

    def __init__(self, monkeypatch):
        self.log, self.current, self.made = [], "default", 0
        monkeypatch.setattr(_graphs, "_side_streams", {})
        raw = "_cuda_getCurrentRawStream"
        monkeypatch.setattr(torch._C, raw, lambda index: self.current, raising=False)
        for name in ("Stream", "stream", "current_stream", "graph_pool_handle"):
            monkeypatch.setattr(torch.cuda, name, getattr(self, name))
        monkeypatch.setattr(torch.cuda, "CUDAGraph", self.new_graph)

    def as_stream(self, name):
        wait = lambda other: self.log.append(f"{name} waits for {other.name}")
        return types.SimpleNamespace(name=name, cuda_stream=name, device_index=0, wait_stream=wait)

    def Stream(self):  # noqa: N802  (torch's name)
        return self.as_stream("side")

    def current_stream(self):
        return self.as_stream(self.current)

    @contextlib.contextmanager
    def stream(self, stream):
        before, self.current = self.current, stream.name
        try:
            yield
        finally:
            self.current = before

    def graph_pool_handle(self):
        return "pool"

    def new_graph(self, keep_graph=False):
        self.made += 1
        return FakeGraph(self, self.made if keep_graph else None)


class FakeGraph:
    def __init__(self, cuda, number):
        self.cuda, self.number = cuda, number

    def capture_begin(self, pool=None, capture_error_mode="global"):
        assert capture_error_mode == "thread_local"
        assert self.cuda.current == "side"
        assert pool == ("pool" if self.number else None)

    def capture_end(self):
        if sys.exc_info()[0] is not None:
            raise RuntimeError("capture was invalidated")

    def raw_cuda_graph(self):
        return self.number


@pytest.fixture
def fake_cuda(monkeypatch):
    return FakeCuda(monkeypatch)


@pytest.mark.parametrize("early", [True, False])
def test_a_recorder_joins_its_parts_on_one_stream_and_launches_on_the_current(
    fake_cuda, monkeypatch, early
):
    joined = []

    class SolveGraph:
        def __init__(self, *args):
            joined.append(args)

        def launch(self, stream):
            joined.append(stream)

    monkeypatch.setattr(_graphs, "_solve_graph", lambda: SolveGraph)
    recorder = CudaGraphs(exits_early=early)
    counts = torch.ones(1, dtype=torch.int32), torch.zeros(1, dtype=torch.int32)
    runs = []
    parts = Parts(*(lambda: runs.append(fake_cuda.current),) * 2, None, counts[0], 7, counts[1])
    with recorder.set_up():
        recorder.warm_up(lambda: runs.append(fake_cuda.current))
        launch = recorder.record(parts)
    assert runs == ["side"] * 3
    assert fake_cuda.log == ["side waits for default", "default waits for side"]
    remaining = counts[0].data_ptr() if early else 0
    assert joined == [(1, 2, 0, remaining, counts[1].data_ptr(), 7)]
    launch()
    assert joined[1] == "default"


def test_a_capture_that_fails_tells_the_first_reason_and_leaves_the_stream(fake_cuda, monkeypatch):
    recovered = []
    monkeypatch.setattr(_graphs, "_recover", recovered.append)

    def part():
        raise RuntimeError("operation not permitted when stream is capturing")

    def record():
        recorder = CudaGraphs()
        with recorder.set_up():
            recorder.warm_up(lambda: None)
            recorder.record(Parts(part, part, None, torch.ones(1), 7, torch.ones(1)))

    with pytest.raises(RuntimeError, match=r"cannot be captured.*torch says: operation not perm"):
        record()
    assert fake_cuda.current == "default"
    assert recovered == ["pool"]


@pytest.mark.parametrize("check_every", [0, 1])
def test_on_a_gpu_warnings_are_looked_for_at_first_and_then_now_and_then(monkeypatch, check_every):
    module = sys.modules["deqcore.capture"]
    looks = []
    monkeypatch.setattr(module, "warn_where", lambda flags, messages: looks.append(captured._calls))
    captured = types.SimpleNamespace(_device=torch.device("cuda"), _calls=0)
    solver = Anderson(check_every=check_every)
    solve = types.SimpleNamespace(solver=solver, flags=torch.ones(2, dtype=torch.bool))
    for captured._calls in range(1, 40):
        module.CapturedSolver._tell(captured, solve, ("a", "b"))
    assert looks == ([1, 2, 3, 4, 16, 32] if check_every else [])
    assert solve.flags.any() == (not check_every)


def test_a_fixed_step_solve_never_waits_for_the_gpu(cuda_device):
    batch = batches(torch.float32, cuda_device, 1)[0]
    for solver in (Anderson(check_every=0), Broyden(check_every=0), Picard(damping=lambda _: 0.5)):
        solver = dataclasses.replace(solver, check_every=0, max_steps=20)
        with torch.no_grad(), _syncs_forbidden():
            deqcore.fixed_point(wave, *batch, solver=solver)


@contextlib.contextmanager
def _syncs_forbidden():
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_a_solve_leaves_the_current_device_and_uses_the_current_stream(cuda_device):
    batch = batches(torch.float32, cuda_device, 1)[0]
    expected = deqcore.fixed_point(wave, *batch)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        solution = deqcore.fixed_point(wave, *batch)
        assert torch.cuda.current_stream() == stream
    stream.synchronize()
    check_same(solution, expected)
    if torch.cuda.device_count() > 1:
        other = [t.to("cuda:1") for t in batch]
        there = deqcore.fixed_point(wave, *other)
        assert torch.cuda.current_device() == 0
        assert there.value.device == torch.device("cuda:1")
        assert equal(there.value.cpu(), expected.value.cpu())
