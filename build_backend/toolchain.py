"""Find the compilers: what can be built on this machine, and if not, why not."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from dataclasses import dataclass
from pathlib import Path

# sm_80 serves every Ampere and Ada GPU, sm_90 Hopper; the PTX serves what came after.
_DEFAULT_CUDA_ARCHITECTURES = "8.0;9.0+PTX"


class UnavailableError(Exception):
    """A part of the library cannot be built here; the message is the reason, in one line."""


@dataclass(frozen=True)
class Torch:
    """Where the headers and libraries of the installed torch are."""

    version: str
    cuda_version: str | None
    include: Path
    lib: Path

    @classmethod
    def find(cls) -> Torch:
        try:
            import torch
        except ImportError as error:
            raise UnavailableError(
                f"torch cannot be imported ({error}); install torch first"
            ) from error
        root = Path(torch.__file__).parent
        if not (root / "include/torch/csrc/stable/library.h").exists():
            raise UnavailableError(
                f"torch {torch.__version__} has no stable-ABI headers; 2.11 has them"
            )
        return cls(torch.__version__, torch.version.cuda, root / "include", root / "lib")


@dataclass(frozen=True)
class Compiler:
    """A C++ compiler that has been seen to compile a file with the headers we need."""

    driver: tuple[str, ...]
    launcher: tuple[str, ...] = ()  # ccache

    @property
    def command(self) -> tuple[str, ...]:
        return (*self.launcher, *self.driver)

    @classmethod
    def find(cls, flags: list[str]) -> Compiler:
        """Take $CXX, else the first of c++, g++, clang++; behind ccache when it is installed."""
        if sys.platform == "win32":
            raise UnavailableError("the kernels are not ported to Windows compilers")
        chosen = os.environ.get("CXX")
        names = [chosen] if chosen else ["c++", "g++", "clang++"]
        words = next((w for w in map(shlex.split, names) if w and shutil.which(w[0])), None)
        if words is None:
            raise UnavailableError(f"no C++ compiler found (looked for {', '.join(names)})")
        if "ccache" in Path(words[0]).name and len(words) > 1:
            compiler = cls(tuple(words[1:]), launcher=(words[0],))
        else:
            compiler = cls(tuple(words), launcher=("ccache",) if shutil.which("ccache") else ())
        probe = "#include <Python.h>\n#include <torch/headeronly/version.h>\nint probe;\n"
        _compile_probe([*compiler.command, *flags], probe, ".cpp")
        return compiler


@dataclass(frozen=True)
class Cuda:
    """A CUDA toolkit whose major version is that of torch."""

    nvcc: Path
    include: Path
    lib: Path
    architectures: tuple[str, ...]  # nvcc -gencode flags

    @classmethod
    def find(cls, torch: Torch, flags: list[str]) -> Cuda:
        """Look for a toolkit; a GPU need not be present."""
        if torch.cuda_version is None:
            raise UnavailableError(f"torch {torch.version} is built without CUDA")
        root = _cuda_root()
        nvcc = root / "bin" / "nvcc"
        release = re.search(r"release (\d+)\.(\d+)", _output([str(nvcc), "--version"]))
        if release is None:
            raise UnavailableError(f"{nvcc} --version names no release")
        if release[1] != torch.cuda_version.split(".")[0]:
            raise UnavailableError(
                f"nvcc is CUDA {release[1]}.{release[2]} but torch was built "
                f"with CUDA {torch.cuda_version}"
            )
        include = _folder_with("cuda_runtime.h", root, "include", "targets/*/include")
        lib = _folder_with("libcudart.so", root, "lib64", "lib", "targets/*/lib")
        probe = "#include <cuda_runtime.h>\n__global__ void probe() {}\n"
        _compile_probe([str(nvcc), *flags], probe, ".cu")
        return cls(nvcc, include, lib, tuple(architecture_flags()))


def _cuda_root() -> Path:
    """The toolkit's own folder: the nvcc on PATH may be a wrapper far from the headers."""
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    nvcc = str(Path(home) / "bin" / "nvcc") if home else shutil.which("nvcc")
    if nvcc is None:
        default = Path("/usr/local/cuda/bin/nvcc")
        nvcc = str(default) if default.exists() else None
    if nvcc is None or not Path(nvcc).exists():
        where = f"CUDA_HOME={home} has no bin/nvcc" if home else "nvcc is not on PATH"
        raise UnavailableError(f"no CUDA toolkit found ({where})")
    top = re.search(r"^#\$ TOP=(.+)$", _output([nvcc, "-dryrun", "x.cu"]), re.MULTILINE)
    if top is None:
        raise UnavailableError(f"{nvcc} -dryrun does not say where its toolkit is")
    return Path(top[1].strip()).resolve()


def architecture_flags() -> list[str]:
    """Read TORCH_CUDA_ARCH_LIST ("8.0;9.0+PTX") as nvcc -gencode flags.

    Hopper is compiled for as sm_90a, which has instructions of its own (csrc/cuda/hopper.cuh).
    """
    listed = os.environ.get("TORCH_CUDA_ARCH_LIST") or _DEFAULT_CUDA_ARCHITECTURES
    flags = []
    for name in listed.replace(" ", ";").split(";"):
        match = re.fullmatch(r"(\d+)\.(\d+[af]?)(\+PTX)?", name)
        if match is None:
            raise UnavailableError(f"TORCH_CUDA_ARCH_LIST: {name!r} is not like 8.0 or 9.0+PTX")
        number = match[1] + match[2]
        own = "90a" if number == "90" else number
        flags.append(f"-gencode=arch=compute_{own},code=sm_{own}")
        if match[3]:
            flags.append(f"-gencode=arch=compute_{number},code=compute_{number}")
    return flags


def python_include() -> list[str]:
    paths = sysconfig.get_paths()
    return list(dict.fromkeys([paths["include"], paths["platinclude"]]))


def pybind11_include() -> str:
    try:
        import pybind11
    except ImportError:
        raise UnavailableError("pybind11 is not installed (pip install pybind11)") from None
    return pybind11.get_include()


def _folder_with(name: str, root: Path, *patterns: str) -> Path:
    for pattern in patterns:
        for folder in root.glob(pattern):
            if (folder / name).exists():
                return folder
    raise UnavailableError(f"the CUDA toolkit in {root} has no {name}")


def _output(command: list[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.stdout + done.stderr


def _compile_probe(command: list[str], source: str, suffix: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"probe{suffix}"
        path.write_text(source)
        done = subprocess.run(
            [*command, "-c", str(path), "-o", str(path.with_suffix(".o"))],
            capture_output=True, text=True, check=False,
        )  # fmt: skip
    if done.returncode != 0:
        lines = (done.stdout + done.stderr).strip().splitlines() or ["no message"]
        reason = next((line for line in lines if "error" in line), lines[0])
        raise UnavailableError(
            f"{shlex.join(command[:2])} cannot compile a probe: {reason.strip()}"
        )
