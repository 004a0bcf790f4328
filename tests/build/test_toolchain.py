"""Finding the CUDA toolkit, without needing one."""

from __future__ import annotations

import stat
import sys
from pathlib import Path

import pytest

from tests.support.environments import ROOT

sys.path.insert(0, str(ROOT / "build_backend"))
import toolchain

TORCH = toolchain.Torch("2.13.0", "13.0", Path("include"), Path("lib"))


@pytest.fixture
def toolkit(tmp_path, monkeypatch) -> Path:
    """A toolkit of CUDA 13.0 whose nvcc, found on PATH, is a wrapper in another folder."""
    root = tmp_path / "cuda"
    for name in ("bin/nvcc", "include/cuda_runtime.h", "lib64/libcudart.so"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()
    script = f"""#!/bin/sh
case "$*" in
  *-dryrun*) echo '#$ TOP={root}/bin/..' >&2 ;;
  *--version*) echo 'Cuda compilation tools, release 13.0, V13.0.88' ;;
esac
"""
    for path in (root / "bin/nvcc", tmp_path / "wrapper/nvcc"):
        path.parent.mkdir(exist_ok=True)
        path.write_text(script)
        path.chmod(path.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", str(tmp_path / "wrapper") + ":/usr/bin:/bin")
    for name in ("CUDA_HOME", "CUDA_PATH", "TORCH_CUDA_ARCH_LIST"):
        monkeypatch.delenv(name, raising=False)
    return root


def test_toolkit_is_found_behind_a_wrapper_script(toolkit):
    cuda = toolchain.Cuda.find(TORCH, [])
    assert cuda.nvcc == toolkit / "bin/nvcc"
    assert cuda.include == toolkit / "include"
    assert cuda.lib == toolkit / "lib64"


def test_toolkit_of_another_major_version_is_refused(toolkit):
    torch = toolchain.Torch("2.9.0", "12.8", Path("include"), Path("lib"))
    with pytest.raises(toolchain.UnavailableError, match=r"nvcc is CUDA 13\.0 but .* CUDA 12\.8"):
        toolchain.Cuda.find(torch, [])


def test_torch_without_cuda_is_refused(toolkit):
    torch = toolchain.Torch("2.13.0+cpu", None, Path("include"), Path("lib"))
    with pytest.raises(toolchain.UnavailableError, match="is built without CUDA"):
        toolchain.Cuda.find(torch, [])


def test_cuda_home_without_nvcc_is_named(monkeypatch, tmp_path):
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    with pytest.raises(toolchain.UnavailableError, match=f"CUDA_HOME={tmp_path} has no bin/nvcc"):
        toolchain.Cuda.find(TORCH, [])


def test_toolkit_without_headers_is_named(toolkit):
    (toolkit / "include/cuda_runtime.h").unlink()
    with pytest.raises(toolchain.UnavailableError, match=r"has no cuda_runtime\.h"):
        toolchain.Cuda.find(TORCH, [])


@pytest.mark.parametrize(
    ("listed", "numbers"),
    [
        ("", ["sm_80", "sm_90a", "compute_90"]),
        ("9.0", ["sm_90a"]),
        ("8.0 9.0a+PTX", ["sm_80", "sm_90a", "compute_90a"]),
    ],
)
def test_architecture_list_is_read_as_torch_reads_it(monkeypatch, listed, numbers):
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", listed)
    assert [flag.split(",code=")[1] for flag in toolchain.architecture_flags()] == numbers


def test_unreadable_architecture_list_is_refused(monkeypatch):
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "Hopper")
    with pytest.raises(toolchain.UnavailableError, match=r"'Hopper' is not like 8\.0"):
        toolchain.architecture_flags()
