"""A user's type checker sees the installed package's types (py.typed)."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

from tests.support.environments import ROOT, Environment, run

USER_CODE = ROOT / "tests" / "build" / "user_code.py"
# All of torch takes half a minute to check: here it is Any, and in the workflow CI what it is.
CONFIG = """
[mypy]
strict = true
disallow_subclassing_any = false
warn_return_any = false
disallow_untyped_decorators = false
[mypy-torch.*]
follow_imports = skip
"""


@pytest.fixture(scope="module")
def check(installed: Environment, tmp_path_factory: pytest.TempPathFactory):
    """Run mypy on a text, against the wheel as it is installed; what it says."""
    folder = tmp_path_factory.mktemp("types")
    (folder / "mypy.ini").write_text(CONFIG)

    def checked(text: str) -> str:
        (folder / "user.py").write_text(text)
        options = ["--python-executable", installed.folder / "bin" / "python"]
        return run(sys.executable, "-m", "mypy", *options, "user.py", cwd=folder).stdout

    return checked


def test_a_users_file_passes_and_its_mistakes_are_named(check) -> None:
    text = USER_CODE.read_text()
    said = check(text)
    assert "Success: no issues found" in said, said

    wrong = {
        "solver=Anderson(memory=5)": ('solver="anderson"', 'expected "Solver"'),
        "Phantom(steps=3)": ('Phantom(steps="3")', 'expected "int"'),
        "deqcore.Broyden()": ("deqcore.Broyde()", 'Module has no attribute "Broyde"'),
        "TrainingConfig(epochs=10)": ("TrainingConfig(epoch=10)", 'argument "epoch"'),
        "state.best_epoch, int": ("state.best_epoch, str", 'not "str"'),
    }
    mistaken = text + "from lion_models import Lio\n"
    for right, (mistake, _) in wrong.items():
        assert right in mistaken
        mistaken = mistaken.replace(right, mistake)
    said = check(mistaken)
    messages = [message for _, message in wrong.values()]
    for message in (*messages, 'has no attribute "Lio"'):
        assert message in said, said
    assert re.search(rf"Found {len(messages) + 1} errors in 1 file", said), said


def test_both_packages_say_that_they_are_typed(installed: Environment) -> None:
    for package in ("deqcore", "lion_models"):
        assert Path(installed.site_packages(), package, "py.typed").exists()
