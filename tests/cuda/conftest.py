"""The CUDA kernels, compiled as host code once for each session."""

from __future__ import annotations

from pathlib import Path

import pytest

from tools import emulation


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
