"""Optional packages that a test needs."""

from __future__ import annotations

import importlib.util
import sys
from types import ModuleType

import pytest
import torch

_missing_ops: list[torch.library.Library] = []


def package(name: str) -> ModuleType:
    """Import an optional package, or skip.

    torchvision's wheels are linked against a CUDA build of torch. Beside a CPU build its compiled
    part is left out, and with it the definitions of two ops that its Python part refers to.
    Defined here without kernels, they let the networks, which do not use them, be imported.
    """
    if importlib.util.find_spec("torchvision") and "torchvision" not in sys.modules:
        try:
            import torchvision  # noqa: F401  (does it load?)
        except RuntimeError:
            for module in [key for key in sys.modules if key.partition(".")[0] == "torchvision"]:
                del sys.modules[module]
            library = torch.library.Library("torchvision", "DEF")
            for op in ("nms", "qnms"):
                library.define(f"{op}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
            _missing_ops.append(library)
    return pytest.importorskip(name, reason=f"needs {name}, which is optional")
