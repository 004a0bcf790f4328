"""Settings and fixtures of the whole suite."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, settings

# Their asserts say as much as those of the tests.
pytest.register_assert_rewrite("tests.support")

from tests.support.kernels import Kernels, named_kernels  # noqa: E402  (after it)

_COMMON = {"deadline": None, "suppress_health_check": [HealthCheck.too_slow]}
settings.register_profile("ci", max_examples=25, derandomize=True, database=None, **_COMMON)
settings.register_profile("brief", max_examples=8, derandomize=True, database=None, **_COMMON)
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


# What two workers (pytest -n 2 --dist loadscope --no-loadscope-reorder) take in turn: a file, whose
# fixtures one of them makes then, or a folder that makes one installation for all its files. What
# takes longest comes first, so that none is left alone with it at the end.
_FIRST = ("build", "cuda", "lion")
_ONE_WORKER = ("build",)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    def place(item: pytest.Item) -> int:
        folder = _scope(item.nodeid)[1]
        return _FIRST.index(folder) if folder in _FIRST else len(_FIRST)

    items.sort(key=place)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    from xdist.scheduler import LoadScopeScheduling

    class ByFile(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file, folder = _scope(nodeid)
            return folder if folder in _ONE_WORKER else file

    return ByFile(config, log)


def _scope(nodeid: str) -> tuple[str, str]:
    """A test's file, and the folder of tests/ that it is in."""
    file = nodeid.split("::")[0]
    return file, Path(file).parent.name
