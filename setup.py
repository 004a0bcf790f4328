"""Build deqcore with the kernels that this machine can build; DEQCORE_BUILD says how strictly.

DEQCORE_BUILD=auto builds what it can and says what it left out; cpu and cuda fail when that part
cannot be built; none builds the pure-PyTorch library. Everything else is in pyproject.toml.
"""

import json
import os
import shutil
import sys
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent
sys.path.insert(0, str(ROOT / "build_backend"))

from native import BUILD_CHOICES, BuildNative, Plan, make_plan

BUILD_COMMANDS = {"build", "build_ext", "bdist_wheel", "editable_wheel", "install", "develop"}


class BuildPy(build_py):
    """Copy the packages, and write down which kernels were left out and why.

    `python -m deqcore` reads it, since pip hides what a build prints.
    """

    def run(self) -> None:
        packages = [Path(self.build_lib) / name for name in ("deqcore", "lion_models")]
        for package in packages:  # or a module deleted since the last build would be shipped again
            shutil.rmtree(package, ignore_errors=True)
        super().run()
        report = self._report()
        report.parent.mkdir(parents=True, exist_ok=True)
        report.write_text(json.dumps({"left_out": plan.left_out}) + "\n")
        if self.editable_mode:
            _remove_stale_extensions()

    def get_outputs(self, include_bytecode: bool = True) -> list[str]:
        return [*super().get_outputs(include_bytecode), str(self._report())]

    def _report(self) -> Path:
        return (ROOT if self.editable_mode else Path(self.build_lib)) / "deqcore" / "_built.json"


def _remove_stale_extensions() -> None:
    """An extension left by an earlier editable build would be loaded as if it were this one's."""
    built = {extension.name for extension in plan.extensions}
    for name in {"deqcore._C", "deqcore._cuda"} - built:
        for path in (ROOT / "deqcore").glob(f"{name.split('.')[1]}.*.so"):
            path.unlink()


choice = os.environ.get("DEQCORE_BUILD", "auto")
if choice not in BUILD_CHOICES:
    raise SystemExit(
        f"deqcore: DEQCORE_BUILD={choice!r} is unknown; use {', '.join(BUILD_CHOICES)}"
    )
os.chdir(ROOT)
plan = make_plan(choice) if BUILD_COMMANDS.intersection(sys.argv) else Plan()

setup(
    ext_modules=plan.extensions,
    cmdclass={"build_py": BuildPy, "build_ext": BuildNative},
)
