"""What a repository says of itself in several places is the same in all of them."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from fnmatch import fnmatch
from pathlib import Path

import pytest

import deqcore
from tools.import_graph import imports

ROOT = Path(__file__).parents[1]
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
PROJECT = (ROOT / "pyproject.toml").read_text()


def test_the_citation_and_the_changelog_name_this_version() -> None:
    citation = (ROOT / "CITATION.cff").read_text()
    assert re.search(r"^version: (.*)$", citation, re.MULTILINE)[1] == deqcore.__version__
    newest = re.search(r"^## \[(.*?)\]", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert newest[1] == deqcore.__version__


@pytest.mark.parametrize("workflow", WORKFLOWS, ids=lambda path: path.stem)
def test_what_a_workflow_runs_exists(workflow: Path) -> None:
    text, makefile = workflow.read_text(), (ROOT / "Makefile").read_text()
    for target in re.findall(r"\bmake ([a-z-]+)", text):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), f"make {target}"
    for path in re.findall(r"\b(?:tests|tools)/[\w./-]+", text):
        assert (ROOT / path).exists(), path
    for module in re.findall(r"python -m (benchmarks[\w.]*)", text):
        path = ROOT / module.replace(".", "/")
        assert path.with_suffix(".py").exists() or (path / "__main__.py").exists(), module


def test_the_workflows_try_each_python_and_the_oldest_torch_that_are_promised() -> None:
    promised = re.findall(r'"Programming Language :: Python :: (3\.\d+)"', PROJECT)
    oldest = re.search(r'requires-python = ">=(.*?)"', PROJECT)[1]
    assert promised[0] == oldest
    workflow = (ROOT / ".github" / "workflows" / "ci.yml").read_text()
    matrix = re.search(r"python: \[(.*)\]", workflow)[1]
    assert re.findall(r"[\d.]+", matrix) == promised
    torch = re.search(r"torch>=([\d.]+)", PROJECT)[1]
    assert f'"torch=={torch}.0"' in workflow
    wheels = re.search(r'^build = "(.*)"', PROJECT, re.MULTILINE)[1].split()
    assert wheels == [f"cp{version.replace('.', '')}-*" for version in promised]


def test_the_gpu_job_fails_where_no_gpu_answers() -> None:
    """Its first step asks torch; what follows forbids tests to skip."""
    workflow = (ROOT / ".github" / "workflows" / "gpu.yml").read_text()
    assert 'REQUIRE_CUDA: "1"' in workflow
    assert "continue-on-error" not in workflow
    question, work = workflow.index("python3 -c"), workflow.index("tools/gpu_check.py")
    assert question < work
    asked = re.search(r'python3 -c "(.*)"', workflow)[1]
    done = subprocess.run(
        [sys.executable, "-c", asked],
        env={**os.environ, "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode != 0
    assert "CUDA" in done.stderr


def test_what_tests_of_a_wheel_import_is_copied_beside_them() -> None:
    """Away from the sources, so that the installed package is what is tested."""
    folders = ("ops", "solvers", "adjoints", "support")
    files = [path for folder in folders for path in (ROOT / "tests" / folder).rglob("*.py")]
    tops = {module.split(".")[0] for path in files for module, _ in imports(path)}
    wanted = {top for top in tops - {"deqcore", "lion_models"} if (ROOT / top).is_dir()}
    assert {"tests", "tools"} <= wanted
    wheels = re.search(r"^test-sources = \[(.*)\]", PROJECT, re.MULTILINE)[1]
    assert wanted <= set(re.findall(r'"(\w+)"', wheels))
    workflow = (ROOT / ".github" / "workflows" / "ci.yml").read_text()
    copied = re.search(r"cp -r (.*) elsewhere/", workflow)[1]
    assert wanted <= set(copied.split())


def test_no_folder_of_tests_is_left_out(pytestconfig: pytest.Config) -> None:
    """pytest's own list of folders to leave out has "build", one of ours."""
    left_out = pytestconfig.getini("norecursedirs")
    names = {path.parent.name for path in (ROOT / "tests").rglob("test_*.py")}
    assert "build" in names
    assert not [name for name in names for pattern in left_out if fnmatch(name, pattern)]
