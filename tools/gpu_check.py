"""Everything that needs a GPU, with one command: build, test, sanitize, bench.

    python tools/gpu_check.py --out runs/gpu [--only build,test] [--wheels FOLDER]

Needs Python with torch (a CUDA build), nvcc, and no network: packages that are missing are taken
from --wheels, a folder of wheels. Results go to one folder: gpu_check.json, gpu_check.log and
gpu_benchmarks.json. A part that fails makes the command fail; a sanitizer that refuses the device,
or is not installed, is reported as that and never as clean. `--rehearse` runs each part as far as a
machine without a GPU can. The parts together take less than 9 minutes.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SECONDS = {"build": 135, "test": 150, "sanitize": 110, "bench": 140}  # 8 min 55 s
PACKAGES = {"pytest": "pytest", "hypothesis": "hypothesis", "torchdeq": "torchdeq"}
SANITIZERS = ("memcheck", "racecheck", "initcheck")
REFUSALS = re.compile(
    r"not supported|unsupported|no attached cuda|unable to|failed to initialize|"
    r"insufficient driver|permission",
    re.IGNORECASE,
)
AVX512 = {"avx512f", "avx512bw", "avx512vl", "avx512dq"}


@dataclass
class Step:
    """One command and its outcome: passed, failed, refused, absent or out of time."""

    name: str
    outcome: str
    seconds: float
    detail: str = ""


@dataclass
class Check:
    """The run: where results go, how long is left, what happened."""

    out: Path
    rehearse: bool
    wheels: Path | None
    steps: list[Step] = field(default_factory=list)
    deadline: float = 0.0

    def log(self, text: str) -> None:
        print(text, flush=True)
        with (self.out / "gpu_check.log").open("a") as file:
            file.write(text + "\n")

    def run(
        self,
        name: str,
        command: list[str],
        judge: Callable[[int, str], tuple[str, str]] | None = None,
        **variables: str,
    ) -> Step:
        """Run a command within the part's time; `judge` reads (status, output) into an outcome."""
        self.log(f"\n== {name}: {' '.join(command)}")
        start = time.monotonic()
        environment = {**os.environ, "PYTHONUNBUFFERED": "1", **variables}
        try:
            done = subprocess.run(
                command,
                cwd=ROOT,
                env=environment,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                timeout=max(1.0, self.deadline - start),
                check=False,
            )
            text = done.stdout
            outcome, detail = (judge or _by_status)(done.returncode, text)
        except FileNotFoundError:
            text, outcome, detail = "", "absent", f"{command[0]} is not installed"
        except subprocess.TimeoutExpired as late:
            text = (late.stdout or b"").decode(errors="replace")
            outcome, detail = "out of time", f"after {late.timeout:.0f} s"
        self.log(text[-20_000:])
        step = Step(name, outcome, round(time.monotonic() - start, 1), detail)
        self.steps.append(step)
        self.log(f"-- {name}: {outcome} in {step.seconds} s {detail}")
        return step


def _by_status(status: int, text: str) -> tuple[str, str]:
    lines = text.strip().splitlines()
    return ("passed" if status == 0 else "failed"), (lines[-1] if lines else "")


def build(check: Check) -> None:
    """The extension for this GPU, in place, and what its kernels cost."""
    _install_missing(check)
    architecture = _architecture(check)
    install = ["-m", "pip", "install", "--no-build-isolation", "--no-deps", "--no-index", "-e", "."]
    cuda = not check.rehearse or _torch_fact("torch.version.cuda") != "None"
    check.run(
        "build the extension",
        [sys.executable, *install],
        DEQCORE_BUILD="cuda" if cuda else "cpu",
        TORCH_CUDA_ARCH_LIST=f"{architecture[:-1]}.{architecture[-1]}",
        MAX_JOBS=str(os.cpu_count()),
    )
    tool = [sys.executable, "tools/cuda_build.py", "--only", "kernels"]
    report = ["--architectures", architecture, "--json", str(check.out / "kernels.json")]
    check.run("registers and spills", [*tool, *report])


def _install_missing(check: Check) -> None:
    missing = []
    for module, package in PACKAGES.items():
        found = subprocess.run(
            [sys.executable, "-c", f"import {module}"], capture_output=True, check=False
        )
        if found.returncode:
            missing.append(package)
    if not missing:
        return
    if check.wheels is None:
        check.log(f"missing: {', '.join(missing)}; pass --wheels")
        return
    found_wheels = sorted(map(str, check.wheels.glob("*.whl")))
    options = ["install", "--no-index", "--no-deps", "--quiet"]
    check.run("install wheels", [sys.executable, "-m", "pip", *options, *found_wheels])


def test(check: Check) -> None:
    """The tests that have to do with devices and kernels; all of them where time allows."""
    required = {} if check.rehearse else {"REQUIRE_CUDA": "1", "DEQCORE_KERNELS": "require"}
    pytest = [sys.executable, "-m", "pytest", "-q", "--maxfail=20"]
    has_xdist = subprocess.run([sys.executable, "-c", "import xdist"], check=False).returncode == 0
    if has_xdist and not check.rehearse:
        pytest += ["-n", str(min(8, os.cpu_count() or 1)), "--dist", "loadfile"]
    on_gpu = ["capture", "large_offsets", "gpu_steps", "gpu_masked", "never_waits"]
    folders = ["tests/ops", "tests/solvers", "tests/adjoints"]
    check.run(
        "tests of the GPU",
        [*pytest, *(f"tests/cuda/test_{name}.py" for name in on_gpu)],
        **required,
    )
    if check.rehearse:
        folders = ["tests/ops/test_anderson_step.py", "-k", "long_rows"]
    check.run("tests of ops, solvers and adjoints", [*pytest, *folders], **required)
    flags = set(_read("/proc/cpuinfo").split())
    if flags >= AVX512:
        isa = {"DEQCORE_CPU_ISA": "avx512"}
        check.run("tests of the AVX-512 kernels", [*pytest, "tests/ops", "-k", "not cuda"], **isa)
    else:
        check.steps.append(Step("tests of the AVX-512 kernels", "absent", 0, "no such processor"))


def sanitize(check: Check) -> None:
    """Small cases on every path, under each tool of compute-sanitizer."""
    device = ["--device", "cpu"] if check.rehearse else []
    cases = [sys.executable, "tools/gpu_cases.py", *device]
    check.run("the cases alone", cases)
    sanitizer = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
    for tool in SANITIZERS:
        options = ["--tool", tool, "--target-processes", "all", "--error-exitcode", "9"]
        # One allocation a tensor: a pool would hide what is out of bounds or never written.
        check.run(
            tool, [sanitizer, *options, *cases], judge_sanitizer, PYTORCH_NO_CUDA_MEMORY_CACHING="1"
        )


def judge_sanitizer(status: int, text: str) -> tuple[str, str]:
    """Clean only if the tool says so itself and the cases ran to their end."""
    summaries = re.findall(r"(?:ERROR|RACECHECK) SUMMARY:.*", text)
    errors = [
        int(number) for line in summaries for number in re.findall(r"(\d+) (?:error|hazard)", line)
    ]
    finished = "are as exact as their references" in text
    if any(errors):
        return "failed", summaries[-1]
    if not summaries or not finished:
        refusal = next((line for line in text.splitlines() if REFUSALS.search(line)), "")
        if refusal:
            return "refused", refusal.strip()
        return "failed", "no summary" if not summaries else "the cases did not end"
    if status != 0:
        return "failed", f"exit status {status}"
    return "passed", summaries[-1]


def bench(check: Check) -> None:
    """The gates of docs/performance.md that need a GPU."""
    options = ["--rehearse"] if check.rehearse else []
    out = ["--out", str(check.out / "gpu_benchmarks.json")]
    check.run("benchmarks", [sys.executable, "-m", "benchmarks.gpu", *options, *out])


PARTS = {"build": build, "test": test, "sanitize": sanitize, "bench": bench}


def _architecture(check: Check) -> str:
    if check.rehearse:
        return "90"
    return _torch_fact("'%d%d' % torch.cuda.get_device_capability()")


def _torch_fact(expression: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", f"import torch; print({expression})"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    if done.returncode:
        raise SystemExit(f"gpu-check: {expression}: {done.stderr.strip().splitlines()[-1]}")
    return done.stdout.strip()


def _read(path: str) -> str:
    return Path(path).read_text() if Path(path).exists() else ""


def machine(rehearse: bool) -> dict[str, str]:
    name = "none (rehearsal)" if rehearse else _torch_fact("torch.cuda.get_device_name()")
    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True,
        check=False,
    )  # fmt: skip
    nvcc = shutil.which("nvcc")
    release = ""
    if nvcc:
        text = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=False)
        release = "".join(re.findall(r"release [\d.]+", text.stdout))
    return {
        "gpu": name,
        "torch": _torch_fact("torch.__version__"),
        "nvcc": release,
        "python": platform.python_version(),
        "commit": commit.stdout.strip(),
        "date": time.strftime("%Y-%m-%d"),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "gpu_check")
    parser.add_argument("--only", default=",".join(PARTS), help="parts, separated by commas")
    parser.add_argument("--wheels", type=Path, help="folder of wheels for missing packages")
    parser.add_argument("--rehearse", action="store_true", help="without a GPU, as far as it goes")
    options = parser.parse_args()
    chosen = options.only.split(",")
    if unknown := [part for part in chosen if part not in PARTS]:
        parser.error(f"no part {', '.join(unknown)}; there are {', '.join(PARTS)}")
    options.out.mkdir(parents=True, exist_ok=True)
    if not options.rehearse and _torch_fact("torch.cuda.is_available()") != "True":
        raise SystemExit("gpu-check: torch sees no GPU here; --rehearse goes as far as that allows")

    check = Check(options.out.resolve(), options.rehearse, options.wheels)
    facts = machine(options.rehearse)
    check.log(json.dumps(facts))
    for part in chosen:
        check.deadline = time.monotonic() + SECONDS[part] * (10 if options.rehearse else 1)
        PARTS[part](check)
        result = {"machine": facts, "steps": [asdict(step) for step in check.steps]}
        (options.out / "gpu_check.json").write_text(json.dumps(result, indent=1) + "\n")
    check.log(
        "\n"
        + "\n".join(f"{s.outcome:12} {s.seconds:7} s  {s.name}: {s.detail}" for s in check.steps)
    )
    bad = {"failed", "out of time"}
    if any(step.outcome in bad for step in check.steps):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
