"""The CUDA kernels, compiled as host code once for each session."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from deqcore import _checks, _layer_graphs
from tests.support.captured_layers import Gpu
from tests.support.tape import Taped
from tools import emulation
from tools.sectors import SectorCounter


def _built(flavour: str) -> Path:
    try:
        return emulation.build(flavour)
    except emulation.CompilerMissingError as reason:
        pytest.skip(str(reason))


@pytest.fixture(scope="session")
def emulator() -> emulation.Emulator:
    return emulation.Emulator(_built("library"))


@pytest.fixture(scope="session")
def address_program() -> Path:
    """Runs a case under AddressSanitizer and UndefinedBehaviorSanitizer."""
    return _built("address")


@pytest.fixture(scope="session")
def thread_program() -> Path:
    """Runs a case under ThreadSanitizer."""
    return _built("thread")


@pytest.fixture(scope="session")
def sector_counter() -> SectorCounter:
    """Counts the sectors that warps touch."""
    if shutil.which("addr2line") is None:
        pytest.skip("no addr2line (binutils)")
    return SectorCounter(_built("sectors"))


@pytest.fixture(params=["host", "graph"])
def gpu(request: Any, monkeypatch: pytest.MonkeyPatch) -> Gpu:
    make = _layer_graphs._recorder
    if request.param == "graph":
        gpu = Gpu(request.getfixturevalue("cuda_device"))
    else:
        gpu = Gpu(torch.device("cpu"))
        make = Taped
        monkeypatch.setattr(_layer_graphs, "_is_usable", lambda tensor: True)
        monkeypatch.setattr(_layer_graphs, "_stream", lambda device: 0)
        monkeypatch.setattr(_checks, "_free", lambda tensor: False)  # no look at a value

    def recorder() -> Any:
        gpu.recorders.append(make())
        return gpu.recorders[-1]

    monkeypatch.setattr(_layer_graphs, "_recorder", recorder)
    return gpu
