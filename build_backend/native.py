"""Build deqcore._C and deqcore._cuda: which files, with which flags, in which order.

torch's own BuildExtension gives every file of an extension the same flags; here a kernel is
compiled once per instruction set, and only the bindings see torch's headers.
"""

from __future__ import annotations

import os
import platform
import runpy
import shlex
import subprocess
import sys
import sysconfig
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from setuptools import Extension
from setuptools.command.build_ext import build_ext
from toolchain import Compiler, Cuda, Torch, UnavailableError, python_include

# What each DEQCORE_BUILD does about each part.
_POLICIES = {
    "auto": {"cpu": "try", "cuda": "try"},
    "cpu": {"cpu": "must", "cuda": "skip"},
    "cuda": {"cpu": "must", "cuda": "must"},
    "none": {"cpu": "skip", "cuda": "skip"},
}
BUILD_CHOICES = tuple(_POLICIES)

# The oldest torch whose stable ABI the bindings use; the binary runs on any later one. Not for
# module.cpp: the pybind11 that torch 2.11 ships refuses to be included when this is defined.
_TORCH_TARGET = "-DTORCH_TARGET_VERSION=0x020b000000000000"

# One decision about contraction for all instruction sets: none, so that they agree; a kernel that
# wants a fused multiply-add says so (multiply_add in cpu/isa.h).
_ARITHMETIC = ["-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math"]
_COMMON = ["-std=c++20", "-O3", "-g0", "-DNDEBUG", "-fPIC", "-fvisibility=hidden", *_ARITHMETIC]
_WARNINGS = ["-Wall", "-Wextra"]

_AVX2 = ["-mavx2", "-mfma", "-mf16c"]
_AVX512 = [
    *["-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq"],
    *["-mfma", "-mf16c", "-mprefer-vector-width=512"],
]


def isa_flags() -> dict[str, list[str]]:
    """Flags of each instruction set a kernel is compiled for on this machine, widest last."""
    if platform.machine().lower() in ("x86_64", "amd64"):
        return {"portable": [], "avx2": _AVX2, "avx512": _AVX512}
    return {"portable": []}


@dataclass(frozen=True)
class Unit:
    """One compilation: a source with its flags, into one object."""

    source: Path
    name: str  # the object, below the temporary folder
    command: tuple[str, ...]


@dataclass
class Plan:
    """What will be built, and why the rest is not."""

    extensions: list[NativeExtension] = field(default_factory=list)
    left_out: dict[str, str] = field(default_factory=dict)  # "cpu" or "cuda" -> reason


class NativeExtension(Extension):
    """An extension whose objects and link command are decided here, not by distutils."""

    def __init__(
        self, name: str, units: list[Unit], linker: tuple[str, ...], libraries: list[str]
    ) -> None:
        super().__init__(name, sources=sorted({str(unit.source) for unit in units}))
        self.units = units
        self.linker = linker
        self.link_flags = libraries


def make_plan(choice: str) -> Plan:
    """Decide what to build for DEQCORE_BUILD=choice; SystemExit if what was asked for cannot be."""
    plan = Plan()
    makers = {"cpu": _cpu_extension, "cuda": _cuda_extension}
    for part, policy in _POLICIES[choice].items():
        if part == "cuda" and policy != "must" and not _files("csrc/cuda", "*.cu"):
            continue
        if policy == "skip":
            plan.left_out[part] = f"built with DEQCORE_BUILD={choice}"
            continue
        try:
            plan.extensions.append(makers[part]())
        except UnavailableError as reason:
            if policy == "must":
                raise SystemExit(f"deqcore: DEQCORE_BUILD={choice}, but {reason}") from None
            plan.left_out[part] = str(reason)
            sys.stderr.write(f"deqcore: left out the {part.upper()} kernels: {reason}\n")
    return plan


def _cpu_extension() -> NativeExtension:
    torch = Torch.find()
    compiler, with_torch = _command_with_torch(torch)
    binding = (*with_torch, _TORCH_TARGET)
    kernel = [*compiler.command, *_COMMON, *_WARNINGS, "-fopenmp-simd", "-Icsrc", *_user_flags()]
    kernels = _files("csrc/cpu", "*_kernel.cpp")
    others = [path for path in _files("csrc/cpu", "*.cpp") if path not in kernels]

    units = _module_units(with_torch, "cpu", shlex.join([*_COMMON, *_user_flags()]))
    units += [Unit(path, f"cpu/{path.stem}.o", binding) for path in others]
    # The order matters. An inline function of the standard library that two objects both emit is
    # kept from the first: portable code must come before code that only some processors can run.
    for isa, flags in isa_flags().items():
        command = (*kernel, *flags, f"-DDEQCORE_ISA={isa}")
        units += [Unit(path, f"cpu/{path.stem}.{isa}.o", command) for path in kernels]
    return NativeExtension("deqcore._C", units, compiler.driver, _link_flags(torch))


def _cuda_extension() -> NativeExtension:
    sources = _files("csrc/cuda", "*.cu")
    bindings = _files("csrc/cuda", "*.cpp")
    if not sources:
        raise UnavailableError("this version has no CUDA kernels (csrc/cuda/*.cu)")
    torch = Torch.find()
    compiler, with_torch = _command_with_torch(torch)
    device = ["-std=c++20", "-O3", "-DNDEBUG", "-Icsrc", "-Xcompiler=-fPIC,-fvisibility=hidden"]
    if "CXX" in os.environ:
        device += ["-ccbin", compiler.driver[0]]
    cuda = Cuda.find(torch, device)
    binding = (*with_torch, _TORCH_TARGET, "-DUSE_CUDA", f"-isystem{cuda.include}")
    user = shlex.split(os.environ.get("NVCC_FLAGS", ""))
    device = [str(cuda.nvcc), *device, *cuda.architectures, *user]

    module = [*with_torch, "-DDEQCORE_CUDA_MODULE"]
    units = _module_units(module, "cuda", shlex.join(device[1:]))
    units += [Unit(path, f"cuda/{path.stem}.cpp.o", binding) for path in bindings]
    units += [Unit(path, f"cuda/{path.stem}.cu.o", tuple(device)) for path in sources]
    # No run path: torch has loaded its own libcudart by the time the extension is imported.
    libraries = [f"-L{cuda.lib}", "-ltorch_cuda", "-lc10_cuda", "-lcudart"]
    return NativeExtension("deqcore._cuda", units, compiler.driver, _link_flags(torch, *libraries))


def _command_with_torch(torch: Torch) -> tuple[Compiler, list[str]]:
    """The command for a file that sees Python's and torch's headers."""
    system = [f"-isystem{path}" for path in [str(torch.include), *python_include()]]
    flags = [*_COMMON, *_WARNINGS, "-Icsrc", *system, *_user_flags()]
    compiler = Compiler.find(flags)
    return compiler, [*compiler.command, *flags]


def _module_units(command: list[str], part: str, flags: str) -> list[Unit]:
    name = {"cpu": "_C", "cuda": "_cuda"}[part]
    isas = ",".join(isa_flags())
    facts = {"DEQCORE_MODULE": name, "DEQCORE_FLAGS": f'"{flags}"', "DEQCORE_ISAS": f'"{isas}"'}
    defines = [f"-D{key}={value}" for key, value in facts.items()]
    sources = f'-DDEQCORE_SOURCES="{_digest(Path("csrc"), part)}"'
    return [
        Unit(Path("csrc/module.cpp"), f"module.{name}.o", (*command, *defines)),
        Unit(Path("csrc/sources.cpp"), f"sources.{name}.o", (*command, sources)),
    ]


def _digest(csrc: Path, part: str) -> str:
    """As the package computes it, which cannot be imported while it is built."""
    digest: Callable[[Path, str], str] = runpy.run_path("deqcore/_sources.py")["digest"]
    return digest(csrc, part)


def _link_flags(torch: Torch, *libraries: str) -> list[str]:
    shared = ["-shared", "-Wl,-s"]
    if sys.platform == "darwin":
        shared = ["-bundle", "-undefined", "dynamic_lookup", "-Wl,-x"]
    extra = shlex.split(os.environ.get("LDFLAGS", ""))
    return [*shared, f"-L{torch.lib}", *libraries, "-ltorch_cpu", "-lc10", *extra]


def _user_flags() -> list[str]:
    return shlex.split(os.environ.get("CXXFLAGS", ""))


def _files(folder: str, *patterns: str) -> list[Path]:
    return sorted(path for pattern in patterns for path in Path(folder).glob(pattern))


class BuildNative(build_ext):
    """Compile what changed, several files at a time, then link."""

    def build_extension(self, ext: NativeExtension) -> None:
        # Not self.build_temp: an editable install gives a folder that is thrown away.
        folder = Path("build", f"native.{sysconfig.get_platform()}-{sys.implementation.cache_tag}")
        jobs = int(os.environ.get("MAX_JOBS", 0)) or _processors()
        with ThreadPoolExecutor(jobs) as pool:
            objects = list(pool.map(lambda unit: _compile(unit, folder), ext.units))
        target = Path(self.get_ext_fullpath(ext.name))
        target.parent.mkdir(parents=True, exist_ok=True)
        command = [*ext.linker, *map(str, objects), *ext.link_flags, "-o", str(target)]
        _run(command, f"link {target.name}")


def _processors() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _compile(unit: Unit, folder: Path) -> Path:
    target = folder / unit.name
    if _is_fresh(unit, target):
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    record = target.with_suffix(".cmd")
    record.unlink(missing_ok=True)
    # -MD, not -MMD: another torch or compiler in the same place must be noticed too.
    command = [*unit.command, "-MD", "-MF", str(target.with_suffix(".d"))]
    _run([*command, "-c", str(unit.source), "-o", str(target)], f"compile {unit.name}")
    record.write_text(shlex.join(unit.command))
    return target


def _is_fresh(unit: Unit, target: Path) -> bool:
    """True if the object was made by this very command from files that have not changed since."""
    record, depfile = target.with_suffix(".cmd"), target.with_suffix(".d")
    if not (target.exists() and record.exists() and depfile.exists()):
        return False
    if record.read_text() != shlex.join(unit.command):
        return False
    prerequisites = depfile.read_text().replace("\\\n", " ").split(":", 1)[1].split()
    made = target.stat().st_mtime_ns
    return all(Path(p).exists() and Path(p).stat().st_mtime_ns < made for p in prerequisites)


def _run(command: list[str], what: str) -> None:
    sys.stderr.write(f"deqcore: {what}\n")  # one write, since several threads say this
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    messages = (done.stdout + done.stderr).strip()
    if done.returncode != 0:
        raise SystemExit(
            f"deqcore: {shlex.join(command)}\n{messages}\ndeqcore: {what} failed (above). "
            "DEQCORE_BUILD=none installs the library without compiled kernels."
        )
    if messages:
        print(messages, file=sys.stderr)
