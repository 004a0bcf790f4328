"""Build deqcore._C and deqcore._cuda: which files, with which flags, in which order.

torch's own BuildExtension gives every file of an extension the same flags; here a kernel is
compiled once per instruction set, and only the bindings see torch's headers. What is planned here
ninja carries out (graph.py).
"""

from __future__ import annotations

import os
import platform
import runpy
import shlex
import shutil
import sys
import sysconfig
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from graph import Graph, find_ninja
from setuptools import Extension
from setuptools.command.build_ext import build_ext
from toolchain import (
    Compiler,
    Cuda,
    Torch,
    UnavailableError,
    pybind11_include,
    python_include,
)

# What each DEQCORE_BUILD does about each part.
_POLICIES = {
    "auto": {"cpu": "try", "cuda": "try"},
    "cpu": {"cpu": "must", "cuda": "skip"},
    "cuda": {"cpu": "must", "cuda": "must"},
    "none": {"cpu": "skip", "cuda": "skip"},
}
BUILD_CHOICES = tuple(_POLICIES)

# The oldest torch whose stable ABI the bindings use; the binary runs on any later one.
_TORCH_TARGET = "-DTORCH_TARGET_VERSION=0x020b000000000000"

# One decision about contraction for all instruction sets: none, so that they agree; a kernel that
# wants a fused multiply-add says so (multiply_add in cpu/simd.h).
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
    name: str  # the object, below the folder of the build
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

    def add_to(self, graph: Graph) -> Path:
        """What it is made of and how; where ninja will leave it."""
        objects = [graph.compile(unit.source, unit.name, unit.command) for unit in self.units]
        name = f"{self.name.rpartition('.')[2]}.so"
        return Path(graph.link(objects, name, self.linker, self.link_flags))


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
    find_ninja()
    compiler, headers = _compiler_for(torch)
    module = [*compiler.command, f"-isystem{pybind11_include()}", *headers]
    binding = (*compiler.command, *headers, _TORCH_TARGET)
    kernel = [*compiler.command, *_COMMON, *_WARNINGS, "-fopenmp-simd", "-Icsrc", *_user_flags()]
    kernels = _files("csrc/cpu", "*_kernel.cpp")
    others = [path for path in _files("csrc/cpu", "*.cpp") if path not in kernels]

    units = _module_units(module, "cpu", shlex.join([*_COMMON, *_user_flags()]))
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
    find_ninja()
    compiler, headers = _compiler_for(torch)
    module = [*compiler.command, f"-isystem{pybind11_include()}", *headers]
    device = ["-std=c++20", "-O3", "-DNDEBUG", "-Icsrc", "-Xcompiler=-fPIC,-fvisibility=hidden"]
    if "CXX" in os.environ:
        device += ["-ccbin", compiler.driver[0]]
    cuda = Cuda.find(torch, device)
    cuda_headers = f"-isystem{cuda.include}"
    binding = (*compiler.command, *headers, _TORCH_TARGET, "-DUSE_CUDA", cuda_headers)
    user = shlex.split(os.environ.get("NVCC_FLAGS", ""))
    hopper = any(flag.endswith("sm_90a") for flag in cuda.architectures)
    own = ["-DDEQCORE_SM90A"] if hopper else []  # the host then takes the paths of hopper.cuh
    device = [str(cuda.nvcc), *device, *cuda.architectures, *own, *user]

    module.append("-DDEQCORE_CUDA_MODULE")
    units = _module_units(module, "cuda", shlex.join(device[1:]))
    units += [Unit(path, f"cuda/{path.stem}.cpp.o", binding) for path in bindings]
    units += [Unit(path, f"cuda/{path.stem}.cu.o", tuple(device)) for path in sources]
    # No run path: torch has loaded its own libcudart by the time the extension is imported.
    libraries = [f"-L{cuda.lib}", "-ltorch_cuda", "-lc10_cuda", "-lcudart"]
    return NativeExtension("deqcore._cuda", units, compiler.driver, _link_flags(torch, *libraries))


def _compiler_for(torch: Torch) -> tuple[Compiler, list[str]]:
    """The compiler, and the flags of a file that sees Python's and torch's headers.

    Among torch's is a pybind11 of torch's choice: ours is to come before these flags.
    """
    system = [f"-isystem{path}" for path in [str(torch.include), *python_include()]]
    flags = [*_COMMON, *_WARNINGS, "-Icsrc", *system, *_user_flags()]
    return Compiler.find(flags), flags


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
    """Plan every extension into one build.ninja, run it, and put what it made in its place."""

    def build_extensions(self) -> None:
        # Not self.build_temp: an editable install gives a folder that is thrown away.
        graph = Graph(build_folder())
        made = [extension.add_to(graph) for extension in self.extensions]
        jobs = int(os.environ.get("MAX_JOBS", 0)) or None
        if not graph.build(Path.cwd(), jobs):
            raise SystemExit(
                "deqcore: the kernels do not compile (above). DEQCORE_BUILD=none installs the "
                "library without them."
            )
        for extension, path in zip(self.extensions, made, strict=True):
            target = Path(self.get_ext_fullpath(extension.name))
            target.parent.mkdir(parents=True, exist_ok=True)
            # At once: a process that has loaded the old one must not see it change.
            shutil.copy2(path, target.with_suffix(".new"))
            target.with_suffix(".new").replace(target)


def build_folder() -> Path:
    """Where objects are kept from build to build, for this interpreter."""
    return Path("build", f"native.{sysconfig.get_platform()}-{sys.implementation.cache_tag}")
