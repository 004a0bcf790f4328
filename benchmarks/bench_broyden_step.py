"""The Broyden step at several history lengths, the whole solve, and its memory."""

from __future__ import annotations

from collections.abc import Callable

import torch

import deqcore
from benchmarks.harness import Report, Result, compare, peak_bytes, share_of_bandwidth
from benchmarks.peers import torchdeq_broyden
from benchmarks.problems import agree, contraction, free_function
from deqcore.ops import broyden_step as op
from deqcore.ops._library import pack_numbers
from deqcore.ops._rows import ACTIVE, BEST_STEP, HISTORY, STEPS, Limits, Rows
from deqcore.ops.broyden_step import BroydenNumbers, BroydenState

SHAPES = ((1, 4096), (16, 4096), (8, 151296))
GATE = 8.0
BY_MEMORY = (8, 151296)  # rows that fit no cache: the gate is a share of the copy bandwidth
BANDWIDTH_GATE = 0.75
NEVER = 10**6
SOLVE_STEPS = 30


def run(report: Report) -> None:
    check_answers()
    for shape in SHAPES[:1] if report.short else SHAPES:
        for stored in (10,) if report.short else (10, 20, 30):
            bench_step(report, *shape, stored)
        bench_solve(report, *shape)
    bench_memory(report)


def check_answers() -> None:
    f, z0 = contraction(16, 4096), torch.zeros(16, 4096)
    ours = deqcore.fixed_point(f, z0, solver=deqcore.Broyden(rtol=1e-5, atol=0.0)).value
    agree(ours, torchdeq_broyden(f, z0, 40), f, 1e-3)


def our_step(batch: int, dim: int, stored: int) -> Callable[[], object]:
    """One op with `stored` steps in the history, again and again."""
    generator = torch.Generator().manual_seed(2)  # not that of f: a residual of 0 ends the row
    f = free_function(batch, dim)
    x = torch.randn(batch, dim, generator=generator)
    rows = Rows.start(batch, x.device)
    s_ring = torch.randn(batch, stored + 1, dim, generator=generator)
    gram = torch.zeros(batch, stored + 1, stored + 1, dtype=torch.float64)
    gram += torch.eye(stored + 1, dtype=torch.float64) * dim
    state = BroydenState(s_ring, gram, torch.empty_like(x), rows)
    damping = torch.ones(1, dtype=torch.float64)
    x_next, z_next = torch.empty_like(x), x.new_empty(0)
    limits = Limits(rtol=0.0, atol=0.0, patience=NEVER, max_steps=NEVER)
    options = pack_numbers(BroydenNumbers(limits, memory=stored + 1))
    at_start = rows.counters.clone()
    at_start[:, HISTORY], at_start[:, STEPS], at_start[:, BEST_STEP] = stored, stored + 1, 1

    def step() -> None:
        rows.counters.copy_(at_start)
        op.broyden_step(x, f(x), damping, state, x_next, z_next, options)

    step()
    if (rows.status != ACTIVE).any():
        raise RuntimeError("the benchmark's rows have ended: it would time a copy")
    return step


def torchdeq_step(batch: int, dim: int, stored: int) -> Callable[[], object]:
    """The part of torchdeq's loop that belongs to one step, with `stored` pairs in its history."""
    from torchdeq.solver import broyden as peer
    from torchdeq.solver.utils import init_solver_info, update_state

    f, x0 = free_function(batch, dim), torch.randn(batch, dim)
    us, vts = torch.randn(batch, dim, stored + 1) / dim, torch.randn(batch, stored + 1, dim) / dim
    update, gx = torch.randn(batch, dim), torch.randn(batch, dim)
    info = init_solver_info(batch, x0.device)
    lowest = [x0]

    def g(y: torch.Tensor) -> torch.Tensor:
        return f(y.view_as(x0)).reshape_as(y) - y

    def step() -> None:
        x, g_new, dx, dg, _ = peer.line_search(update, x0, gx, g, on=False)
        absolute = g_new.norm(dim=1)
        relative = absolute / ((g_new + x).norm(dim=1) + 1e-9)
        lowest[0] = update_state(
            lowest[0], x.view_as(x0), 1, "abs", absolute, relative, *info, False
        )
        _ = info[0]["abs"][-1].max() < -1.0
        del info[0]["abs"][1:], info[0]["rel"][1:]
        part_u, part_v = us[:, :, :stored], vts[:, :stored]
        vt = peer.rmatvec(part_u, part_v, dx)
        u = dx - peer.matvec(part_u, part_v, dg)
        u = u / torch.einsum("bd,bd->b", vt, dg)[:, None]
        vt[vt != vt] = 0
        u[u != u] = 0
        vts[:, stored] = vt / dim
        us[:, :, stored] = u / dim
        peer.matvec(us[:, :, : stored + 1], vts[:, : stored + 1], g_new)

    return step


def bench_step(report: Report, batch: int, dim: int, stored: int) -> None:
    contestants = {
        "deqcore": our_step(batch, dim, stored),
        "torchdeq": torchdeq_step(batch, dim, stored),
    }
    name = f"Broyden step k={stored} {batch}x{dim}"
    gates = {"torchdeq": GATE}
    if (batch, dim) == BY_MEMORY:
        moved = (2 * stored + 12) * 4 * batch * dim
        report.add(share_of_bandwidth(name, contestants["deqcore"], moved, BANDWIDTH_GATE))
        gates = {}
    for result in compare(name, contestants, gates):
        report.add(result)


def bench_solve(report: Report, batch: int, dim: int) -> None:
    f, z0 = free_function(batch, dim), torch.zeros(batch, dim)
    solver = deqcore.Broyden(
        memory=SOLVE_STEPS, max_steps=SOLVE_STEPS, check_every=0, rtol=0.0, atol=0.0, patience=NEVER
    )
    contestants = {
        "deqcore": lambda: deqcore.fixed_point(f, z0, solver=solver),
        "torchdeq": lambda: torchdeq_broyden(f, z0, SOLVE_STEPS),
    }
    with torch.no_grad():
        results = compare(
            f"Broyden solve, {SOLVE_STEPS} steps, {batch}x{dim}",
            contestants,
            {"torchdeq": GATE},
            rounds=5,
            less=lambda: [f(z0) for _ in range(SOLVE_STEPS)],
        )
    for result in results:
        report.add(result)


def bench_memory(report: Report) -> None:
    """Peak of live tensors over 40 steps, ours with L=10 against torchdeq's default."""
    batch, dim = 8, 65536
    f, z0 = contraction(batch, dim), torch.zeros(batch, dim)
    solver = deqcore.Broyden(memory=10, max_steps=40, rtol=0.0, atol=0.0, patience=40)
    with torch.no_grad():
        ours = peak_bytes(lambda: deqcore.fixed_point(f, z0, solver=solver))
        peer = peak_bytes(lambda: torchdeq_broyden(f, z0, 40))
    state = z0.numel() * z0.element_size()
    ratio = peer / ours
    report.add(
        Result(
            "Broyden solve memory, L=10", "torchdeq, 40 steps", ratio, ratio, ratio,
            ours / state, peer / state, "states", gate=3.0,
        )
    )  # fmt: skip
