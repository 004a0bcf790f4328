"""Settings and fixtures of the whole suite."""

from __future__ import annotations

import os

import pytest
import torch
from hypothesis import HealthCheck, settings

# Their asserts say as much as those of the tests.
pytest.register_assert_rewrite("tests.support")

from tests.support.kernels import Kernels, named_kernels  # noqa: E402

_COMMON = {"deadline": None, "suppress_health_check": [HealthCheck.too_slow]}
settings.register_profile("ci", max_examples=25, derandomize=True, database=None, **_COMMON)
settings.register_profile("thorough", max_examples=400, **_COMMON)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))


def _cuda_device() -> torch.device:
    """The GPU; skips where there is none, and fails instead with REQUIRE_CUDA=1."""
    if torch.cuda.is_available():
        return torch.device("cuda")
    if os.environ.get("REQUIRE_CUDA") == "1":
        pytest.fail("REQUIRE_CUDA=1, but torch.cuda.is_available() is False")
    pytest.skip("no GPU")


@pytest.fixture
def cuda_device() -> torch.device:
    return _cuda_device()


_WITH_CUDA = torch.cuda.is_available() or os.environ.get("REQUIRE_CUDA") == "1"


@pytest.fixture(params=["cpu", "cuda"] if _WITH_CUDA else ["cpu"])
def device(request: pytest.FixtureRequest) -> torch.device:
    """Each device there is, in turn. A run on a GPU: REQUIRE_CUDA=1 pytest -k cuda."""
    return _cuda_device() if request.param == "cuda" else torch.device("cpu")


_ON_THE_HOST = ["cpu", "emulated"]


@pytest.fixture(scope="session", params=_ON_THE_HOST)
def kernels(request: pytest.FixtureRequest) -> Kernels:
    """The CPU's kernels and the emulated ones of a GPU, in turn."""
    return named_kernels(request.param)


@pytest.fixture(scope="session", params=_ON_THE_HOST + ["cuda"] * _WITH_CUDA)
def kernels_anywhere(request: pytest.FixtureRequest) -> Kernels:
    """Those, and a GPU's own where there is one."""
    if request.param == "cuda":
        _cuda_device()
    return named_kernels(request.param)


@pytest.fixture(autouse=True)
def _same_seed() -> None:
    torch.manual_seed(0)
