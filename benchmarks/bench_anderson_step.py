"""The Anderson step, the whole solve, and its memory."""

from __future__ import annotations

from collections.abc import Callable

import torch

import deqcore
from benchmarks.harness import (
    Report,
    Result,
    compare,
    copy_bandwidth,
    peak_bytes,
    share_of_bandwidth,
)
from benchmarks.peers import LeanAnderson, lean_step, torchdeq_anderson
from benchmarks.problems import agree, contraction, free_function
from deqcore.ops import anderson_step as op
from deqcore.ops._rows import ACTIVE, Rows

MEMORY = 5
STEPS = 30
# None: rows that fit no cache, where all contestants wait for memory. There the gate is a share of
# the copy bandwidth.
STEP_GATES = {
    (1, 4096): 25.0,
    (16, 4096): 6.0,
    (256, 1024): 6.0,
    (256, 4096): None,
    (32, 151296): None,
}
BANDWIDTH_GATE = 0.8
SOLVE_GATES = {(1, 4096): 15.0, (16, 4096): 6.0, (256, 1024): 5.0, (32, 151296): 6.0}
NEVER = 10**6


def run(report: Report) -> None:
    check_answers()
    bandwidth = copy_bandwidth()
    report.facts["copy bandwidth, GB/s, one thread"] = round(bandwidth, 1)
    small = [(1, 4096), (16, 4096)]
    for shape in small if report.short else STEP_GATES:
        bench_step(report, *shape, STEP_GATES[shape], bandwidth)
    for shape in small if report.short else SOLVE_GATES:
        bench_solve(report, *shape, SOLVE_GATES[shape])
    bench_memory(report)


def check_answers() -> None:
    f, z0 = contraction(16, 4096), torch.zeros(16, 4096)
    ours = deqcore.fixed_point(f, z0, solver=deqcore.Anderson(rtol=1e-5, atol=0.0)).value
    agree(ours, torchdeq_anderson(f, z0, 60, MEMORY), f, 1e-3)


def our_step(batch: int, dim: int) -> Callable[[], object]:
    """A call of the op with a full history, as the loop makes it."""
    f = free_function(batch, dim)
    x = torch.randn(batch, dim)
    solver = deqcore.Anderson(memory=MEMORY, max_steps=NEVER, patience=NEVER, rtol=0.0, atol=0.0)
    state = solver.new_state(x, Rows.start(batch, x.device))
    state = state._replace(best=torch.empty_like(x))
    context = solver.context(x, x.dtype, ())
    x_next, z_next = torch.empty_like(x), x.new_empty(0)

    def step() -> None:
        op.anderson_step(x, f(x), context.damping, state, x_next, z_next, context.options)

    for _ in range(MEMORY + 1):
        step()
    if (state.rows.status != ACTIVE).any():
        raise RuntimeError("the benchmark's rows have ended: it would time a copy")
    return step


def torchdeq_step(batch: int, dim: int) -> Callable[[], object]:
    """STEPS steps of a solve; its set-up is a small part and is left in."""
    f, z0 = free_function(batch, dim), torch.zeros(batch, dim)
    return lambda: torchdeq_anderson(f, z0, STEPS, MEMORY)


def lean(batch: int, dim: int, compiled: bool) -> Callable[[], object]:
    f, x = free_function(batch, dim), torch.randn(batch, dim)
    state = LeanAnderson(x, MEMORY)
    if not compiled:
        return lambda: state.step(x, f(x))
    fused = torch.compile(lean_step, fullgraph=True, dynamic=False)
    return lambda: fused(
        x, f(x), next(state.slots), state.g_ring, state.h_ring, state.gram, state.ones, state.ridge
    )


def bench_step(report: Report, batch: int, dim: int, gate: float | None, bandwidth: float) -> None:
    one = our_step(batch, dim)

    def thirty() -> None:
        for _ in range(STEPS):
            one()

    name = f"Anderson step m={MEMORY} {batch}x{dim}"
    moved = (2 * MEMORY + 4) * 4 * batch * dim
    if gate is None:
        report.add(share_of_bandwidth(name, one, moved, BANDWIDTH_GATE))
    (against,) = compare(
        name,
        {"deqcore": thirty, "torchdeq": torchdeq_step(batch, dim)},
        {} if gate is None else {"torchdeq": gate},
    )
    against.ours /= STEPS
    against.peer /= STEPS
    against.note = f"{moved / 1e3 / bandwidth / against.ours:4.0%} of copy bandwidth"
    report.add(against)
    contestants = {
        "deqcore": one,
        "lean eager": lean(batch, dim, compiled=False),
    }
    if not report.short:  # it takes a minute to compile
        contestants["lean torch.compile"] = lean(batch, dim, compiled=True)
    gates = {} if gate is None else {"lean eager": 4.0, "lean torch.compile": 1.5}
    for result in compare(name, contestants, gates):
        report.add(result)


def bench_solve(report: Report, batch: int, dim: int, gate: float) -> None:
    f, z0 = free_function(batch, dim), torch.zeros(batch, dim)
    solver = deqcore.Anderson(
        memory=MEMORY, max_steps=STEPS, check_every=0, rtol=0.0, atol=0.0, patience=NEVER
    )
    contestants = {
        "deqcore": lambda: deqcore.fixed_point(f, z0, solver=solver),
        "torchdeq": lambda: torchdeq_anderson(f, z0, STEPS, MEMORY),
    }
    with torch.no_grad():
        results = compare(
            f"Anderson solve, {STEPS} steps, {batch}x{dim}",
            contestants,
            {"torchdeq": gate},
            less=lambda: [f(z0) for _ in range(STEPS)],
        )
    for result in results:
        report.add(result)


def bench_memory(report: Report) -> None:
    """Peak of live tensors, ours with m=5 against torchdeq's default m=6."""
    batch, dim = 8, 65536
    f, z0 = contraction(batch, dim), torch.zeros(batch, dim)
    solver = deqcore.Anderson(memory=MEMORY, max_steps=STEPS, rtol=0.0, atol=0.0)
    with torch.no_grad():
        ours = peak_bytes(lambda: deqcore.fixed_point(f, z0, solver=solver))
        peer = peak_bytes(lambda: torchdeq_anderson(f, z0, STEPS, 6))
    state = z0.numel() * z0.element_size()
    ratio = peer / ours
    report.add(
        Result(
            "Anderson solve memory, m=5", "torchdeq m=6", ratio, ratio, ratio,
            ours / state, peer / state, "states", gate=2.0,
        )
    )  # fmt: skip
