"""DEQCORE_BUILD, DEQCORE_KERNELS and DEQCORE_CPU_ISA do what they say or fail with the reason."""

from __future__ import annotations

import json
import platform
import shutil
from pathlib import Path

import pytest
import torch

from deqcore import _kernels
from tests.support.environments import ROOT, Environment, build_wheel

ISAS = ("portable", "avx2", "avx512")
CPU_FLAGS = {"portable": set(), "avx2": {"avx2", "fma", "f16c"}}
CPU_FLAGS["avx512"] = CPU_FLAGS["avx2"] | {"avx512f", "avx512bw", "avx512vl", "avx512dq"}


def processor_has(isa: str) -> bool:
    if platform.machine() != "x86_64":
        return isa == "portable"
    line = next(x for x in Path("/proc/cpuinfo").read_text().splitlines() if x.startswith("flags"))
    return CPU_FLAGS[isa] <= set(line.split())


@pytest.mark.parametrize("isa", ISAS)
def test_each_instruction_set_can_be_forced(installed, isa):
    if not processor_has(isa):
        pytest.skip(f"this CPU has no {isa}")
    done = installed.python("-m", "deqcore", "--json", DEQCORE_CPU_ISA=isa)
    assert json.loads(done.stdout)["isa"] == isa


@pytest.mark.parametrize("isa", ISAS[1:])
def test_instruction_set_that_the_processor_lacks_is_refused_at_import(installed, isa):
    if processor_has(isa):
        pytest.skip(f"this CPU has {isa}")
    done = installed.python("-c", "import deqcore", DEQCORE_CPU_ISA=isa)
    assert done.returncode == 1
    assert f"DEQCORE_CPU_ISA={isa}: this processor does not have it" in done.stdout


def test_widest_instruction_set_is_chosen_by_default(installed):
    info = json.loads(installed.python("-m", "deqcore", "--json").stdout)
    assert info["isa"] == [isa for isa in ISAS if processor_has(isa)][-1]


def test_kernels_of_other_sources_are_named_at_import(installed):
    sources = installed.site_packages() / "csrc"  # where an editable installation has them
    try:
        shutil.copytree(ROOT / "csrc", sources)
        assert installed.python("-W", "error", "-c", "import deqcore").returncode == 0
        with (sources / "ops" / "rows.h").open("a") as file:
            file.write("// changed\n")
        done = installed.python("-c", "import deqcore")
        assert "kernels were not built from the sources in" in done.stdout
        assert "pip install -e ." in done.stdout
    finally:
        shutil.rmtree(sources)


def test_unknown_instruction_set_is_refused_at_import(installed):
    done = installed.python("-c", "import deqcore", DEQCORE_CPU_ISA="avx1024")
    assert done.returncode == 1
    assert "DEQCORE_CPU_ISA=avx1024 is unknown; use portable, avx2 or avx512" in done.stdout


def test_unknown_kernels_mode_is_refused_at_import(installed):
    done = installed.python("-c", "import deqcore", DEQCORE_KERNELS="fast")
    assert done.returncode == 1
    assert "DEQCORE_KERNELS='fast' is unknown; use auto, reference, require" in done.stdout


def test_reference_mode_loads_no_kernels(installed):
    done = installed.python("-m", "deqcore", "--json", DEQCORE_KERNELS="reference")
    info = json.loads(done.stdout)
    assert info["kernels"] == {"cpu": False, "cuda": False}
    assert info["missing"]["cpu"] == "DEQCORE_KERNELS=reference"


def test_require_mode_says_what_is_missing_and_how_to_build_it(installed_without_kernels):
    done = installed_without_kernels.python("-c", "import deqcore", DEQCORE_KERNELS="require")
    assert done.returncode == 1
    assert "CPU kernels are missing: built with DEQCORE_BUILD=none" in done.stdout
    assert "DEQCORE_BUILD=cpu pip install ." in done.stdout


def test_sources_that_were_not_built_say_where_they_are_and_what_to_do(monkeypatch, tmp_path):
    monkeypatch.setattr(_kernels, "__file__", str(tmp_path / "deqcore" / "_kernels.py"))
    reason = _kernels._left_out_of_the_build()["cpu"]
    assert str(tmp_path) in reason
    assert "pip install -e ." in reason
    assert "another folder" in reason


def test_broken_extension_is_warned_about_once_and_reported(installed_without_kernels, tmp_path):
    package = installed_without_kernels.site_packages() / "deqcore"
    broken = package / "_C.abi3.so"
    broken.write_bytes(b"not a library")
    try:
        done = installed_without_kernels.python("-m", "deqcore")
    finally:
        broken.unlink()
    assert done.returncode == 0
    assert done.stdout.count("RuntimeWarning") == 1
    assert "no: deqcore._C is installed but does not load" in done.stdout


def test_unknown_build_choice_fails_and_names_the_known_ones(tree):
    done = build_wheel(tree, "--no-build-isolation", DEQCORE_BUILD="everything")
    assert done.returncode != 0
    assert "DEQCORE_BUILD='everything' is unknown; use auto, cpu, cuda, none" in done.stdout


@pytest.mark.skipif(torch.version.cuda is not None, reason="this torch is built with CUDA")
def test_cuda_that_was_asked_for_and_cannot_be_built_fails_with_the_reason(tree):
    done = build_wheel(tree, "--no-build-isolation", DEQCORE_BUILD="cuda")
    assert done.returncode != 0
    assert "DEQCORE_BUILD=cuda, but " in done.stdout


def test_cpu_kernels_that_were_asked_for_need_a_compiler(tree):
    done = build_wheel(tree, "--no-build-isolation", DEQCORE_BUILD="cpu", CXX="no-such-compiler")
    assert done.returncode != 0
    assert "DEQCORE_BUILD=cpu, but no C++ compiler found" in done.stdout


def test_auto_without_a_compiler_builds_the_reference_library_and_says_so(tree, tmp_path):
    environment = Environment.create(tmp_path / "environment")
    done = environment.install("-v", tree, CXX="no-such-compiler")
    assert done.returncode == 0, done.stdout
    reason = "no C++ compiler found (looked for no-such-compiler)"
    assert f"deqcore: left out the CPU kernels: {reason}" in done.stdout
    assert reason in environment.python("-m", "deqcore").stdout
