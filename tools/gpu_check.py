"""Everything that needs a GPU, with one command: build, test, sanitize, bench, tune.

    python tools/gpu_check.py --out runs/gpu [--only build,test] [--wheels FOLDER]

Needs Python with torch (a CUDA build), nvcc, and no network: packages that are missing are taken
from --wheels, a folder of wheels (`make gpu-wheels` fills it). What is installed goes to
build/gpu_check_site, so that the environment need not be writable. Results go to one folder:
gpu_check.json and gpu_check.log, which grow step by step, gpu_benchmarks.json and tune.json.

A step that fails does not keep the next from running; in the end it makes the command fail. A
sanitizer that refuses the device, or is not installed, is reported as that and never as clean.
`--rehearse` runs each part as far as a machine without a GPU can. The chosen parts together take
less than --minutes, which they share; what one leaves over is the next one's.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.machinery
import importlib.metadata
import json
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
SITE = ROOT / "build" / "gpu_check_site"
# What an H200 with 16 cores took, and a reserve: 12 minutes; a machine that starts takes a 13th.
# `others`, which needs no GPU, runs only where it is named.
SECONDS = {"build": 70, "test": 290, "sanitize": 90, "bench": 160, "tune": 110, "others": 300}
USUAL = ("build", "test", "sanitize", "bench", "tune")
SHOWN, KEPT = 3_000, 1 << 20  # characters of a step's output on the terminal, and in the log
GATES = ("G1", "G2", "G3", "G4", "G5", "G6", "G7", "S1", "S2", "S4", "S5", "S6", "S7")
GPU_TESTS = (
    *("gpu_steps", "gpu_masked", "gpu_solves", "capture", "layer_capture", "layer_capture_life"),
    *("large_offsets", "never_waits"),
)
# Once more with DEQCORE_CUDA_TRIAL=1.
TRIAL_TESTS = ("gpu_steps", "gpu_masked", "gpu_solves", "capture")
# A package that is missing must not keep the files that do without it from running.
PYTEST = ["-q", "--maxfail=20", "-p", "no:cacheprovider", "--continue-on-collection-errors"]
SANITIZERS = ("memcheck", "racecheck", "initcheck")
REFUSALS = re.compile(
    r"not supported|unsupported|no attached cuda|unable to|failed to initialize|"
    r"insufficient driver|permission",
    re.IGNORECASE,
)
COUNTS = re.compile(r"\d+ (passed|failed|skipped|errors?|deselected).* in [\d.]+s")
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
    facts: dict[str, str] = field(default_factory=dict)
    steps: list[Step] = field(default_factory=list)
    deadline: float = 0.0

    def log(self, text: str, shown: str | None = None) -> None:
        print(text if shown is None else shown, flush=True)
        with (self.out / "gpu_check.log").open("a") as file:
            file.write(text + "\n")

    def add(self, step: Step) -> Step:
        """Note a step, on disk too: whatever ends this process later, it is not lost."""
        self.steps.append(step)
        result = {"machine": self.facts, "steps": [asdict(step) for step in self.steps]}
        temporary = self.out / "gpu_check.tmp"
        temporary.write_text(json.dumps(result, indent=1) + "\n")
        temporary.replace(self.out / "gpu_check.json")
        self.log(f"-- {step.name}: {step.outcome} in {step.seconds} s {step.detail}")
        return step

    def run(
        self,
        name: str,
        command: list[str],
        judge: Callable[[int, str], tuple[str, str]] | None = None,
        share: int = 1,
        env: Mapping[str, str] | None = None,
    ) -> Step:
        """Run a command within the part's time; `judge` reads (status, output) into an outcome.

        `share`: how many steps what is left of the time is for, this one included; `env` is added
        to the environment.
        """
        self.log(f"\n== {name}: {' '.join(command)}")
        start = time.monotonic()
        seconds = max(1.0, (self.deadline - start) / share)
        python_path = [str(SITE), str(ROOT), *os.environ.get("PYTHONPATH", "").split(os.pathsep)]
        environment = {
            **os.environ,
            "PYTHONUNBUFFERED": "1",
            "PYTHONPATH": os.pathsep.join(filter(None, python_path)),
            **(env or {}),
        }
        # Into a file as it comes: what was said until then outlives a kill.
        said = self.out / "gpu_check_step.log"
        try:
            with said.open("wb") as file:
                status = _wait(command, seconds, stdout=file, cwd=ROOT, env=environment)
            text = said.read_text(errors="replace")
            if status is None:
                outcome, detail = "out of time", f"after {seconds:.0f} s"
            else:
                outcome, detail = (judge or _by_status)(status, text)
        except FileNotFoundError:
            text, outcome, detail = "", "absent", f"{command[0]} is not installed"
        half = KEPT // 2
        kept = text if len(text) <= KEPT else f"{text[:half]}\n[... cut ...]\n{text[-half:]}"
        self.log(kept, shown=text[-SHOWN:])
        said.unlink(missing_ok=True)
        return self.add(Step(name, outcome, round(time.monotonic() - start, 1), detail[:300]))


def _wait(command: list[str], seconds: float, **options: Any) -> int | None:
    """The exit status; None if it took too long and was ended, with all that it had started."""
    process = subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stderr=subprocess.STDOUT, start_new_session=True,
        **options,
    )  # fmt: skip
    try:
        return process.wait(seconds)
    except subprocess.TimeoutExpired:
        return None
    finally:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _by_status(status: int, text: str) -> tuple[str, str]:
    lines = text.strip().splitlines()
    return ("passed" if status == 0 else "failed"), (lines[-1] if lines else "")


def build(check: Check) -> None:
    """The extension for this GPU, in place."""
    _install_missing(check)
    architecture = _architecture(check)
    install = ["-m", "pip", "install", "--no-build-isolation", "--no-deps", "--no-index"]
    install += ["--upgrade", "--target", str(SITE), "-e", "."]
    cuda = not check.rehearse or _torch_fact("torch.version.cuda") != "None"
    chosen = {
        "DEQCORE_BUILD": "cuda" if cuda else "cpu",
        "TORCH_CUDA_ARCH_LIST": f"{architecture[:-1]}.{architecture[-1]}",
        "MAX_JOBS": str(os.cpu_count()),
    }
    check.run("build the extension", [sys.executable, *install], env=chosen)


def _install_missing(check: Check) -> None:
    """From the wheels those that are not installed: a test runner here need not be replaced."""
    if check.wheels is None or not check.wheels.is_dir():
        check.log(f"no folder of wheels ({check.wheels}): what is missing here is reported below")
        return
    options = ["install", "--no-index", "--no-deps", "--quiet", "--upgrade", "--target", str(SITE)]
    for wheel in sorted(check.wheels.glob("*.whl")):  # singly: one may be another Python's
        name = wheel.name.split("-")[0]
        if not _is_installed(name):
            check.run(f"install {name}", [sys.executable, "-m", "pip", *options, str(wheel)])


def _is_installed(name: str) -> bool:
    try:
        importlib.metadata.version(name.replace("_", "-"))
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def test(check: Check) -> None:
    """First what needs the GPU, a process a file: an error that kills the device ends with it."""
    required = {} if check.rehearse else {"REQUIRE_CUDA": "1", "DEQCORE_KERNELS": "require"}
    required["OMP_NUM_THREADS"] = "1"
    pytest = [sys.executable, "-m", "pytest", *PYTEST]
    several, _ = _parallel(check)
    for name in GPU_TESTS:
        files = [f"tests/cuda/test_{name}.py"]
        check.run(f"GPU: {name}", [*pytest, *files, *several], judge_tests, share=3, env=required)
    trial = {**required, "DEQCORE_CUDA_TRIAL": "1"}
    for name in TRIAL_TESTS:
        files = [f"tests/cuda/test_{name}.py"]
        what = f"GPU: {name}, paths on trial"
        check.run(what, [*pytest, *files, *several], judge_tests, share=3, env=trial)
    others = ["tests", "--ignore=tests/cuda", "-k", "cuda"]
    check.run("GPU: the rest", [*pytest, *others, *several], judge_tests, share=3, env=required)


def others(check: Check) -> None:
    """What needs no GPU, where there is one: the AVX-512 kernels, and the whole suite."""
    pytest = [sys.executable, "-m", "pytest", *PYTEST]
    several, by_file = _parallel(check)
    flags = set(_read("/proc/cpuinfo").split())
    if flags >= AVX512:
        isa = {"DEQCORE_CPU_ISA": "avx512", "OMP_NUM_THREADS": "1"}
        wide = [*pytest, "tests/ops", "-k", "not cuda", *several]
        check.run("tests of the AVX-512 kernels", wide, judge_tests, share=3, env=isa)
    else:
        check.add(Step("tests of the AVX-512 kernels", "absent", 0, "no such processor"))
    everything = ["tests", *(f"--ignore=tests/cuda/test_{name}.py" for name in GPU_TESTS)]
    if check.rehearse:
        everything = ["tests/ops/test_anderson_step.py", "-k", "long_rows"]
    # A test may ask for kernels of its own, so that only the GPU is required.
    required = {"OMP_NUM_THREADS": "1"} | ({} if check.rehearse else {"REQUIRE_CUDA": "1"})
    check.run("all other tests", [*pytest, *everything, *by_file], judge_tests, env=required)


def _parallel(check: Check) -> tuple[list[str], list[str]]:
    """Options of pytest: test by test over workers, and file by file."""
    path = [str(SITE), *sys.path]
    there = importlib.machinery.PathFinder.find_spec("xdist", path) is not None
    if not there or check.rehearse:
        return [], []
    workers = ["-n", str(min(12, os.cpu_count() or 1)), "--dist"]
    return [*workers, "load"], [*workers, "loadfile"]


def judge_tests(status: int, text: str) -> tuple[str, str]:
    """Tests that were all left out have shown nothing; pytest says so with status 5, or 0."""
    outcome, last = _by_status(status, text)
    counts = [line for line in text.splitlines() if COUNTS.search(line)]
    detail = counts[-1].strip("= ") if counts else last
    if status == 5 or (status == 0 and not re.search(r"\d+ passed", detail)):
        return "none ran", detail
    return outcome, detail


def sanitize(check: Check) -> None:
    """Small cases on every path, under each tool of compute-sanitizer."""
    device = ["--device", "cpu"] if check.rehearse else []
    cases = [sys.executable, "tools/gpu_cases.py", *device]
    required = {} if check.rehearse else {"DEQCORE_KERNELS": "require"}
    check.run("the cases alone", cases, share=4, env=required)
    sanitizer = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
    for left, tool in zip((3, 2, 1), SANITIZERS, strict=True):
        options = ["--tool", tool, "--target-processes", "all", "--error-exitcode", "9"]
        if tool == "memcheck":  # torch asks the driver for things that it may not have
            options += ["--report-api-errors", "no"]
        # One allocation a tensor: a pool would hide what is out of bounds or never written.
        variables = {**required, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
        check.run(tool, [sanitizer, *options, *cases], judge_sanitizer, left, variables)


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
    target = check.out / "gpu_benchmarks.json"
    target.unlink(missing_ok=True)
    required = {} if check.rehearse else {"DEQCORE_KERNELS": "require"}
    if previous := _previous_results(check):
        options += ["--previous", str(previous)]
    command = [sys.executable, "-m", "benchmarks.gpu", *options, "--out", str(target)]
    check.run("benchmarks", command, env=required)
    results = json.loads(_read(str(target)) or "{}")
    for gate, verdict in gate_verdicts(results).items():
        check.add(Step(f"gate {gate}", verdict, 0))


def _previous_results(check: Check) -> Path | None:
    """The newest committed results of this kind of GPU."""
    found = []
    for path in sorted((ROOT / "benchmarks" / "results").glob("*_benchmarks.json")):
        results = json.loads(path.read_text())
        if results["facts"].get("device") == check.facts["gpu"]:
            found.append((results["machine"].get("date", ""), path.stat().st_mtime, path))
    return max(found)[2] if found else None


def gate_verdicts(results: dict[str, Any]) -> dict[str, str]:
    """Of what the benchmarks wrote: met, MISSED (how often), or not measured, for each gate."""
    facts, rows = results.get("facts", {}), results.get("results", [])
    named = {name for name in (row["work"].split()[0] for row in rows) if re.match(r"[GS]\d", name)}
    verdicts = {}
    for gate in sorted({*GATES, *named}):
        mine = [r["verdict"] for r in rows if r["work"].split()[0] == gate and r["verdict"] != "-"]
        if isinstance(facts.get(gate), dict) and facts[gate]["verdict"] != "-":
            mine.append(facts[gate]["verdict"])
        failures = [text for name, text in facts.get("failures", {}).items() if name[:2] == gate]
        verdict = "met" if mine else "not measured"
        if "MISSED" in mine:
            verdict = f"MISSED ({mine.count('MISSED')} of {len(mine)})"
        verdicts[gate] = "; ".join([verdict, *failures])
    return verdicts


def tune(check: Check) -> None:
    """This kind's table of crossovers, to become deqcore/sparse/tables/KIND.json."""
    command = [sys.executable, "-m", "deqcore.tune", "--out", str(check.out / "tune.json")]
    check.run("tune", [*command, *([] if check.rehearse else ["--device", "cuda"])])


PARTS = {
    "build": build, "test": test, "sanitize": sanitize, "bench": bench, "tune": tune,
    "others": others,
}  # fmt: skip


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


def _said(*command: str) -> str:
    """What a command printed; nothing if it is not there or fails."""
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        return ""
    return done.stdout if done.returncode == 0 else ""


def machine(rehearse: bool) -> dict[str, str]:
    name = "none (rehearsal)" if rehearse else _torch_fact("torch.cuda.get_device_name()")
    release = re.search(r"release [\d.]+", _said("nvcc", "--version"))
    return {
        "gpu": name,
        "torch": _torch_fact("torch.__version__"),
        "nvcc": release[0] if release else "",
        "python": platform.python_version(),
        "commit": _said("git", "describe", "--always", "--dirty").strip() or "not known here",
        "date": time.strftime("%Y-%m-%d"),
    }


def main() -> None:
    began = time.monotonic()
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "gpu_check")
    parser.add_argument("--only", default=",".join(USUAL), help="parts, separated by commas")
    parser.add_argument("--wheels", type=Path, default=ROOT / "wheels", help="folder of wheels")
    parser.add_argument("--minutes", type=float, default=12, help="for all parts together")
    parser.add_argument("--rehearse", action="store_true", help="without a GPU, as far as it goes")
    options = parser.parse_args()
    chosen = options.only.split(",")
    if unknown := [part for part in chosen if part not in PARTS]:
        parser.error(f"no part {', '.join(unknown)}; there are {', '.join(PARTS)}")
    seconds = options.minutes * 60 * (10 if options.rehearse else 1)
    options.out.mkdir(parents=True, exist_ok=True)
    _find_toolkit()
    if not options.rehearse and _torch_fact("torch.cuda.is_available()") != "True":
        raise SystemExit("gpu-check: torch sees no GPU here; --rehearse goes as far as that allows")

    facts = machine(options.rehearse)
    check = Check(options.out.resolve(), options.rehearse, options.wheels, facts, deadline=began)
    check.log(json.dumps(facts))
    for part in chosen:
        check.deadline += seconds * SECONDS[part] / sum(SECONDS[name] for name in chosen)
        try:
            PARTS[part](check)
        except (Exception, SystemExit) as error:
            check.add(Step(part, "failed", 0, f"{type(error).__name__}: {error}"))
    check.log(
        "\n"
        + "\n".join(f"{s.outcome:12} {s.seconds:7} s  {s.name}: {s.detail}" for s in check.steps)
    )
    bad = {"failed", "out of time", *([] if options.rehearse else ["none ran"])}
    if any(step.outcome in bad for step in check.steps):
        raise SystemExit(1)


def _find_toolkit() -> None:
    """nvcc and compute-sanitizer are often installed, but not on PATH."""
    homes = [os.environ.get("CUDA_HOME", ""), "/usr/local/cuda"]
    folders = [str(Path(home, "bin")) for home in homes if home and Path(home, "bin").is_dir()]
    os.environ["PATH"] = os.pathsep.join([os.environ.get("PATH", os.defpath), *folders])


if __name__ == "__main__":
    main()
