"""`python -m benchmarks.gpu [PART ...] [--out FILE]`: time the CUDA kernels, gate by gate.

Times are medians of CUDA events after a warm-up; contestants take turns. Answers are compared
before anything is timed. `--rehearse` runs every line on the CPU with small shapes, to see that it
would run; its figures mean nothing.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

import deqcore
from benchmarks.harness import Report, Result, header
from benchmarks.peers import LeanAnderson, torchdeq_anderson, torchdeq_broyden
from benchmarks.problems import agree, contraction, free_function
from deqcore.ops import _rows
from deqcore.ops import anderson_step as op
from deqcore.ops._rows import ACTIVE, Rows
from deqcore.ops.masked_linear import Backend
from deqcore.sparsity import Structure

HERE = Path(__file__).parent
MEMORY = 5
STEPS = 30
NEVER = 10**6
COPY_ELEMENTS = 1 << 28


@dataclass(frozen=True)
class Bench:
    """Where to run, and how large."""

    report: Report
    device: str
    rounds: int
    largest: int  # elements of a row beyond which shapes are cut

    @property
    def real(self) -> bool:
        return self.device == "cuda"

    def shape(self, batch: int, dim: int) -> tuple[int, int]:
        return (batch, dim) if self.real else (min(batch, 4), min(dim, self.largest))

    def seconds(self, run: Callable[[], object], calls: int) -> float:
        """Of one call, in a row of calls."""
        if not self.real:
            start = time.perf_counter()
            for _ in range(calls):
                run()
            return (time.perf_counter() - start) / calls
        before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        before.record()
        for _ in range(calls):
            run()
        after.record()
        after.synchronize()
        return before.elapsed_time(after) / 1e3 / calls

    def times(
        self, contestants: dict[str, Callable[[], object]], work: str = ""
    ) -> dict[str, list[float]]:
        """Seconds of a call, round by round. A peer that is absent or fails is left out."""
        calls = {}
        for name, run in contestants.items():
            try:
                run()
            except Exception as error:
                if not calls:  # ours, which comes first
                    raise
                self.failed(f"{work} against {name}", error)
                continue
            once = max(self.seconds(run, 2), 1e-6)
            calls[name] = max(1, round(0.02 / once)) if self.real else 1
        taken: dict[str, list[float]] = {name: [] for name in calls}
        for _ in range(self.rounds):
            for name, count in calls.items():
                taken[name].append(self.seconds(contestants[name], count))
        return taken

    def compare(
        self, work: str, contestants: dict[str, Callable[[], object]], gates: dict[str, float]
    ) -> None:
        """The first contestant against each of the others; each call of theirs is as much work."""
        try:
            taken = self.times(contestants, work)
        except Exception as error:
            self.failed(work, error)
            return
        ours, *peers = taken
        for peer in peers:
            ratios = sorted(p / o for o, p in zip(taken[ours], taken[peer], strict=True))
            cut = len(ratios) // 10
            self.report.add(
                Result(
                    work, peer, statistics.median(ratios), ratios[cut], ratios[-1 - cut],
                    statistics.median(taken[ours]) * 1e6, statistics.median(taken[peer]) * 1e6,
                    "us", gates.get(peer) if self.real else None,
                )
            )  # fmt: skip

    def failed(self, work: str, error: Exception) -> None:
        """Note what could not be measured, and why; the rest goes on."""
        text = f"{type(error).__name__}: {error}".strip().splitlines()[0]
        self.report.facts.setdefault("failures", {})[work] = text
        print(f"{work}: FAILED: {text}", flush=True)

    def graphed(self, run: Callable[[], object]) -> Callable[[], object]:
        """The same work as a CUDA graph, made by the first call."""
        if not self.real:
            return run
        made: list[Callable[[], object]] = []

        def replay() -> None:
            if not made:
                made.append(self._captured(run))
            made[0]()

        return replay

    def _captured(self, run: Callable[[], object]) -> Callable[[], object]:
        current, stream = torch.cuda.current_stream(), torch.cuda.Stream()
        stream.wait_stream(current)
        graph = torch.cuda.CUDAGraph()
        chosen = torch.backends.cuda.preferred_linalg_library()
        # MAGMA, which would solve the small systems of many rows, cannot be captured.
        torch.backends.cuda.preferred_linalg_library("cusolver")
        try:
            with torch.cuda.stream(stream):  # a capture that fails would leave its stream current
                run()
                with torch.cuda.graph(graph, stream=stream):
                    run()
        finally:
            torch.backends.cuda.preferred_linalg_library(chosen)
        current.wait_stream(stream)
        return graph.replay


def our_steps(bench: Bench, batch: int, dim: int, count: int) -> Callable[[], None]:
    """`count` calls of the op with a full history, in place, as the loop makes them."""
    f = free_function(batch, dim, bench.device)
    x = torch.randn(batch, dim, device=bench.device)
    solver = deqcore.Anderson(memory=MEMORY, max_steps=NEVER, patience=NEVER, rtol=0.0, atol=0.0)
    state = solver.with_all_room(solver.init(x, Rows.start(batch, x.device)))
    context = solver.context(x, x.dtype, ())

    def run(times: int = count) -> None:
        for _ in range(times):
            op.anderson_step(x, f(x), context.damping, state, x, context.nothing, *context.options)

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
    size = COPY_ELEMENTS if bench.real else 1 << 16
    source = torch.ones(size, device=bench.device)
    target = torch.empty_like(source)
    batch, dim = bench.shape(32, 151296)
    taken = bench.times(
        {"step": our_steps(bench, batch, dim, 1), "copy": lambda: target.copy_(source)}
    )
    copied = 8 * size
    moved = 4 * batch * dim * (2 * MEMORY + 4)
    shares = sorted(
        (moved / s) / (copied / c) for s, c in zip(taken["step"], taken["copy"], strict=True)
    )
    cut = len(shares) // 10
    bench.report.facts["copy bandwidth, GB/s"] = copied / statistics.median(taken["copy"]) / 1e9
    bench.report.add(
        Result(
            f"G1 Anderson step {batch}x{dim}", "copy bandwidth", statistics.median(shares),
            shares[cut], shares[-1 - cut], statistics.median(taken["step"]) * 1e6,
            statistics.median(taken["copy"]) * moved / copied * 1e6, "us",
            0.85 if bench.real else None,
        )
    )  # fmt: skip


def bench_anderson(bench: Bench) -> None:
    """G2 and G3: thirty steps against torchdeq, and against lean eager in a graph."""
    for (batch, dim), gate, graph in (
        ((32, 151296), 5.0, False),
        ((256, 4096), 20.0, False),
        ((4096, 256), 20.0, False),
        ((1, 65536), 40.0, True),
    ):
        batch, dim = bench.shape(batch, dim)
        f = free_function(batch, dim, bench.device)
        z0 = torch.zeros(batch, dim, device=bench.device)
        ours = our_steps(bench, batch, dim, STEPS)
        contestants = {
            "deqcore": bench.graphed(ours) if graph else ours,
            "torchdeq": lambda f=f, z0=z0: torchdeq_anderson(f, z0, STEPS, MEMORY),
        }
        label = " (graph)" if graph else ""
        name = f"G2 {STEPS} Anderson steps {batch}x{dim}{label}"
        bench.compare(name, contestants, {"torchdeq": gate})
    for (batch, dim), gate in (((32, 151296), 1.4), ((256, 4096), 4.0), ((1, 65536), 4.0)):
        batch, dim = bench.shape(batch, dim)
        contestants = {
            "deqcore": bench.graphed(our_steps(bench, batch, dim, MEMORY)),
            "lean eager, graph": bench.graphed(lean_steps(bench, batch, dim, MEMORY)),
        }
        name = f"G3 {MEMORY} Anderson steps {batch}x{dim} (graph)"
        bench.compare(name, contestants, {"lean eager, graph": gate})


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
        contestants = {
            "deqcore": lambda f=f, z0=z0, s=solver: deqcore.fixed_point(f, z0, solver=s),
            "torchdeq": lambda f=f, z0=z0: torchdeq_broyden(f, z0, STEPS),
        }
        bench.compare(f"G5 {STEPS} Broyden steps {batch}x{dim}", contestants, {"torchdeq": gate})
    bench_narrow_history(bench)


def bench_narrow_history(bench: Bench) -> None:
    """G5: one Broyden step over thirty stored ones, in bfloat16 against float32."""
    batch, dim = bench.shape(32, 151296)
    contestants = {
        "bf16 history": broyden_step(bench, batch, dim, 30, torch.bfloat16),
        "float32 history": broyden_step(bench, batch, dim, 30, None),
    }
    name = f"G5 Broyden step k=30 {batch}x{dim}, bf16 history"
    bench.compare(name, contestants, {"float32 history": 1.5})


def broyden_step(
    bench: Bench, batch: int, dim: int, stored: int, history_dtype: torch.dtype | None
) -> Callable[[], None]:
    """The op with `stored` steps in the history, again and again."""
    f, x = torch.randn(2, batch, dim, device=bench.device)
    solver = deqcore.Broyden(
        memory=stored + 1, max_steps=NEVER, patience=NEVER, rtol=0.0, atol=0.0,
        history_dtype=history_dtype,
    )  # fmt: skip
    state = solver.with_all_room(solver.init(x, Rows.start(batch, x.device)))
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


def masked_problem(
    bench: Bench, size: int, tokens: int, sparsity: float, dtype: torch.dtype, structure: Structure
) -> tuple[Tensor, Tensor, deqcore.SparsityPattern, Tensor]:
    """x, kept values, their pattern, and the same weight dense: W * M."""
    if not bench.real:
        size, tokens = min(size, 128), min(tokens, 64)
    generator = torch.Generator(bench.device).manual_seed(0)

    def randn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=bench.device).to(dtype)

    scores = torch.rand(size, size, generator=generator, device=bench.device)
    pattern = deqcore.SparsityPattern.from_scores(scores, sparsity, structure=structure)
    weight = randn(size, size)
    return randn(tokens, size), pattern.from_dense(weight), pattern, weight * pattern.mask()


def compare_masked(
    bench: Bench,
    gate_name: str,
    problem: tuple[Tensor, Tensor, deqcore.SparsityPattern, Tensor],
    gates: dict[str, float],
    backend: Backend = "sparse",
) -> None:
    """masked_linear against F.linear, and against CSR where there is a gate for it."""
    x, values, pattern, dense = problem
    exact = x.double() @ dense.double().t()
    contestants: dict[str, Callable[[], Tensor]] = {
        "deqcore": lambda: deqcore.masked_linear(x, values, pattern, backend=backend),
        "F.linear(x, W*M)": lambda: F.linear(x, dense),
    }
    if "torch.sparse CSR" in gates:
        csr = dense.to_sparse_csr()
        contestants["torch.sparse CSR"] = lambda: (csr @ x.t()).t()
    floor = 4 * torch.finfo(x.dtype).eps * exact.abs().max()
    ours, theirs = ((run().double() - exact).abs().max() for run in list(contestants.values())[:2])
    if not ours <= 2 * theirs + floor:
        raise RuntimeError(f"{gate_name}: error {ours:.2e}, of the dense product {theirs:.2e}")
    kind = str(x.dtype).removeprefix("torch.")
    work = f"{gate_name} {kind} {pattern.sparsity:.0%} {len(x)}x{pattern.shape[1]}"
    bench.compare(work, contestants, gates)


def bench_masked(bench: Bench) -> None:
    """S1, S2 and S4: blocks, 2:4 and unstructured against cuBLAS; TF32 is off."""
    for sparsity, gate in ((0.5, 1.6), (0.8, 4.0), (0.9, 7.0)):
        problem = masked_problem(bench, 4096, 8192, sparsity, torch.bfloat16, 64)
        compare_masked(bench, "S1 blocks of 64", problem, {"F.linear(x, W*M)": gate})
    problem = masked_problem(bench, 8192, 8192, 0.5, torch.bfloat16, "2:4")
    compare_masked(bench, "S2 2:4", problem, {"F.linear(x, W*M)": 1.2})
    for sparsity, gate in ((0.9, 2.5), (0.95, 5.0), (0.99, 12.0)):
        problem = masked_problem(bench, 4096, 8192, sparsity, torch.float32, None)
        gates = {"F.linear(x, W*M)": gate, "torch.sparse CSR": 3.0}
        compare_masked(bench, "S4 unstructured", problem, gates)


def bench_masked_gradient(bench: Bench) -> None:
    """The values' gradient against the dense weight gradient; there is no gate for it."""
    outer = torch.ops.deqcore.masked_outer
    for dtype, structure in ((torch.float32, None), (torch.bfloat16, 64)):
        for sparsity in (0.9, 0.95):
            x, _, pattern, _ = masked_problem(bench, 4096, 8192, sparsity, dtype, structure)
            shape = (*pattern.shape, pattern.block)
            grad = torch.randn_like(x)
            contestants: dict[str, Callable[[], Tensor]] = {
                "deqcore": lambda g=grad, x=x, p=pattern, s=shape: outer(g, x, p.indices, *s),
                "dense weight gradient": lambda g=grad, x=x: g.t() @ x,
            }
            kind = "unstructured" if structure is None else f"blocks of {structure}"
            bench.compare(f"values' gradient {kind} {pattern.sparsity:.0%}", contestants, {})


def bench_auto(bench: Bench) -> None:
    """S5: auto, as this machine's table or the cautious default has it, against dense.

    Run python -m deqcore.tune --device cuda first to judge a measured table.
    """
    for size in (768, 4096):
        for tokens in (1, 512, 8192):
            for dtype, structure in (
                (torch.float32, None), (torch.bfloat16, None), (torch.bfloat16, 64)
            ):  # fmt: skip
                for sparsity in (0.9, 0.99):
                    problem = masked_problem(bench, size, tokens, sparsity, dtype, structure)
                    x, values, pattern, dense = problem
                    mask = pattern.mask().to(dtype)
                    kind = str(dtype).removeprefix("torch.")
                    bench.compare(
                        f"S5 auto {kind} {structure} {sparsity:.0%} {tokens}x{size}",
                        {
                            "deqcore": lambda p=pattern, v=values, x=x: deqcore.masked_linear(
                                x, v, p
                            ),
                            "F.linear(x, W*M)": lambda x=x, w=dense, m=mask: F.linear(x, w * m),
                        },
                        {"F.linear(x, W*M)": 0.95},
                    )


PARTS = {
    "bandwidth": bench_bandwidth,
    "anderson": bench_anderson,
    "capture": bench_capture,
    "broyden": bench_broyden,
    "accuracy": bench_accuracy,
    "masked": bench_masked,
    "masked-gradient": bench_masked_gradient,
    "auto": bench_auto,
}
# The gate that a part which breaks off was about.
GATES_OF = {
    "bandwidth": "G1",
    "anderson": "G2",
    "capture": "G4",
    "broyden": "G5",
    "accuracy": "G6",
    "masked": "S1",
    "auto": "S5",
}


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__)
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"of {', '.join(PARTS)}; all")
    parser.add_argument("--out", type=Path, default=HERE / "results" / "gpu.json")
    parser.add_argument("--rehearse", action="store_true", help="on the CPU, with small shapes")
    options = parser.parse_args()
    unknown = [part for part in options.parts if part not in PARTS]
    if unknown:
        parser.error(f"no part {', '.join(unknown)}; there are {', '.join(PARTS)}")
    if not options.rehearse and not torch.cuda.is_available():
        parser.error("no GPU: --rehearse runs every line on the CPU, without a verdict")

    torch.backends.cuda.matmul.allow_tf32 = False  # as torch has it by default
    bench = Bench(
        Report(), "cpu" if options.rehearse else "cuda", 1 if options.rehearse else 9, 600
    )
    facts = bench.report.facts
    facts["device"] = torch.cuda.get_device_name() if bench.real else "rehearsal on the CPU"
    print(f"{facts['device']}\n{header()}", flush=True)
    with torch.no_grad():
        for name, run in {"answers": check_answers, **PARTS}.items():
            if name != "answers" and name not in (options.parts or PARTS):
                continue
            try:
                run(bench)
            except Exception as error:
                traceback.print_exc()
                bench.failed(f"{GATES_OF.get(name, '')} {name}".strip(), error)
            bench.report.write(options.out)
    missed = [r for r in bench.report.results if bench.real and r.verdict == "MISSED"]
    failures = bench.report.facts.get("failures", {})
    print(
        f"{len(bench.report.results)} ratios, {len(missed)} gates missed, "
        f"{len(failures)} failures; in {options.out}"
    )
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
