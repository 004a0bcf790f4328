"""`python -m benchmarks.gpu [PART ...] [--out FILE]`: time the CUDA kernels, gate by gate.

Times are medians of CUDA events after a warm-up; contestants take turns. Answers are compared
before anything is timed. `--rehearse` runs every line on the CPU with small shapes, to see that it
would run; its figures mean nothing.
"""

from __future__ import annotations

import argparse
import sys
import traceback
from pathlib import Path

import torch

from benchmarks.gpu_bench import Bench
from benchmarks.gpu_masked import (
    bench_auto,
    bench_few_tokens,
    bench_masked,
    bench_masked_gradient,
)
from benchmarks.gpu_solvers import (
    bench_accuracy,
    bench_anderson,
    bench_bandwidth,
    bench_broyden,
    bench_capture,
    check_answers,
)
from benchmarks.gpu_training import bench_training
from benchmarks.harness import Report, header

HERE = Path(__file__).parent

PARTS = {
    "bandwidth": bench_bandwidth,
    "anderson": bench_anderson,
    "capture": bench_capture,
    "broyden": bench_broyden,
    "accuracy": bench_accuracy,
    "masked": bench_masked,
    "masked-gradient": bench_masked_gradient,
    "few-tokens": bench_few_tokens,
    "auto": bench_auto,
    "training": bench_training,
}
# The gate that a part which breaks off was about.
GATES_OF = {
    "bandwidth": "G1",
    "anderson": "G2",
    "capture": "G4",
    "broyden": "G5",
    "accuracy": "G6",
    "masked": "S1",
    "masked-gradient": "S6",
    "few-tokens": "S7",
    "auto": "S5",
    "training": "G7",
}


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__)
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"of {', '.join(PARTS)}; all")
    parser.add_argument("--out", type=Path, default=HERE / "results" / "gpu.json")
    parser.add_argument("--previous", type=Path, help="results to show beside the new ones")
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
    if options.previous is not None:
        bench.report.compare_with(options.previous)
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
