from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from deqcore import _kernels


@pytest.fixture
def kernels_only() -> None:
    """For what the compiled kernels promise and a dense reference cannot."""
    if not _kernels.CPU_KERNELS:
        pytest.skip("the pure-PyTorch reference runs")


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """The problems are so small that waking threads would take most of the time."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
