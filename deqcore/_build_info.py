"""What this installation of deqcore consists of: `build_info()` and `python -m deqcore`."""

from __future__ import annotations

import platform
from typing import Any

import torch

from deqcore import _kernels
from deqcore._version import __version__


def build_info() -> dict[str, Any]:
    """Say which kernels run here, how they were built, and why others are missing.

    Returns:
        A dictionary that json can write:

        - `version`, `python`, `torch`: versions; `torch` is the one that runs.
        - `kernels`: `{"cpu": bool, "cuda": bool}`, what is loaded.
        - `missing`: the reason for each `False` in `kernels`.
        - `mode`: DEQCORE_KERNELS, as read at import.
        - `isa`: the instruction set chosen for the CPU kernels, `isas`: those built.
        - `compiler`, `cxx_standard`, `flags`, `built_for_torch`: of the CPU kernels; None without.
        - `parallel`, `threads`: what spreads the CPU kernels over threads.
        - `cuda_flags`: of the CUDA kernels; None without.
    """
    cpu = _kernels.loaded.get("cpu", {})
    cuda = _kernels.loaded.get("cuda", {})
    return {
        "version": __version__,
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "kernels": {part: part in _kernels.loaded for part in ("cpu", "cuda")},
        "missing": dict(_kernels.missing),
        "mode": _kernels.KERNELS_MODE,
        "isa": cpu.get("isa"),
        "isas": list(cpu.get("isas", ())),
        "compiler": cpu.get("compiler"),
        "cxx_standard": cpu.get("cxx_standard"),
        "flags": cpu.get("flags"),
        "built_for_torch": cpu.get("torch"),
        # The kernels call torch's parallel_for, which lives in libtorch: its OpenMP is theirs.
        "parallel": "OpenMP (torch)" if torch.backends.openmp.is_available() else "native (torch)",
        "threads": torch.get_num_threads(),
        "cuda_flags": cuda.get("flags"),
    }


def format_build_info(info: dict[str, Any]) -> str:
    """Write build_info() as aligned lines for people."""
    rows = [
        ("deqcore", info["version"]),
        ("python", info["python"]),
        ("torch", info["torch"]),
        ("kernels", f"DEQCORE_KERNELS={info['mode']}"),
        *((f"  {part}", _state(info, part)) for part in info["kernels"]),
    ]
    if info["kernels"]["cpu"]:
        others = ", ".join(info["isas"])
        rows += [
            ("instruction set", f"{info['isa']} (built: {others}; DEQCORE_CPU_ISA chooses)"),
            ("threads", f"{info['threads']}, {info['parallel']}"),
            ("compiler", f"{info['compiler']}, C++{info['cxx_standard'] // 100 % 100}"),
            ("flags", info["flags"]),
            ("built for torch", f"{info['built_for_torch']} (stable ABI: runs on 2.11 and later)"),
        ]
    if info["kernels"]["cuda"]:
        rows.append(("CUDA flags", info["cuda_flags"]))
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"{name:<{width}}  {value}" for name, value in rows)


def _state(info: dict[str, Any], part: str) -> str:
    return "yes" if info["kernels"][part] else f"no: {info['missing'][part]}"
