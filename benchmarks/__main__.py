"""`python -m benchmarks [NAME ...] [--short] [--out FILE]`: time the CPU kernels, print a table."""

from __future__ import annotations

import argparse
import importlib
import sys
from pathlib import Path

import torch

from benchmarks.harness import Report, header

HERE = Path(__file__).parent
NAMES = sorted(path.stem.removeprefix("bench_") for path in HERE.glob("bench_*.py"))


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(NAMES)}; all")
    parser.add_argument(
        "--out", type=Path, default=HERE / "results" / "cpu.json", help="JSON file to write"
    )
    parser.add_argument("--short", action="store_true", help="a few small shapes, in a minute")
    options = parser.parse_args()
    unknown = [name for name in options.names if name not in NAMES]
    if unknown:
        parser.error(f"no benchmark {', '.join(unknown)}; there are {', '.join(NAMES)}")

    torch.set_num_threads(1)
    report = Report(short=options.short)
    print(header(), flush=True)
    for name in options.names or NAMES:
        with torch.no_grad():  # as a solve runs its steps
            importlib.import_module(f"benchmarks.bench_{name}").run(report)
    report.write(options.out)
    missed = [result for result in report.results if result.verdict == "MISSED"]
    print(f"{len(report.results)} ratios, {len(missed)} gates missed; written to {options.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
