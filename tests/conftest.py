"""Settings and fixtures of the whole suite."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, settings

# Their asserts say as much as those of the tests.
pytest.register_assert_rewrite("tests.support")

from tests.support.kernels import Kernels, named_kernels  # noqa: E402  (after it)

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


# What two workers (pytest -n 2 --dist loadgroup --no-loadscope-reorder) take in turn: a file, whose
# fixtures one of them makes then, or a folder that makes one installation for all its files. What
# takes longest comes first, so that none is left alone with it at the end.
_FIRST = ("build", "cuda", "lion")
_ONE_WORKER = ("build",)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    root = Path(__file__).parent

    def folder(item: pytest.Item) -> str:
        return item.path.relative_to(root).parts[0]

    items.sort(key=lambda item: _FIRST.index(folder(item)) if folder(item) in _FIRST else 9)
    if config.pluginmanager.hasplugin("xdist"):
        for item in items:
            group = folder(item) if folder(item) in _ONE_WORKER else str(item.path)
            item.add_marker(pytest.mark.xdist_group(group))


@pytest.fixture(autouse=True)
def _same_seed() -> None:
    torch.manual_seed(0)
