"""The CUDA kernels, compiled as host code once for each session."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support.captured_layers import Gpu, captured_here
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
    """A GPU, and the CPU with tapes in place of its graphs."""
    on_host = request.param == "host"
    device = torch.device("cpu") if on_host else request.getfixturevalue("cuda_device")
    gpu = Gpu(device)
    captured_here(gpu, monkeypatch.setattr)
    return gpu
