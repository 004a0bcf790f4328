"""Load the compiled kernels, or say why they are not there.

Importing deqcore._C registers the CPU kernels with torch's dispatcher, deqcore._cuda the CUDA
kernels. DEQCORE_KERNELS, read once at import, decides: `auto` (the default) loads what is
installed, `reference` loads nothing, so that the pure-PyTorch references run, and `require` fails
when kernels are missing.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
import warnings
from pathlib import Path
from typing import Any

import torch  # the extensions use libraries that torch loads

from deqcore._sources import digest

_MODES = ("auto", "reference", "require")
_MODULES = {"cpu": "deqcore._C", "cuda": "deqcore._cuda"}

KERNELS_MODE: str = os.environ.get("DEQCORE_KERNELS") or "auto"
if KERNELS_MODE not in _MODES:
    raise ImportError(f"DEQCORE_KERNELS={KERNELS_MODE!r} is unknown; use {', '.join(_MODES)}")

# Facts about each loaded extension, its module, and the reason for each missing one, by "cpu" and
# "cuda".
loaded: dict[str, dict[str, Any]] = {}
modules: dict[str, Any] = {}
missing: dict[str, str] = {}


def load() -> None:
    """Load the extensions that DEQCORE_KERNELS allows; a second call does nothing.

    Raises:
        ImportError: with DEQCORE_KERNELS=require, if kernels for this machine are missing.
        RuntimeError: if DEQCORE_CPU_ISA is unknown or names a set that this processor lacks.
    """
    if loaded or missing:
        return
    left_out = _left_out_of_the_build()
    for part, name in _MODULES.items():
        if KERNELS_MODE == "reference":
            missing[part] = "DEQCORE_KERNELS=reference"
        elif part == "cuda" and "cpu" in missing:
            missing[part] = "the CPU kernels are missing"
        elif importlib.util.find_spec(name) is None:
            missing[part] = left_out.get(part, f"this version has no {part.upper()} kernels")
        else:
            _load_module(part, name)
    if KERNELS_MODE == "require":
        _require("cpu")
        if torch.cuda.is_available():
            _require("cuda")


def _load_module(part: str, name: str) -> None:
    try:
        module = importlib.import_module(name)
    except ImportError as error:
        missing[part] = f"{name} is installed but does not load: {error}"
        if KERNELS_MODE == "auto":
            warnings.warn(
                f"deqcore runs slowly, without its {part.upper()} kernels: {missing[part]}. "
                "Reinstall deqcore to build them for this torch.",
                RuntimeWarning,
                stacklevel=2,
            )
        return
    loaded[part] = module.build_info()  # raises if DEQCORE_CPU_ISA cannot be had
    modules[part] = module
    sources = Path(__file__).parent.parent / "csrc"  # there for an editable installation alone
    if sources.is_dir() and digest(sources, part) != loaded[part].get("sources"):
        warnings.warn(
            f"deqcore's {part.upper()} kernels were not built from the sources in {sources}, so "
            "that calls may fail; build them again: pip install -e .",
            RuntimeWarning,
            stacklevel=2,
        )


def _require(part: str) -> None:
    if part in missing:
        raise ImportError(
            f"DEQCORE_KERNELS=require, but the {part.upper()} kernels are missing: "
            f"{missing[part]}. Build them with: DEQCORE_BUILD={part} pip install ."
        )


def _left_out_of_the_build() -> dict[str, str]:
    """Read what the build left out, and why: written by setup.py."""
    package = Path(__file__).parent
    try:
        text = (package / "_built.json").read_text()
    except FileNotFoundError:  # `pip install .` builds a copy, but Python takes this folder first
        return {
            "cpu": f"the sources in {package.parent} were not built: run Python in another folder, "
            "where it finds what was installed, or pip install -e . here"
        }
    return dict(json.loads(text)["left_out"])


load()

CPU_KERNELS: bool = "cpu" in loaded
CUDA_KERNELS: bool = "cuda" in loaded
