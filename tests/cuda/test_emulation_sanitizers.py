"""The CUDA kernels under sanitizers, and proof that these would see a defect.

AddressSanitizer guards the ends of every tensor, of the workspace and of each block's shared
memory; ThreadSanitizer knows CUDA's barriers and no other order between threads.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tests.support.defects import Defect
from tests.support.problems import equal
from tests.support.step_cases import StepCase, anderson_case, broyden_case, full_rows
from tools import emulation
from tools.emulation import ROOT, EmulationError, Emulator

# Orders of the threads. ThreadSanitizer sees what barriers do not order in any one of them.
SEEDS = {"address_program": range(4), "thread_program": range(1)}
NARROW = torch.bfloat16
CASES = {  # op, path, batch, dim, memory, dtype, seed, and the history's dtype where it is not x's
    "anderson warp": ("anderson_step", "warp", 6, 130, 5, torch.float32, 11),
    "anderson warp, long memory": ("anderson_step", "warp", 6, 40, 30, torch.float64, 12),
    "anderson block": ("anderson_step", "block", 3, 1100, 7, torch.bfloat16, 13),
    "anderson block, not aligned": ("anderson_step", "block", 3, 1029, 64, torch.float16, 14),
    "anderson split": ("anderson_step", "split", 2, 8196, 5, torch.float32, 15),
    "anderson split, not aligned": ("anderson_step", "split", 2, 4097, 12, torch.float64, 16),
    "broyden warp": ("broyden_step", "warp", 6, 130, 20, torch.float32, 21),
    "broyden block": ("broyden_step", "block", 3, 1100, 40, torch.float64, 22),
    "broyden block, not aligned": ("broyden_step", "block", 3, 1029, 9, torch.bfloat16, 23),
    "broyden split": ("broyden_step", "split", 2, 8196, 30, torch.float32, 24),
    "broyden split, not aligned": ("broyden_step", "split", 2, 4097, 12, torch.float16, 25),
    "narrow warp": ("broyden_step", "warp", 6, 130, 20, torch.float32, 27, NARROW),
    "narrow block": ("broyden_step", "block", 3, 1100, 40, torch.bfloat16, 28, NARROW),
    "narrow split": ("broyden_step", "split", 2, 8196, 9, torch.float32, 29, NARROW),
    "narrow split, not aligned": ("broyden_step", "split", 2, 4097, 12, torch.float16, 30, NARROW),
    "anderson cluster": ("anderson_step", "cluster", 2, 8200, 7, torch.float32, 31),
    "anderson cluster, one block": ("anderson_step", "cluster", 3, 1100, 5, torch.float64, 32),
    "anderson cluster, not aligned": ("anderson_step", "cluster", 2, 4099, 4, torch.bfloat16, 33),
    "anderson cluster, by tiles": ("anderson_step", "cluster", 1, 33_000, 3, torch.float64, 34),
    "broyden cluster": ("broyden_step", "cluster", 2, 4104, 20, torch.float32, 35),
    "broyden cluster, not aligned": ("broyden_step", "cluster", 2, 2051, 9, torch.float16, 36),
    "narrow cluster": ("broyden_step", "cluster", 2, 4104, 20, torch.float32, 37, NARROW),
    "narrow cluster, not aligned": (
        "broyden_step",
        "cluster",
        2,
        2051,
        9,
        torch.float16,
        38,
        NARROW,
    ),
    "empty rows": ("anderson_step", "block", 2, 0, 3, torch.float32, 26),
}


def make(op: str, *args: object) -> StepCase:
    return (anderson_case if op == "anderson_step" else broyden_case)(*args)


def run_program(program: Path, op: str, path: str, case: StepCase, seeds=range(2)):
    return emulation.run_program(program, op, path, case.args, seeds)


@pytest.mark.parametrize("sanitizer", ["address_program", "thread_program"])
@pytest.mark.parametrize("name", CASES)
def test_sanitizers_find_nothing_and_every_order_of_threads_gives_the_same_bits(
    name, sanitizer, emulator, request
):
    op, path, *args = CASES[name]
    case = make(op, *args)
    program = request.getfixturevalue(sanitizer)
    done, results = run_program(program, op, path, case, SEEDS[sanitizer])
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    expected = list(case.run(emulator.step(op, path)).values())
    for result in results:
        for got, wanted in zip(result, expected, strict=True):
            assert got is None or equal(got, wanted)


DEFECTS = {
    "a missing barrier": Defect(
        "cuda/team.cuh",
        "double* totals) {\n  team.sync();\n  for (int i = team.rank",
        "double* totals) {\n  for (int i = team.rank",
        "anderson block",
        "thread",
        "WARNING: ThreadSanitizer: data race",
    ),
    "a missing barrier within a warp": Defect(
        "cuda/anderson_step.cu",
        "    if (lane == 0) state->counters[kMixed] = mixed;\n    __syncwarp();\n",
        "    if (lane == 0) state->counters[kMixed] = mixed;\n",
        "anderson warp",
        "thread",
        "WARNING: ThreadSanitizer: data race",
    ),
    "a race between blocks": Defect(
        "cuda/anderson_step.cu",
        "/*commits=*/chunk == 0",
        "/*commits=*/true",
        "anderson split",
        "thread",
        "WARNING: ThreadSanitizer: data race",
    ),
    "a read out of bounds": Defect(
        "cuda/pack.cuh",
        "i < left ? from[i]",
        "i <= left ? from[i]",
        "broyden split, not aligned",
        "address",
        "AddressSanitizer: heap-buffer-overflow",
    ),
    "too little shared memory": Defect(
        "cuda/anderson_step.cu",
        "memory * (memory + 1) + 6 * memory",
        "memory * (memory + 1) + 5 * memory",
        "anderson split",
        "address",
        "AddressSanitizer: heap-buffer-overflow",
    ),
    "an access that is not aligned": Defect(
        "cuda/anderson_step.cu",
        "      args.dim % kWidth == 0 &&",
        "      args.dim > 0 &&",
        "anderson block, not aligned",
        "address",
        "misaligned address",
    ),
    "a thread that leaves before a barrier": Defect(
        "cuda/broyden_step.cu",
        "  if (!scratch.state->active) return;\n",
        "  if (!scratch.state->active || team.warp() > 6) return;\n",
        "broyden split",
        "library",
        "left before a __syncthreads that others wait at",
    ),
    "sums read before they have come": Defect(
        "cuda/row_parts.cuh",
        "      wait_for_numbers(barrier, 0);\n",
        "",
        "anderson cluster",
        "library",
        "left with copies that none has awaited",
    ),
    "a barrier that other blocks may tell before it has begun": Defect(
        "cuda/row_parts.cuh",
        "if constexpr (kMany) wait_for_cluster();",
        "",
        "anderson cluster",
        "library",
        "left without a wait for its cluster",
    ),
    "a row that two blocks of a cluster write down": Defect(
        "cuda/anderson_cluster.cu",
        "if (block == 0 && team.warp() == 0) {",
        "if (team.warp() == 0) {",
        "anderson cluster",
        "thread",
        "WARNING: ThreadSanitizer: data race",
    ),
    "a shuffle without all its lanes": Defect(
        "cuda/team.cuh",
        "  const double sum = warp_sum(value);",
        "  const double sum = team.lane() < 31 ? warp_sum(value) : value;",
        "anderson warp",
        "library",
        "wait at different barriers or operations",
    ),
}


@pytest.fixture
def planted(tmp_path, emulator) -> Callable[[Defect, str], Path]:
    """Build the kernels with a defect planted."""

    def plant(defect: Defect, flavour: str) -> Path:
        sources = tmp_path / "csrc"
        shutil.copytree(ROOT / "csrc", sources, dirs_exist_ok=True)
        text = (sources / defect.file).read_text()
        assert text.count(defect.before) == 1, "the kernels have changed: move the defect"
        (sources / defect.file).write_text(text.replace(defect.before, defect.after))
        return emulation.build(flavour, sources, tmp_path / flavour, CASES[defect.case][0])

    return plant


@pytest.mark.parametrize("name", DEFECTS)
def test_a_planted_defect_is_caught(name, planted):
    defect = DEFECTS[name]
    op, path, *args = CASES[defect.case]
    case = make(op, *args)
    built = planted(defect, defect.flavour)
    if defect.flavour == "library":
        with pytest.raises(EmulationError, match=defect.message):
            case.run(Emulator(built).step(op, path))
        return
    done, _ = run_program(built, op, path, case)
    assert done.returncode != 0
    assert defect.message in done.stderr, done.stderr


@pytest.mark.parametrize("name", ["a missing barrier", "a missing barrier within a warp"])
def test_a_missing_barrier_shows_in_the_results_of_most_orders(name, planted, emulator):
    """Without a sanitizer too: in one order of threads or another the answer changes."""
    defect = DEFECTS[name]
    op, path, *args = CASES[defect.case]
    case = make(op, *args)
    broken = Emulator(planted(defect, "library"))
    expected = case.run(emulator.step(op, path))
    wrong = 0
    for seed in range(1, 21):
        try:
            result = case.run(broken.step(op, path, seed))
        except EmulationError:
            wrong += 1
            continue
        wrong += not all(equal(result[name], expected[name]) for name in expected)
    assert wrong >= 10, f"{wrong} of 20 orders"


@pytest.mark.parametrize("case", ["anderson cluster", "broyden cluster"])
@pytest.mark.parametrize(
    ("file", "before", "after"),
    [
        ("slot_ring.cuh", "wait_for_groups_but(stages_ - 1)", "wait_for_groups_but(stages_)"),
        ("{op}_cluster.cu", "i < stages; ++i) fetch_next()", "i <= stages; ++i) fetch_next()"),
    ],
    ids=["used before it has come", "fetched to where another one is in use"],
)
def test_a_slot_out_of_turn_shows_in_the_results(case, file, before, after, planted, emulator):
    op, path, *args = CASES[case]
    name = file.format(op=op.removesuffix("_step"))
    defect = Defect(f"cuda/{name}", before, after, case, "library", "")
    memory = args[2]
    steps = full_rows(make(op, *args), memory - 1)
    expected = steps.run(emulator.step(op, path))
    result = steps.run(Emulator(planted(defect, "library")).step(op, path))
    assert not equal(result["x_next"], expected["x_next"])
