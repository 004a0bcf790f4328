"""Many runs in one folder: each is claimed by one process, and processes share the rest."""

from __future__ import annotations

import json
import multiprocessing
import os
import time
import traceback
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass, field, replace
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import torch

from lion_models.errors import UserError
from lion_models.files import claim
from lion_models.training import RunConfig, prepare_folder, train_run
from lion_models.training.progress import STATE_SECONDS
from lion_models.training.runs import measure_run, read_config
from lion_models.training.trainer import FitState
from lion_models.training.workbench import Workbench

__all__ = ["Cell", "Event", "Outcome", "check_cells", "default_threads", "run_cells"]

LOOK_AGAIN_SECONDS = 1.0
REPORT_SECONDS = 0.5


@dataclass(frozen=True)
class Cell:
    """One run of many.

    Attributes:
        folder: of the run.
        config: what to train, with its recipe resolved.
        test: read the test set, after training or for a run that is trained already.
    """

    folder: Path
    config: RunConfig
    test: bool = False

    @property
    def lock(self) -> Path:
        return self.folder.parent / ".locks" / f"{self.folder.name}.lock"

    def result(self) -> dict[str, Any] | None:
        """Content of result.json, if the run has all that is asked for."""
        path = self.folder / "result.json"
        if not path.is_file():
            return None
        result: dict[str, Any] = json.loads(path.read_text())
        return result if not self.test or "test" in result else None


@dataclass(frozen=True)
class Event:
    """News of a cell.

    Attributes:
        index: of the cell among those given.
        kind: `epoch` (one has ended), `done`, `failed`, `held` (another command runs it; it is
            looked at again) or `elsewhere` (another command has finished it).
        epoch: epochs done.
        accuracy: on validation data.
        message: why it failed.
        state: of the fit; only where the cell runs in this process.
    """

    index: int
    kind: str
    epoch: int = 0
    accuracy: float = 0.0
    message: str = ""
    state: FitState | None = field(default=None, compare=False)


OnEvent = Callable[[Event], None]


@dataclass(frozen=True)
class Outcome:
    """What became of the cells: results in their order (None: failed), and messages by index."""

    results: list[dict[str, Any] | None]
    failures: dict[int, str]


@dataclass(frozen=True)
class _Options:
    device: str
    plot: bool
    threads: int | None
    state_seconds: float


def default_threads(jobs: int) -> int:
    """Threads of each of `jobs` processes that divide this machine's cores."""
    return max(1, len(os.sched_getaffinity(0)) // jobs)


def check_cells(cells: Sequence[Cell], overwrite: bool = False) -> None:
    """Refuse, before anything runs, folders that hold something else.

    With `overwrite`, cells that were run with other options are cleared away here, once.

    Raises:
        UserError: a folder was run with other options, or holds no run.
    """
    for cell in cells:
        started = (cell.folder / "config.json").is_file()
        if started and read_config(cell.folder) == cell.config:
            continue
        if started and not overwrite:
            raise UserError(
                f"{cell.folder} was run with other options; use --overwrite to replace it, "
                "or another --name"
            )
        if started:
            with _claimed(cell) as mine:
                if not mine:
                    raise UserError(f"--overwrite: {cell.folder} is running in another process")
                prepare_folder(cell.folder, cell.config, resume=False, overwrite=True)


def run_cells(
    cells: Sequence[Cell],
    *,
    jobs: int = 1,
    threads: int | None = None,
    device: str = "cpu",
    plot: bool = True,
    on_event: OnEvent = lambda event: None,
    bench: Workbench | None = None,
    state_seconds: float = STATE_SECONDS,
) -> Outcome:
    """Run the cells that are not finished and wait for those that other commands run.

    A cell that failed, by an error or because its process died, does not stop the others; the next
    command tries it again.

    Args:
        cells: checked by `check_cells`.
        jobs: processes; each takes cell after cell and keeps backbone, images and features. With
            1 the cells run in this process.
        threads: of each process; None divides the cores (one job: leaves them as they are).
        device: where to train.
        plot: draw each run's pictures.
        on_event: called in this process.
        bench: to share with other calls, where the cells run in this process.
        state_seconds: see `train_run`.
    """
    for parent in {cell.folder.parent for cell in cells}:
        (parent / ".locks").mkdir(parents=True, exist_ok=True)
    failures: dict[int, str] = {}

    def tell(event: Event) -> None:
        if event.kind == "failed":
            failures[event.index] = event.message
        on_event(event)

    todo = [index for index, cell in enumerate(cells) if cell.result() is None]
    if jobs == 1 or len(todo) < 2:
        options = _Options(device, plot, threads, state_seconds)
        _run_here(cells, todo, options, tell, bench)
    else:
        jobs = min(jobs, len(todo))
        options = _Options(device, plot, threads or default_threads(jobs), state_seconds)
        _Team(cells, jobs, options, tell).run(todo)
    return Outcome([cell.result() for cell in cells], failures)


def _run_here(
    cells: Sequence[Cell],
    todo: Sequence[int],
    options: _Options,
    tell: OnEvent,
    bench: Workbench | None,
) -> None:
    bench = Workbench(options.device) if bench is None else bench
    while todo:
        held = []
        for index in todo:
            event = _attempt(index, cells[index], options, bench, tell)
            tell(event)
            if event.kind == "held":
                held.append(index)
        todo = held
        if todo:
            time.sleep(LOOK_AGAIN_SECONDS)


def _attempt(index: int, cell: Cell, options: _Options, bench: Workbench, tell: OnEvent) -> Event:
    """Run a cell unless another process holds or has finished it; the event says what became."""
    try:
        with _claimed(cell) as mine:
            if not mine:
                return Event(index, "held")
            if cell.result() is not None:
                return Event(index, "elsewhere")
            return _run_cell(index, cell, options, bench, tell)
    except UserError as error:
        return Event(index, "failed", message=str(error))
    except (RuntimeError, ArithmeticError, MemoryError, OSError) as error:
        where = traceback.extract_tb(error.__traceback__)[-1]
        message = f"{type(error).__name__}: {error} ({where.filename}:{where.lineno})"
        return Event(index, "failed", message=message)


def _claimed(cell: Cell) -> AbstractContextManager[bool]:
    cell.lock.parent.mkdir(parents=True, exist_ok=True)
    return claim(cell.lock)


def _run_cell(index: int, cell: Cell, options: _Options, bench: Workbench, tell: OnEvent) -> Event:
    def on_epoch(state: FitState) -> None:
        row = state.history[-1]
        tell(Event(index, "epoch", row["epoch"], row["validation_accuracy"], state=state))

    if not (cell.folder / "result.json").is_file():
        if not (cell.folder / "config.json").is_file():
            prepare_folder(cell.folder, cell.config, resume=False, overwrite=False)
        train_run(
            cell.folder,
            cell.config,
            test=False,
            bench=bench,
            on_epoch=on_epoch,
            plot=options.plot and not cell.test,
            state_seconds=options.state_seconds,
        )
    if cell.test:
        measure_run(cell.folder, bench=bench, plot=options.plot)
    result = cell.result() or {}
    return Event(index, "done", result.get("epochs", 0), result["validation_accuracy"])


@dataclass
class _Worker:
    """A process, its pipe, and the cell that it has at hand."""

    process: Any
    pipe: Connection
    current: int | None = None
    ready: bool = False


class _Team:
    """Processes that are handed one cell after the other.

    Each has a pipe of its own: with a queue that all write to, a process that is killed while it
    writes would keep the queue's lock.
    """

    def __init__(self, cells: Sequence[Cell], jobs: int, options: _Options, tell: OnEvent) -> None:
        self._cells, self._options, self._tell = cells, options, tell
        self._context = multiprocessing.get_context("spawn")
        self._pending: deque[int] = deque()
        self._held: list[int] = []
        self._look_again = 0.0
        self._workers = [self._start() for _ in range(jobs)]

    def run(self, todo: Sequence[int]) -> None:
        self._pending.extend(todo)
        try:
            while self._pending or self._held or any(w.current is not None for w in self._workers):
                if self._held and time.monotonic() >= self._look_again:
                    self._pending.extend(self._held)
                    self._held.clear()
                for worker in self._workers:
                    if worker.current is None and worker.ready and self._pending:
                        worker.current = self._pending.popleft()
                        with suppress(OSError):  # if it has died, its pipe's end will say so
                            worker.pipe.send(worker.current)
                pipes = [worker.pipe for worker in self._workers]
                for pipe in wait(pipes, timeout=0.2):
                    self._hear(next(w for w in self._workers if w.pipe is pipe))
        finally:
            for worker in self._workers:
                worker.process.terminate()
            for worker in self._workers:
                worker.process.join()

    def _start(self) -> _Worker:
        ours, theirs = self._context.Pipe()
        process = self._context.Process(
            target=_work, args=(theirs, self._cells, self._options), daemon=True
        )
        # OpenMP reads it when torch is loaded, which is before the process could set it itself.
        with _environment("OMP_NUM_THREADS", str(self._options.threads)):
            process.start()
        theirs.close()
        return _Worker(process, ours)

    def _hear(self, worker: _Worker) -> None:
        try:
            event = worker.pipe.recv()
        except (EOFError, OSError):
            self._replace(worker)
            return
        if event is None:
            worker.ready = True
            return
        if event.kind != "epoch":
            worker.current = None
        if event.kind == "held":
            self._held.append(event.index)
            self._look_again = time.monotonic() + LOOK_AGAIN_SECONDS
        self._tell(event)

    def _replace(self, worker: _Worker) -> None:
        worker.process.join()
        code = worker.process.exitcode
        how = f"signal {-code}" if code < 0 else f"exit code {code}"
        if not worker.ready:
            raise UserError(f"a worker process could not start ({how}); its message is above")
        if worker.current is not None:
            message = f"its process ended by {how} (out of memory?)"
            self._tell(Event(worker.current, "failed", message=message))
        self._workers[self._workers.index(worker)] = self._start()


@contextmanager
def _environment(name: str, value: str) -> Iterator[None]:
    before = os.environ.get(name)
    os.environ[name] = value
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


def _work(pipe: Connection, cells: Sequence[Cell], options: _Options) -> None:
    """A worker's life: cells by their index, until the pipe ends."""
    torch.set_num_threads(options.threads or 1)
    bench = Workbench(options.device)
    told = time.monotonic()

    def send(event: Event | None) -> None:
        try:
            pipe.send(event)
        except OSError:  # the command that started this process is gone
            os._exit(1)

    def tell(event: Event) -> None:
        nonlocal told
        if time.monotonic() - told >= REPORT_SECONDS:
            told = time.monotonic()
            send(replace(event, state=None))

    try:
        send(None)
        while True:
            index = pipe.recv()
            send(_attempt(index, cells[index], options, bench, tell))
    except (EOFError, KeyboardInterrupt):
        pass
