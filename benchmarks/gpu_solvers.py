"""G1 to G6: the solver kernels on a GPU against torchdeq and lean PyTorch solvers."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

import deqcore
from benchmarks.gpu_bench import Bench, on_trial
from benchmarks.harness import Result
from benchmarks.peers import LeanAnderson, torchdeq_anderson, torchdeq_broyden
from benchmarks.problems import agree, contraction, free_function
from deqcore.ops import _rows
from deqcore.ops import anderson_step as op
from deqcore.ops._rows import ACTIVE, Rows

MEMORY = 5
STEPS = 30
NEVER = 10**6
COPY_ELEMENTS = 1 << 28


def our_steps(bench: Bench, batch: int, dim: int, count: int) -> Callable[[], None]:
    """`count` calls of the op with a full history, in place, as the loop makes them."""
    f = free_function(batch, dim, bench.device)
    x = torch.randn(batch, dim, device=bench.device)
    solver = deqcore.Anderson(memory=MEMORY, max_steps=NEVER, patience=NEVER, rtol=0.0, atol=0.0)
    state = solver.with_all_room(solver.new_state(x, Rows.start(batch, x.device)))
    context = solver.context(x, x.dtype, ())

    def run(times: int = count) -> None:
        for _ in range(times):
            op.anderson_step(x, f(x), context.damping, state, x, context.nothing, context.options)

    run(MEMORY + 1)
    if (state.rows.status != ACTIVE).any():
        raise RuntimeError("the benchmark's rows have ended: it would time a copy")
    return run


def lean_steps(bench: Bench, batch: int, dim: int, count: int) -> Callable[[], None]:
    f = free_function(batch, dim, bench.device)
    x = torch.randn(batch, dim, device=bench.device)
    state = LeanAnderson(x, MEMORY)

    def run() -> None:
        for _ in range(count):
            state.step(x, f(x))

    return run


def check_answers(bench: Bench) -> None:
    batch, dim = bench.shape(16, 4096)
    f, z0 = contraction(batch, dim, bench.device), torch.zeros(batch, dim, device=bench.device)
    ours = deqcore.fixed_point(f, z0, solver=deqcore.Anderson(rtol=1e-5, atol=0.0)).value
    agree(ours, torchdeq_anderson(f, z0, 60, MEMORY), f, 1e-3)
    ours = deqcore.fixed_point(f, z0, solver=deqcore.Broyden(rtol=1e-5, atol=0.0)).value
    agree(ours, torchdeq_broyden(f, z0, 60), f, 1e-3)


def bench_bandwidth(bench: Bench) -> None:
    """G1: bytes of the formula over time, against a large copy measured beside it."""
    batch, dim = bench.shape(32, 151296)
    step, moved = our_steps(bench, batch, dim, 1), 4 * batch * dim * (2 * MEMORY + 4)
    compare_with_copy(bench, f"G1 Anderson step {batch}x{dim}", step, moved, 0.88)
    compare_with_copy(bench, f"G1 Anderson step {batch}x{dim} (trial)", on_trial(step), moved, 0.88)


def compare_with_copy(
    bench: Bench, work: str, step: Callable[[], object], moved: int, gate: float
) -> None:
    """The share of the copy bandwidth that a step reaches which has `moved` bytes to move."""
    size = COPY_ELEMENTS if bench.real else 1 << 16
    source = torch.ones(size, device=bench.device)
    target = torch.empty_like(source)
    taken = bench.times({"step": step, "copy": lambda: target.copy_(source)})
    copied = 8 * size
    shares = sorted(
        (moved / s) / (copied / c) for s, c in zip(taken["step"], taken["copy"], strict=True)
    )
    cut = len(shares) // 10
    bench.report.facts["copy bandwidth, GB/s"] = copied / statistics.median(taken["copy"]) / 1e9
    bench.report.add(
        Result(
            work, "copy bandwidth", statistics.median(shares),
            shares[cut], shares[-1 - cut], statistics.median(taken["step"]) * 1e6,
            statistics.median(taken["copy"]) * moved / copied * 1e6, "us",
            gate if bench.real else None,
        )
    )  # fmt: skip


def bench_anderson(bench: Bench) -> None:
    """G2 and G3: thirty steps against torchdeq, and against lean eager in a graph."""
    for (batch, dim), gate, graph in (
        ((32, 151296), 16.0, False),
        ((256, 4096), 45.0, False),
        ((4096, 256), 38.0, False),
        ((1, 65536), 110.0, True),
    ):
        batch, dim = bench.shape(batch, dim)
        f = free_function(batch, dim, bench.device)
        z0 = torch.zeros(batch, dim, device=bench.device)
        ours = our_steps(bench, batch, dim, STEPS)
        contestants: dict[str, Callable[[], object]] = {
            "deqcore": bench.graphed(ours) if graph else ours,
            "torchdeq": partial(torchdeq_anderson, f, z0, STEPS, MEMORY),
        }
        label = " (graph)" if graph else ""
        name = f"G2 {STEPS} Anderson steps {batch}x{dim}{label}"
        bench.compare(name, contestants, {"torchdeq": gate})
        compare_with_default(bench, name, ours, graph)
    for (batch, dim), gate in (((32, 151296), 3.4), ((256, 4096), 6.0), ((1, 65536), 6.0)):
        batch, dim = bench.shape(batch, dim)
        contestants = {
            "deqcore": bench.graphed(our_steps(bench, batch, dim, MEMORY)),
            "lean eager, graph": bench.graphed(lean_steps(bench, batch, dim, MEMORY)),
        }
        name = f"G3 {MEMORY} Anderson steps {batch}x{dim} (graph)"
        bench.compare(name, contestants, {"lean eager, graph": gate})


def compare_with_default(
    bench: Bench, name: str, run: Callable[[], object], graph: bool = False
) -> None:
    """The paths on trial against those that are taken by default."""
    trial = on_trial(run)
    contestants = {"trial": trial, "default": run}
    if graph:
        contestants = {"trial": bench.graphed(trial), "default": bench.graphed(run)}
    bench.compare(f"{name} (trial)", contestants, {})


def bench_capture(bench: Bench) -> None:
    """G4: a whole solve in one graph, beside the eager one; the bits are compared first."""
    batch, dim = bench.shape(16, 4096)
    f, z0 = contraction(batch, dim, bench.device), torch.zeros(batch, dim, device=bench.device)
    solver = deqcore.Anderson(rtol=1e-5, atol=0.0)

    def eager() -> Tensor:
        return deqcore.fixed_point(f, z0, solver=solver).value

    if not bench.real:
        bench.report.facts["G4"] = "needs a GPU: there is nothing to capture here"
        return
    captured = deqcore.capture(f, z0, solver=solver)
    equal = torch.equal(captured(z0).value, eager())
    waits = _waits(lambda: deqcore.fixed_point(f, z0, solver=replace(solver, check_every=0)))
    met = equal and captured.exits_early and not waits
    bench.report.facts["G4"] = {
        "the captured solve has the eager one's bits": equal,
        "it exits early on the device": captured.exits_early,
        "what makes a fixed-step solve wait": waits or "nothing",
        "verdict": "met" if met else "MISSED",
    }
    print(f"G4 {bench.report.facts['G4']}", flush=True)
    bench.compare(
        f"G4 captured solve {batch}x{dim}",
        {"captured": lambda: captured(z0).value, "eager": eager},
        {},
    )


def _waits(solve: Callable[[], object]) -> str:
    """What torch says about the host waiting for the GPU; nothing if it never does."""
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        solve()
    except RuntimeError as error:
        return str(error).splitlines()[0]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return ""


def bench_broyden(bench: Bench) -> None:
    """G5: a solve of thirty steps, all of them stored."""
    for (batch, dim), gate in (((8, 151296), 3.0), ((16, 4096), 15.0), ((1, 4096), 15.0)):
        batch, dim = bench.shape(batch, dim)
        f = contraction(batch, dim, bench.device)
        z0 = torch.zeros(batch, dim, device=bench.device)
        solver = deqcore.Broyden(
            memory=30, max_steps=STEPS, check_every=0, rtol=0.0, atol=0.0, patience=NEVER
        )
        contestants: dict[str, Callable[[], object]] = {
            "deqcore": partial(deqcore.fixed_point, f, z0, solver=solver),
            "torchdeq": partial(torchdeq_broyden, f, z0, STEPS),
        }
        name = f"G5 {STEPS} Broyden steps {batch}x{dim}"
        bench.compare(name, contestants, {"torchdeq": gate})
        compare_with_default(bench, name, contestants["deqcore"])
    bench_narrow_history(bench)


def bench_narrow_history(bench: Bench) -> None:
    """G5: one Broyden step over thirty stored ones: its bandwidth, and bfloat16 against float32."""
    batch, dim = bench.shape(32, 151296)
    wide = broyden_step(bench, batch, dim, 30, None)
    name = f"G5 Broyden step k=30 {batch}x{dim}"
    moved = 4 * batch * dim * (2 * 30 + 12)
    compare_with_copy(bench, name, wide, moved, 0.85)
    compare_with_copy(bench, f"{name} (trial)", on_trial(wide), moved, 0.85)
    narrow = broyden_step(bench, batch, dim, 30, torch.bfloat16)
    name = f"G5 Broyden step k=30 {batch}x{dim}, bf16 history"
    for suffix, path in (("", lambda run: run), (" (trial)", on_trial)):
        contestants = {"bf16 history": path(narrow), "float32 history": path(wide)}
        bench.compare(name + suffix, contestants, {"float32 history": 1.6})


def broyden_step(
    bench: Bench, batch: int, dim: int, stored: int, history_dtype: torch.dtype | None
) -> Callable[[], None]:
    """The op with `stored` steps in the history, again and again."""
    f, x = torch.randn(2, batch, dim, device=bench.device)
    solver = deqcore.Broyden(
        memory=stored + 1, max_steps=NEVER, patience=NEVER, rtol=0.0, atol=0.0,
        history_dtype=history_dtype,
    )  # fmt: skip
    state = solver.with_all_room(solver.new_state(x, Rows.start(batch, x.device)))
    state.s_ring.copy_(torch.randn(stored + 1, dim, device=bench.device))
    state.gram.copy_(torch.eye(stored + 1) * dim)
    at_start = state.rows.counters.clone()
    at_start[:, _rows.HISTORY], at_start[:, _rows.STEPS] = stored, stored + 1
    at_start[:, _rows.BEST_STEP] = 1
    context = solver.context(x, x.dtype, ())
    x_next = torch.empty_like(x)

    def step() -> None:
        state.rows.counters.copy_(at_start)
        solver.advance(state, x, f, context, x_next, context.nothing)

    step()
    if (state.rows.counters[:, _rows.MIXED] != stored).any():
        raise RuntimeError("a row of the benchmark has ended or restarted: it would read less")
    return step


def bench_accuracy(bench: Bench) -> None:
    """G6: iterations against float64 down to 1e-5, and how far float32 gets."""
    batch, dim = bench.shape(16, 4096)
    f = contraction(batch, dim, bench.device)
    z0 = torch.zeros(batch, dim, device=bench.device)
    solver = deqcore.Anderson(rtol=1e-5, atol=0.0, max_steps=100)
    narrow = deqcore.fixed_point(f, z0, solver=solver)
    wide = deqcore.fixed_point(lambda z: f(z), z0.double(), solver=solver)
    extra = int((narrow.steps - wide.steps).abs().max())
    floor = deqcore.fixed_point(f, z0, solver=deqcore.Anderson(rtol=0.0, atol=0.0, max_steps=100))
    relative = (floor.residual / f(floor.value).square().mean(1).sqrt()).max().item()
    bench.report.facts["G6"] = {
        "iterations more or less than float64, at 1e-5": extra,
        "floor of the relative residual": relative,
        "verdict": ("met" if extra <= 1 and relative <= 2e-7 else "MISSED") if bench.real else "-",
    }
    print(f"G6 {bench.report.facts['G6']}", flush=True)
