"""Compile the CUDA kernels and say what they cost; build the whole extension; both without a GPU.

    python tools/cuda_build.py --only kernels     # nvcc alone, for what has changed
    python tools/cuda_build.py                    # and the extension, against a CUDA build of torch

Kernels are compiled for each architecture with the assembler's report, printed as a table, beside
the loads and stores of global memory in nvcc's PTX: bytes of one x places in the code. A register
that spills, or an array in local memory (a stack frame), fails the build: every kernel
here is a hot one. The extension is built for the same architectures and PTX in a virtual
environment of its own (6 GB, made when missing), imported, and asked for each op's CUDA kernel.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "build_backend"))

from graph import Graph

BUILD_PACKAGES = ("setuptools>=77.0.3", "ninja", "pybind11>=3")
ARCHITECTURES = ("80", "90")
FLAGS = [
    "-std=c++20",
    "-O3",
    "-DNDEBUG",
    "-Icsrc",
    "-Xptxas=-v,-warn-spills",
    "-Werror=all-warnings",
]
OPS = (
    *("anderson_step", "broyden_step"),
    *("masked_linear", "masked_outer", "masked_to_dense", "masked_from_dense", "masked_two_four"),
)

_ENTRY = re.compile(
    r"Compiling entry function '(?P<name>\w+)' for 'sm_(?P<architecture>\w+)'.*?"
    r"(?P<stack>\d+) bytes stack frame, (?P<stores>\d+) bytes spill stores, "
    r"(?P<loads>\d+) bytes spill loads.*?Used (?P<registers>\d+) registers(?P<rest>[^\n]*)",
    re.DOTALL,
)
_ACCESS = re.compile(r"\b(ld|st)\.global[.\w:]*?(?:\.v(\d))?\.[busf](\d+) ")


@dataclass(frozen=True)
class Kernel:
    """What the assembler says about one kernel."""

    name: str
    architecture: str
    registers: int
    static_shared: int  # bytes; dynamic shared memory is the launch's affair
    stack: int  # bytes of local memory
    spills: int  # bytes stored and loaded
    loads: str = ""  # of global memory: "16x8 4x2" is 8 places that load 16 bytes, and 2 of 4
    stores: str = ""

    @property
    def fine(self) -> bool:
        return self.stack == 0 and self.spills == 0


def read_report(text: str, ptx: str = "") -> list[Kernel]:
    """The kernels in what nvcc printed with -Xptxas -v, and in its PTX."""
    found = [match.groupdict() for match in _ENTRY.finditer(text)]
    accesses = read_accesses(ptx)
    names = _demangle([entry["name"] for entry in found])
    kernels = []
    for entry, name in zip(found, names, strict=True):
        shared = re.search(r"(\d+) bytes smem", entry["rest"])
        kernels.append(
            Kernel(
                name=name,
                architecture=f"sm_{entry['architecture']}",
                registers=int(entry["registers"]),
                static_shared=int(shared[1]) if shared else 0,
                stack=int(entry["stack"]),
                spills=int(entry["stores"]) + int(entry["loads"]),
                **accesses.get(entry["name"], {}),
            )
        )
    return kernels


def read_accesses(ptx: str) -> dict[str, dict[str, str]]:
    """Loads and stores of global memory in each kernel of a PTX text, as Kernel has them."""
    found = {}
    for part in ptx.split(".entry ")[1:]:
        counts: dict[str, Counter[int]] = {"ld": Counter(), "st": Counter()}
        for kind, many, bits in _ACCESS.findall(part):
            counts[kind][int(many or 1) * int(bits) // 8] += 1
        told = [" ".join(f"{n}x{c[n]}" for n in sorted(c, reverse=True)) for c in counts.values()]
        found[part.split("(")[0].strip()] = dict(zip(("loads", "stores"), told, strict=True))
    return found


def ptx_of(compiled: Path) -> str:
    """The PTX in an object file that was compiled with --no-compress."""
    content = compiled.read_bytes()
    begin = max(0, content.find(b".version"))
    return content[begin : content.find(b"\0", begin)].decode(errors="replace")


def _demangle(names: list[str]) -> list[str]:
    if not names or shutil.which("c++filt") is None:
        return names
    done = subprocess.run(
        ["c++filt"], input="\n".join(names), capture_output=True, text=True, check=True
    )
    return [short_name(name) for name in done.stdout.splitlines()]


def short_name(name: str) -> str:
    """Without return type, namespaces and parameters."""
    name = name.replace("(anonymous namespace)::", "").removeprefix("void ")
    name = re.sub(r"\((deqcore|CUtensorMap).*|\((unsigned )?(long|int).*", "", name)
    return re.sub(r"deqcore::(cuda::)?", "", name)


def compile_kernels(architectures: Iterable[str], jobs: int | None) -> list[Kernel]:
    """Compile every csrc/cuda/*.cu for every architecture, but for what has not changed."""
    graph = Graph(Path("build", "cuda_kernels"))
    nvcc = ["ccache", "nvcc"] if shutil.which("ccache") else ["nvcc"]
    objects = []
    for source in sorted((ROOT / "csrc" / "cuda").glob("*.cu")):
        for number in architectures:
            own = "90a" if number == "90" else number  # as the extension is built
            gencode = f"-gencode=arch=compute_{own},code=[sm_{own},compute_{own}]"
            name = f"{source.stem}.{own}.o"
            command = [*nvcc, *FLAGS, "--no-compress", gencode]
            objects.append(graph.compile(source.relative_to(ROOT), name, command, keep_report=True))
    compiled = graph.build(ROOT, jobs, keep_going=True)
    kernels: list[Kernel] = []
    for path in objects:
        made = ROOT / path
        ptx = ptx_of(made) if made.exists() else ""
        found = read_report((ROOT / f"{path}.txt").read_text(), ptx)
        # A spill is a warning and so an error, which the table shows; anything else ends here.
        if not compiled and not found:
            raise SystemExit(f"{path} does not compile (above)")
        kernels += found
    return kernels


def print_table(kernels: list[Kernel]) -> None:
    width = max(len(kernel.name) for kernel in kernels)
    print(f"{'kernel':{width}}  arch    registers  shared  stack  spills  loads; stores")
    for k in kernels:
        mark = "" if k.fine else "  <- fails"
        print(
            f"{k.name:{width}}  {k.architecture:6}  {k.registers:9}  {k.static_shared:6}  "
            f"{k.stack:5}  {k.spills:6}  {k.loads}; {k.stores}{mark}"
        )


def check_kernels(architectures: Iterable[str], jobs: int | None) -> dict[str, object]:
    began = time.monotonic()
    kernels = compile_kernels(architectures, jobs)
    print_table(kernels)
    bad = [kernel for kernel in kernels if not kernel.fine]
    seconds = round(time.monotonic() - began, 1)
    print(f"{len(kernels)} kernels in {seconds} s; {len(bad)} spill or use local memory")
    return {"kernels": [asdict(k) for k in kernels], "seconds": seconds, "passed": not bad}


_IMPORT = """
import json, torch, deqcore
from deqcore import _kernels
has = {op: torch._C._dispatch_has_kernel_for_dispatch_key(f"deqcore::{op}", "CUDA") for op in OPS}
print(json.dumps({"torch": torch.__version__, "cuda": torch.version.cuda,
                  "gpu": torch.cuda.is_available(), "loaded": sorted(_kernels.loaded),
                  "missing": _kernels.missing, "kernels": has}))
"""


def check_extension(venv: Path, torch: str, architectures: Iterable[str]) -> dict[str, object]:
    """Build everything into the environment, import it, and look the kernels up."""
    python = venv / "bin" / "python"
    if not python.exists():
        _run(sys.executable, "-m", "venv", venv)
    if subprocess.run([python, "-c", "import torch"], check=False, capture_output=True).returncode:
        _run(python, "-m", "pip", "install", "-q", torch, "numpy", *BUILD_PACKAGES)
    numbers = [f"{number[:-1]}.{number[-1]}" for number in architectures]
    environment = {
        **os.environ,
        "DEQCORE_BUILD": "cuda",
        "TORCH_CUDA_ARCH_LIST": ";".join(numbers) + "+PTX",
    }
    install = [
        "-m",
        "pip",
        "install",
        "--no-build-isolation",
        "--no-deps",
        "--force-reinstall",
        "-q",
    ]
    _run(python, *install, ROOT, env=environment)
    with tempfile.TemporaryDirectory() as elsewhere:  # not the sources in this folder
        done = subprocess.run(
            [python, "-c", f"OPS = {OPS!r}\n{_IMPORT}"],
            cwd=elsewhere, capture_output=True, text=True, check=False,
        )  # fmt: skip
    if done.returncode:
        raise SystemExit(f"the extension does not import:\n{done.stderr}")
    facts = json.loads(done.stdout)
    facts["passed"] = "cuda" in facts["loaded"] and all(facts["kernels"].values())
    print(f"torch {facts['torch']} (CUDA {facts['cuda']}), GPU present: {facts['gpu']}")
    for op, there in facts["kernels"].items():
        print(f"deqcore::{op}: {'a CUDA kernel' if there else 'NO CUDA kernel'} in the dispatcher")
    if facts["missing"]:
        print(f"missing: {facts['missing']}")
    return facts


def _run(*command: object, env: dict[str, str] | None = None) -> None:
    print("$", *command, flush=True)
    subprocess.run([str(word) for word in command], check=True, env=env)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--only", choices=["kernels", "extension"])
    parser.add_argument("--architectures", nargs="+", default=ARCHITECTURES, metavar="90")
    parser.add_argument("--venv", type=Path, default=ROOT / ".venv-cuda")
    parser.add_argument("--torch", default="torch==2.14.1", help="what pip installs into it")
    parser.add_argument("--jobs", type=int, help="as many as there are processors if not said")
    parser.add_argument("--json", type=Path, help="write the results here")
    options = parser.parse_args()
    if shutil.which("nvcc") is None:
        raise SystemExit("nvcc is not on PATH: the CUDA kernels cannot be compiled here")
    results = {}
    if options.only != "extension":
        results["kernels"] = check_kernels(options.architectures, options.jobs)
    if options.only != "kernels":
        results["extension"] = check_extension(options.venv, options.torch, options.architectures)
    if options.json:
        options.json.write_text(json.dumps(results, indent=1) + "\n")
    if not all(part["passed"] for part in results.values()):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
