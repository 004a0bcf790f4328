from __future__ import annotations

import pytest

from deqcore import _kernels


@pytest.fixture
def kernels_only() -> None:
    """For what the compiled kernels promise and a dense reference cannot."""
    if not _kernels.CPU_KERNELS:
        pytest.skip("the pure-PyTorch reference runs")
