"""The sdist and the wheel build, and what is installed from them works."""

from __future__ import annotations

import json
import shutil
import sys
import sysconfig
import tarfile
import venv
import zipfile
from importlib.metadata import version
from pathlib import Path

import pytest

from tests.support.environments import ROOT, Environment, build_wheel, run

BACKEND = f"import sys; sys.path.insert(0, {str(ROOT / 'build_backend')!r}); import backend;"

SOLVE = """
import torch, deqcore
solution = deqcore.fixed_point(lambda z: 0.5 * z + 1, torch.zeros(3, 64))
solution.raise_for_status()
torch.testing.assert_close(solution.value, torch.full((3, 64), 2.0), rtol=1e-3, atol=1e-3)
print("kernels", deqcore.build_info()["kernels"]["cpu"])
"""


def test_sdist_holds_what_a_build_needs(sdist):
    with tarfile.open(sdist) as archive:
        names = {name.split("/", 1)[1] for name in archive.getnames() if "/" in name}
    kernels = {str(path.relative_to(ROOT)) for path in (ROOT / "csrc").rglob("*.[ch]*")}
    backend = {str(path.relative_to(ROOT)) for path in (ROOT / "build_backend").glob("*.py")}
    wanted = {"setup.py", "pyproject.toml", "LICENSE", "README.md"}
    wanted |= {str(p.relative_to(ROOT)) for p in ROOT.glob("deqcore/sparse/tables/*.json")}
    assert (wanted | backend | kernels) - names == set()
    assert [name for name in names if name.endswith((".so", "_built.json"))] == []


def test_wheel_is_small_and_holds_both_packages_and_their_data(wheel):
    with zipfile.ZipFile(wheel) as archive:
        sizes = {info.filename: info.file_size for info in archive.infolist()}
    patterns = (
        *("deqcore/**/*.py", "deqcore/sparse/tables/*.json"),
        *("lion_models/**/*.py", "lion_models/**/*.safetensors"),
    )
    sources = {str(p.relative_to(ROOT)) for pattern in patterns for p in ROOT.glob(pattern)}
    assert sources - sizes.keys() == set()
    top = {name.split("/")[0] for name in sizes if ".dist-info/" not in name}
    assert top == {"deqcore", "lion_models"}
    extension = sum(size for name, size in sizes.items() if name.endswith(".so"))
    assert 0 < extension < 2_000_000, "the extension is stripped and without debug information"


def test_installed_wheel_reports_its_kernels_and_solves(installed):
    report = installed.python("-m", "deqcore", "--json")
    assert report.returncode == 0, report.stdout
    info = json.loads(report.stdout)
    assert info["kernels"]["cpu"]
    assert info["isa"] in info["isas"]
    done = installed.python("-c", SOLVE, DEQCORE_KERNELS="require")
    assert "kernels True" in done.stdout, done.stdout


def test_report_for_people_names_versions_compiler_and_instruction_set(installed):
    text = installed.python("-m", "deqcore").stdout
    info = json.loads(installed.python("-m", "deqcore", "--json").stdout)
    for key in ("version", "torch", "compiler", "isa"):
        assert info[key] in text


def test_library_without_kernels_solves_and_says_why(installed_without_kernels):
    done = installed_without_kernels.python("-c", SOLVE)
    assert "kernels False" in done.stdout, done.stdout
    report = installed_without_kernels.python("-m", "deqcore").stdout
    assert "built with DEQCORE_BUILD=none" in report


def test_editable_install_uses_the_tree(tree, wheel, tmp_path):
    environment = Environment.create(tmp_path / "environment")
    done = environment.install("-v", "--editable", tree)
    assert done.returncode == 0, done.stdout
    assert "ninja: no work to do" in done.stdout, "the objects of the wheel's build are reused"
    where = environment.python("-c", "import deqcore._C; print(deqcore._C.__file__)")
    assert where.stdout.startswith(str(tree)), where.stdout


@pytest.mark.skipif(shutil.which("nm") is None, reason="binutils are not installed")
def test_kernels_share_no_function_between_instruction_sets(tree, wheel):
    """The linker keeps one copy of a plain inline function: the portable one, which is slow."""
    objects = list(tree.glob("build/native*/cpu/*_kernel.*.o"))
    assert objects
    for path in objects:
        isa = path.suffixes[0].removeprefix(".")
        lines = run("nm", "-C", "--defined-only", path, cwd=tree).stdout.splitlines()
        shared = [line for line in lines if " W deqcore::" in line and f"::{isa}::" not in line]
        assert shared == [], f"{path.name}: make these static, or templates in the ISA's namespace"


def test_build_without_torch_says_to_install_it_first(tmp_path):
    venv.create(tmp_path / "empty", with_pip=False)
    libraries = next((tmp_path / "empty").glob("lib/python*/site-packages"))
    for name in ("setuptools", f"setuptools-{version('setuptools')}.dist-info"):
        (libraries / name).symlink_to(Path(sysconfig.get_path("purelib")) / name)
    python = tmp_path / "empty/bin/python"
    done = run(python, "-c", f"{BACKEND} backend.build_wheel('.')", cwd=tmp_path)
    assert done.returncode == 1
    assert "install torch first" in done.stdout


def test_build_without_a_recent_setuptools_names_the_version(tmp_path):
    venv.create(tmp_path / "empty", with_pip=False)
    python = tmp_path / "empty/bin/python"
    done = run(python, "-c", f"{BACKEND} backend.build_wheel('.')", cwd=tmp_path)
    assert done.returncode == 1
    assert "building needs setuptools>=" in done.stdout


@pytest.mark.parametrize("kind", ["sdist", "wheel", "editable"])
def test_backend_asks_for_no_download_where_all_is_installed(kind, tmp_path):
    call = f"{BACKEND} print(backend.get_requires_for_build_{kind}())"
    assert run(sys.executable, "-c", call, cwd=tmp_path).stdout.strip() == "[]"


def test_backend_asks_for_what_compiles_the_kernels_where_it_is_missing(tmp_path):
    venv.create(tmp_path / "empty", with_pip=False)
    python = tmp_path / "empty/bin/python"
    call = f"{BACKEND} print(*backend.get_requires_for_build_wheel())"
    asked = run(python, "-c", call, cwd=tmp_path).stdout.split()
    assert asked == ["setuptools>=77", "ninja>=1", "pybind11>=3"]
    asked = run(python, "-c", call, cwd=tmp_path, DEQCORE_BUILD="none").stdout.split()
    assert asked == ["setuptools>=77"]


@pytest.mark.parametrize("missing", ["ninja", "pybind11"])
def test_kernels_that_were_asked_for_need_ninja_and_pybind11(missing, tree, tmp_path):
    (tmp_path / f"{missing}.py").write_text("raise ImportError")
    variables = {"DEQCORE_BUILD": "cpu", "PYTHONPATH": str(tmp_path)}
    done = build_wheel(tree, "--no-build-isolation", **variables)
    assert done.returncode != 0
    reason = f"{missing} is not installed (pip install {missing})"
    assert f"DEQCORE_BUILD=cpu, but {reason}" in done.stdout
