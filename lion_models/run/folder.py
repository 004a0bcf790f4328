"""A run's folder: which files are a run's, and when it is begun, continued or replaced."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from lion_models.base.errors import UserError
from lion_models.base.files import make_folder, write_json
from lion_models.run.checkpoint import CHECKPOINT, read_checkpoint
from lion_models.run.config import CONFIG, RunConfig
from lion_models.run.data_record import DATA_RECORD
from lion_models.run.log import METRICS, STATE
from lion_models.run.report import CONFUSION, PAGE, REPORT

__all__ = ["CURVES", "RESULT", "TEST_LEDGER", "check_same", "is_new", "prepare_folder",
           "read_config"]  # fmt: skip

RESULT = "result.json"
TEST_LEDGER = "test.json"
CURVES = "curves.png"
OF_EXPORT = ("model.pt2", "model.onnx", "model.pt2.json", "model.onnx.json")
RUN_FILES = frozenset((CONFIG, DATA_RECORD, METRICS, STATE, CHECKPOINT, RESULT, TEST_LEDGER, REPORT,
                       CONFUSION, PAGE, CURVES, "tensorboard", *OF_EXPORT))  # fmt: skip


def read_config(folder: Path) -> RunConfig:
    """The configuration stored in a run's folder.

    Raises:
        UserError: none is there, it is damaged, or it is of another version.
    """
    path = folder / CONFIG
    if not path.is_file():
        raise _not_a_run(folder)
    try:
        return RunConfig.stored(json.loads(path.read_text()))
    except UserError as error:
        raise UserError(f"{folder}: {error}") from error
    except (ValueError, TypeError) as error:
        raise UserError(f"{path}: damaged ({error})") from error


def _not_a_run(folder: Path) -> UserError:
    return UserError(
        f"{folder}: not a run (no {CONFIG}); expected a folder that 'lion train' has written"
    )


def is_new(folder: Path) -> bool:
    """Whether a folder is not there, or empty but for what a process left that was killed as it
    began."""
    if not folder.is_dir():
        return not folder.exists()
    return all(path.name.endswith(".part") for path in folder.iterdir())


def check_begun(folder: Path) -> None:
    """Raise UserError where there is nothing to resume."""
    if is_new(folder):
        raise UserError(f"`resume`: {folder} holds no run; leave `resume` out to start one")


def prepare_folder(folder: Path, config: RunConfig, resume: bool, overwrite: bool) -> None:
    """Make sure that a run's folder is new, wanted again, or free to be replaced.

    Raises:
        UserError: the folder holds something and neither was asked for, or something else.
    """
    if resume:
        check_begun(folder)
    if is_new(folder):
        make_folder(folder)
        write_json(folder / CONFIG, config.to_dict())
    elif resume:
        check_same(folder, config)
    elif overwrite:
        _remove(folder)
        prepare_folder(folder, config, resume=False, overwrite=False)
    elif not (folder / CONFIG).is_file():
        raise _not_a_run(folder)
    else:
        raise UserError(
            f"{folder} exists; use `resume` to continue it, `overwrite` to replace it, "
            "or another `name` or `runs`"
        )


def check_same(folder: Path, config: RunConfig) -> None:
    """Raise UserError where a folder's run has other options than `config`."""
    stored = read_config(folder).resolved().options()
    differing = [key for key, value in config.options().items() if stored.get(key) != value]
    if differing:
        shown = ", ".join(f"{key}={stored.get(key)!r}" for key in differing)
        raise UserError(
            f"`resume`: {folder} was started with {shown}; repeat the same options, or choose "
            "another `name` or `runs`"
        )


def _remove(folder: Path) -> None:
    """Remove a run of any version, or what is left of one, but nothing of the user's.

    The folder is renamed first: a kill while its files go leaves no half of a run under its name.
    """
    names = sorted(path.name for path in folder.iterdir()) if folder.is_dir() else [folder.name]
    others = [name for name in names if name not in RUN_FILES and not name.endswith(".part")]
    why = "is not a run (it has neither a run's config.json nor a run's checkpoint)"
    if others:
        more = f" and {len(others) - 3} more" if len(others) > 3 else ""
        why = f"holds {', '.join(others[:3])}{more}, which is no file of a run,"
    if others or not _was_written_here(folder):
        raise UserError(
            f"`overwrite`: {folder} {why} and is not replaced; move it away, or use another "
            "`name` or `runs`"
        )
    aside = folder.parent / ".locks" / f"{folder.name}.replaced"
    make_folder(aside.parent)
    if aside.exists():  # of a process that was killed here
        shutil.rmtree(aside)
    folder.rename(aside)
    shutil.rmtree(aside)


def _was_written_here(folder: Path) -> bool:
    """Whether a run's configuration or, where another version wrote that, its checkpoint is there.

    Other programs, too, call a file config.json or metrics.jsonl.
    """
    for read in (read_config, lambda folder: read_checkpoint(folder / CHECKPOINT)):
        try:
            read(folder)
        except UserError:
            continue
        return True
    return False
