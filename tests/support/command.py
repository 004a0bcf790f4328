"""A way to call the command line in this process, and what the shared folders of images hold."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from click.testing import CliRunner

from lion_models.base.folders import data_root
from lion_models.cli.app import lion

CLASSES = ("dark", "light", "middle")
PREPARED = data_root()  # what the machine's user has prepared, before the tests look elsewhere


@dataclass(frozen=True)
class Outcome:
    code: int
    out: str
    err: str


Lion = Callable[..., Outcome]


def call(*arguments: object) -> Outcome:
    result = CliRunner().invoke(lion, [str(argument) for argument in arguments])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    # The console wraps lines; messages are compared as running text.
    return Outcome(result.exit_code, result.output, " ".join(result.stderr.split()))
