"""Options of commands: those of runs from their declarations, and others that commands share."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import MISSING, Field, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import rich_click as click
import torch
from click import get_current_context
from click.core import ParameterSource
from click.shell_completion import CompletionItem

from lion_models.base.errors import UserError, choose
from lion_models.base.options import Options, declared, kinds_of, option
from lion_models.cli.text import dashed
from lion_models.data.loader import IMAGE_CACHE
from lion_models.methods import METHODS
from lion_models.run.config import GROUPS, RunConfig, all_options, owners_of
from lion_models.study.trial import TrialOptions

__all__ = ["BACKBONE_PLACE", "CHANGED_DATA", "JOBS", "METHOD", "MOVED_DATA", "OVERWRITE", "RUNS",
           "Given", "Machine", "Names", "machine_options", "methods_option", "option_of",
           "path_argument", "path_option", "run_options", "trials_on", "written"]  # fmt: skip

DEVICES = ("cpu", "cuda", "mps")
TITLES = {"data": "Data", "backbone": "Backbone", "training": "Training",
          "robust": "Robust training (CDR)"}  # fmt: skip


class Names(click.ParamType):
    """A text that the run checks itself, with a hint at the nearest of these names."""

    name = "text"

    def __init__(self, *names: str) -> None:
        self._names = names

    def get_metavar(self, param: click.Parameter, ctx: click.Context | None = None) -> str:
        return "|".join(self._names)

    def shell_complete(
        self, ctx: click.Context, param: click.Parameter, incomplete: str
    ) -> list[CompletionItem]:
        return [CompletionItem(name) for name in self._names if name.startswith(incomplete)]


class _NameOrFile(click.ParamType):
    """A text that the run checks itself: one of these names, a file, or something else."""

    name = "text"

    def __init__(self, *names: str) -> None:
        self._names = names

    def shell_complete(
        self, ctx: click.Context, param: click.Parameter, incomplete: str
    ) -> list[CompletionItem]:
        # A shell takes either words of ours or the files that it finds.
        names = [name for name in self._names if incomplete and name.startswith(incomplete)]
        return [*map(CompletionItem, names)] or [CompletionItem(incomplete, type="file")]


class _NumberOr(click.ParamType):
    """A whole number, or a word that stands for None."""

    name = "integer"

    def __init__(self, word: str) -> None:
        self._word = word

    def get_metavar(self, param: click.Parameter, ctx: click.Context | None = None) -> str:
        return f"INTEGER|{self._word}"

    def convert(self, value: Any, param: click.Parameter | None, ctx: Any) -> Any:
        if value == self._word or value is None:
            return None
        if not str(value).isdigit():
            name = f"--{param.name}: " if param is not None else ""
            raise UserError(f"{name}expected a whole number or '{self._word}', got '{value}'")
        return int(value)


class Given(NamedTuple):
    """The options of runs that a command has.

    Attributes:
        values: all of them by their own names.
        names: of those that the user wrote.
    """

    values: dict[str, Any]
    names: list[str]


def option_of(
    each: Field[Any],
    kinds: tuple[type, ...],
    panel: str | None = None,
    *,
    needed: bool = True,
    default: Any = MISSING,
) -> Any:
    """The option of a command that is declared by a field of `Options`.

    One without a default has to be given, unless it is not `needed`; the command may have another
    `default`.
    """
    said = declared(each)
    kind: Any = next(kind for kind in kinds if kind is not type(None))
    more: dict[str, Any] = {"type": kind}
    if kind is bool:
        more = {"is_flag": True}
    elif said.choices:
        more = {"type": Names(*said.choices)}
    elif said.names:
        more = {"type": _NameOrFile(*said.names)}
    elif said.word:
        more = {"type": _NumberOr(said.word)}
    default = each.default if default is MISSING else default
    if default is MISSING:
        more |= {"required": needed}
    else:
        more |= {"default": default, "show_default": dashed(said.unset) or True}
    name = f"--{each.name.replace('_', '-')}"
    return click.option(name, help=dashed(said.help), panel=panel, **more)


def run_options(
    *omitted: str, optional: Sequence[str] = (), defaults: Mapping[str, Any] | None = None
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Give a command all options of runs but those `omitted`; it is called with `Given` first.

    Those of `optional` may be left out although they have no default, and are None then; those of
    `defaults` have another one here.
    """
    own_defaults = defaults or {}

    def decorate(function: Callable[..., None]) -> Callable[..., None]:
        options: dict[str, Any] = {}
        groups: list[type[Options]] = [*GROUPS.values(), *METHODS.values()]
        titles = [*TITLES.values(), *METHODS]
        owners = owners_of()
        for title, group in zip(titles, groups, strict=True):
            for each, kinds in kinds_of(group):
                if each.name not in (*omitted, *options):
                    panel = " and ".join(owners[each.name]) if title in METHODS else title
                    needed = each.name not in optional
                    default = own_defaults.get(each.name, MISSING)
                    options[each.name] = option_of(
                        each, kinds, panel, needed=needed, default=default
                    )

        @functools.wraps(function)
        def command(**values: Any) -> None:
            own = {name: values.pop(name) for name in options}
            function(Given(all_options(**own), written(options)), **values)

        decorated: Callable[..., None] = command
        for add in reversed([*options.values(), _CONFIG]):
            decorated = add(decorated)
        return decorated

    return decorate


def written(names: Iterable[str]) -> list[str]:
    """Those of a command's options that the user wrote."""
    ctx = get_current_context()
    return [n for n in names if ctx.get_parameter_source(n) is ParameterSource.COMMANDLINE]


def _read_config(ctx: click.Context, _: click.Parameter, path: Path | None) -> None:
    """Take the options of a file for the command's defaults."""
    if path is None:
        return
    file = path / "config.json" if path.is_dir() else path
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
        RunConfig.from_dict(values)
    except (OSError, ValueError, TypeError) as error:
        raise UserError(
            f"--config: {file} cannot be read ({error}); expected the config.json of a run"
        ) from error
    shots = values.get("shots", "")  # None is no value for a command, and here it is one
    ctx.default_map = {**values, **({} if shots else {"shots": "all"})}


_CONFIG = click.option(
    "--config",
    type=click.Path(path_type=Path),
    callback=_read_config,
    is_eager=True,
    expose_value=False,
    help="A run's config.json, or its folder: its options hold where the command line has none.",
)
METHOD = click.option(
    "--method", type=Names(*METHODS), default="lion", show_default=True, help="What is trained."
)


def methods_option(default: str) -> Any:
    """`--methods`, several of them."""
    return click.option(
        "--methods",
        default=default,
        show_default=True,
        help=f"Comma-separated, of {', '.join(METHODS)}; or all.",
    )


def path_option(name: str, help: str, shown: str = "", **more: Any) -> Any:
    """An option that is a path; `shown` says what its absence means."""
    kind = click.Path(path_type=Path)
    return click.option(name, type=kind, show_default=shown or None, help=help, **more)


def path_argument(name: str, help: str, *, required: bool = True, nargs: int = 1) -> Any:
    """An argument that is a path, or with `nargs` of -1 several."""
    kind = click.Path(path_type=Path)
    return click.argument(name, type=kind, required=required, nargs=nargs, help=help)


RUNS = path_option("--runs", "Folder of all runs.", "runs", default=Path("runs"))
OVERWRITE = click.option("--overwrite", is_flag=True, help="Replace an existing run.")
JOBS = click.option("--jobs", default=1, show_default=True, help="Processes that share the runs.")
MOVED_DATA = click.option(
    "--moved-data",
    show_default="where it lay in training",
    help="Where the run's own data lies now, as --data would name it.",
)
CHANGED_DATA = click.option(
    "--changed-data",
    is_flag=True,
    help="Go on although images of the run's data have other contents than in training.",
)
BACKBONE_PLACE = click.option(
    "--backbone", show_default="the name that the run stored", help="Where its file lies now."
)


@dataclass(frozen=True)
class Machine(Options):
    """What a command computes with; see `Workbench`."""

    threads: int | None = option(None, "CPU threads.", low=1, unset="all cores")
    workers: int | None = option(
        None,
        "Processes that decode images ahead of their use.",
        low=0,
        unset="none on the CPU, else as many as threads, 8 at most",
    )
    image_cache: float = option(
        IMAGE_CACHE, "GiB of decoded images to keep in memory; of each job.", low=0
    )
    device: str = option("cpu", "To compute on: cpu, cuda, cuda:1 or mps.")

    def set_up(self) -> None:
        """Set the number of threads, and make sure that the device is there."""
        kind, _, index = self.device.partition(":")
        choose("device", kind, DEVICES)
        if index and (kind != "cuda" or not index.isdigit()):
            raise UserError(f"--device: expected cpu, cuda, cuda:1 or mps, got '{self.device}'")
        if kind == "cuda" and not torch.cuda.is_available():
            raise UserError(f"--device {self.device}: this torch sees no GPU; use --device cpu")
        if index and int(index) >= torch.cuda.device_count():
            raise UserError(
                f"--device {self.device}: this machine has {torch.cuda.device_count()} GPUs, from "
                "cuda:0; choose one of them"
            )
        if kind == "mps" and not torch.backends.mps.is_available():
            raise UserError("--device mps: this torch sees no Apple GPU; use --device cpu")
        if self.threads is not None:
            torch.set_num_threads(self.threads)


def trials_on(machine: Machine, plot: bool = True) -> TrialOptions:
    """How the trials of a study run on a machine."""
    return TrialOptions(
        machine.device, plot, workers=machine.workers, image_cache=machine.image_cache
    )


def machine_options(*names: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Give a command options of `Machine`, all or those named; it is called with `machine`."""
    chosen = {
        each.name: option_of(each, kinds)
        for each, kinds in kinds_of(Machine)
        if not names or each.name in names
    }

    def decorate(function: Callable[..., None]) -> Callable[..., None]:
        @functools.wraps(function)
        def command(*given: Any, **values: Any) -> None:
            machine = Machine(**{name: values.pop(name) for name in chosen})
            machine.set_up()
            function(*given, machine=machine, **values)

        decorated: Callable[..., None] = command
        for add in reversed(chosen.values()):
            decorated = add(decorated)
        return decorated

    return decorate
