"""The group of all commands, each a file beside this one that is imported when it is called."""

from __future__ import annotations

import ast
import importlib
import signal
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import rich_click as click
from rich.text import Text

from lion_models.base.errors import UserError, did_you_mean
from lion_models.cli.console import err, fit_streams
from lion_models.cli.text import dashed

__all__ = ["lion", "plain_warnings"]

COMMANDS = (
    "train",
    "compare",
    "demo",
    "sweep",
    "eval",
    "predict",
    "explain",
    "export",
    "info",
    "list",
    "data",
    "backbone",
)


class _Commands(click.RichGroup):
    """Imports a command when it is called, and shows what the user can put right as one message.

    The help of all commands is the first docstring of their files, which needs no import of torch.
    """

    def main(self, *args: Any, **options: Any) -> Any:
        fit_streams()
        return super().main(*args, **options)

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        source = Path(__file__).with_name(f"{cmd_name}.py").read_text(encoding="utf-8")
        return click.RichCommand(name=cmd_name, help=ast.get_docstring(ast.parse(source)))

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        if args[0] not in COMMANDS and not args[0].startswith("-"):
            hint = did_you_mean(args[0], COMMANDS)
            ctx.fail(f"No such command '{args[0]}'{hint}")
        name, command, rest = super().resolve_command(ctx, args)
        if command is not None:
            command = importlib.import_module(f"lion_models.cli.{name}").command
        return name, command, rest

    def invoke(self, ctx: click.Context) -> Any:
        try:
            with plain_warnings(), _interruptible():
                return super().invoke(ctx)
        except UserError as error:
            _fail(dashed(str(error)))
            ctx.exit(2)
        except ModuleNotFoundError as error:
            if error.name is None or error.name.startswith(("lion_models", "deqcore")):
                raise
            package = error.name.partition(".")[0]
            _fail(f"lion needs the package '{package}'; run: pip install 'deqcore[lion]'")
            ctx.exit(2)
        except KeyboardInterrupt as interrupt:
            err.print(
                "interrupted; the same command continues: train with --resume, "
                "compare, sweep and demo by themselves",
                highlight=False,
            )
            ctx.exit(143 if isinstance(interrupt, _Terminated) else 130)


def _fail(message: str) -> None:
    err.print(Text("error:", "bold red"), message, highlight=False)


@contextmanager
def plain_warnings() -> Iterator[None]:
    """Show warnings as messages, without the code that gave them, and with options as the command
    line spells them."""
    usual = warnings.formatwarning

    def plain(message: Any, *where: Any, **line: Any) -> str:
        return f"warning: {dashed(str(message))}\n"

    warnings.formatwarning = plain
    try:
        yield
    finally:
        warnings.formatwarning = usual


class _Terminated(KeyboardInterrupt):
    """SIGTERM, which batch systems send."""


@contextmanager
def _interruptible() -> Iterator[None]:
    """End on SIGTERM as on Ctrl-C: files are put away, and a message says how to go on."""

    def interrupt(*_: Any) -> None:
        raise _Terminated

    try:
        before = signal.signal(signal.SIGTERM, interrupt)
    except ValueError:  # not the main thread
        yield
        return
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _show_version(ctx: click.Context, _: click.Parameter, asked: bool) -> None:
    if asked and not ctx.resilient_parsing:
        import torch

        import deqcore

        click.echo(f"deqcore {deqcore.__version__}, torch {torch.__version__}")
        ctx.exit()


def _install_completion(ctx: click.Context, _: click.Parameter, shell: str | None) -> None:
    if shell is not None and not ctx.resilient_parsing:
        from lion_models.cli.completion import install_completion

        try:
            click.echo(install_completion(ctx.command, shell))
        except UserError as error:  # outside of `invoke`
            _fail(dashed(str(error)))
            ctx.exit(2)
        ctx.exit()


@click.group(cls=_Commands, context_settings={"help_option_names": ["--help"]})
@click.option(
    "--version",
    is_flag=True,
    callback=_show_version,
    expose_value=False,
    is_eager=True,
    help="Show it and exit.",
)
@click.option(
    "--install-completion",
    is_flag=False,
    flag_value="",
    metavar="[bash|zsh|fish]",
    callback=_install_completion,
    expose_value=False,
    is_eager=True,
    help="Let a shell, by default yours, complete commands, options and names; and exit.",
)
def lion() -> None:
    """Tune a frozen vision backbone with implicit prompts (LION)."""
