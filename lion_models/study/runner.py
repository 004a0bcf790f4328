"""Run many trials, in this process or in several that are kept for all of them."""

from __future__ import annotations

import multiprocessing
import os
import time
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection, wait
from typing import Any

import torch

from lion_models.base.errors import UserError
from lion_models.study.trial import Event, OnEvent, Outcome, Trial, TrialOptions, attempt

__all__ = ["TrialRunner"]

LOOK_AGAIN_SECONDS = 1.0
REPORT_SECONDS = 0.5
END_SECONDS = 10.0  # that an idle process has to end by itself


class TrialRunner:
    """Runs trials that are not finished and waits for those that other commands run.

    A trial that failed, by an error or because its process died, does not stop the others; the
    next command tries it again. Use it in a `with` statement, which ends its processes.

    Args:
        jobs: processes; each takes trial after trial and keeps backbones, images and features.
            With 1 the trials run in this process.
        threads: of each process; None divides the cores (one job: leaves them as they are).
        options: device, pictures, and how often a state is saved.
    """

    def __init__(
        self, jobs: int = 1, threads: int | None = None, options: TrialOptions | None = None
    ) -> None:
        if jobs < 1:
            raise UserError(f"`jobs`: expected 1 or more, got {jobs}")
        self._jobs = jobs
        self._threads = threads or max(1, len(os.sched_getaffinity(0)) // jobs)
        self._options = options or TrialOptions()
        self._team: _Team | None = None
        self.bench = self._options.bench()

    def __enter__(self) -> TrialRunner:
        return self

    def __exit__(self, *_: object) -> None:
        if self._team is not None:
            self._team.end()
            self._team = None

    def run(self, trials: Sequence[Trial], on_event: OnEvent = lambda event: None) -> Outcome:
        """Run what is missing of `trials`, which `check_trials` has seen.

        Args:
            trials: in the order in which they are begun.
            on_event: called in this process with what happens.
        """
        failures: dict[int, str] = {}

        def tell(event: Event) -> None:
            if event.kind == "failed":
                failures[event.index] = event.message
            on_event(event)

        todo = [index for index, trial in enumerate(trials) if trial.result() is None]
        if self._jobs == 1:
            self._run_here(trials, todo, tell)
        elif todo:
            if self._team is None:
                self._team = _Team(self._jobs, self._threads, self._options)
            self._team.run(trials, todo, tell)
        results = [trial.result() for trial in trials]
        for index, trial in enumerate(trials):
            if results[index] is None and index not in failures:
                why = trial.conflict() or f"{trial.folder} was removed while the command ran"
                tell(Event(index, "failed", message=why))
        return Outcome(results, failures)

    def _run_here(self, trials: Sequence[Trial], todo: Sequence[int], tell: OnEvent) -> None:
        while todo:
            held = []
            for index in todo:
                event = attempt(index, trials[index], self._options, self.bench, tell)
                tell(event)
                if event.kind == "held":
                    held.append(index)
            todo = held
            if todo:
                time.sleep(LOOK_AGAIN_SECONDS)


@dataclass
class _Worker:
    """A process, its pipe, and the trial that it has at hand."""

    process: Any
    pipe: Connection
    current: int | None = None
    ready: bool = False


class _Team:
    """Processes that are handed one trial after the other.

    Each has a pipe of its own: with a queue that all write to, a process that is killed while it
    writes would keep the queue's lock.
    """

    def __init__(self, jobs: int, threads: int, options: TrialOptions) -> None:
        self._threads, self._options = threads, options
        self._context = multiprocessing.get_context("spawn")
        self._workers: list[_Worker] = []
        self._jobs = jobs

    def run(self, trials: Sequence[Trial], todo: Sequence[int], tell: OnEvent) -> None:
        pending, held = deque(todo), deque[int]()
        look_again = 0.0
        while len(self._workers) < min(self._jobs, len(todo)):
            self._workers.append(self._start())
        while pending or held or any(worker.current is not None for worker in self._workers):
            if held and time.monotonic() >= look_again:
                pending.extend(held)
                held.clear()
            for worker in self._workers:
                if worker.current is None and worker.ready and pending:
                    worker.current = pending.popleft()
                    with suppress(OSError):  # if it has died, the end of its pipe will say so
                        worker.pipe.send((worker.current, trials[worker.current]))
            for pipe in wait([worker.pipe for worker in self._workers], timeout=0.2):
                event = self._hear(next(w for w in self._workers if w.pipe is pipe))
                if event is not None:
                    tell(event)
                    if event.kind == "held":
                        held.append(event.index)
                        look_again = time.monotonic() + LOOK_AGAIN_SECONDS

    def end(self) -> None:
        """End all processes: idle ones by themselves, as terminated ones leave locks behind."""
        for worker in self._workers:
            worker.pipe.close()
            if worker.current is not None or not worker.ready:
                worker.process.terminate()
        for worker in self._workers:
            worker.process.join(END_SECONDS)
            worker.process.terminate()
            worker.process.join()

    def _start(self) -> _Worker:
        ours, theirs = self._context.Pipe()
        # Not a daemon, which could have no processes of its own to decode images.
        process = self._context.Process(
            target=_work, args=(theirs, self._threads, self._options), daemon=False
        )
        # OpenMP reads it when torch is loaded, which is before the process could set it itself.
        with _environment("OMP_NUM_THREADS", str(self._threads)):
            process.start()
        theirs.close()
        return _Worker(process, ours)

    def _hear(self, worker: _Worker) -> Event | None:
        try:
            event: Event | None = worker.pipe.recv()
        except (EOFError, OSError):
            return self._replace(worker)
        if event is None:
            worker.ready = True
        elif event.kind != "epoch":
            worker.current = None
        return event

    def _replace(self, worker: _Worker) -> Event | None:
        """Start another process for one that died; the event says what became of its trial."""
        worker.process.join()
        code = worker.process.exitcode
        how = f"signal {-code}" if code < 0 else f"exit code {code}"
        if not worker.ready:
            raise UserError(f"a worker process could not start ({how}); its message is above")
        self._workers[self._workers.index(worker)] = self._start()
        if worker.current is None:
            return None
        message = f"its process ended by {how}; was it killed, or out of memory?"
        return Event(worker.current, "failed", message=message)


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


def _work(pipe: Connection, threads: int, options: TrialOptions) -> None:
    """A worker's life: trials, until the pipe ends."""
    torch.set_num_threads(threads)
    bench = options.bench()
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
            index, trial = pipe.recv()
            send(attempt(index, trial, options, bench, tell))
    except (EOFError, KeyboardInterrupt):
        pass
