"""The sweep: what it runs, what it chooses, what it reads, and who may run a trial."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from lion_models.base.errors import UserError
from lion_models.base.files import claim, holding, run_lock
from lion_models.cli.progress import TrialBars
from lion_models.run import Run
from lion_models.run.config import all_options, run_of
from lion_models.study.plan import Axis, Plan, parse_axis
from lion_models.study.presets import run_comparison, run_sweep
from lion_models.study.runner import TrialRunner
from lion_models.study.trial import Event, Trial, TrialOptions
from tests.support.command import Lion


@pytest.fixture
def base(image_folder: Path, backbone_file: Path) -> dict[str, Any]:
    return all_options(
        data=str(image_folder),
        backbone=str(backbone_file),
        shots=3,
        validation_shots=3,
        epochs=2,
        batch=8,
        hidden=4,
        prompts=2,
    )


def quick(jobs: int = 1) -> TrialRunner:
    return TrialRunner(jobs, 1, TrialOptions(plot=False, state_seconds=0))


@pytest.fixture(scope="module")
def team() -> Iterator[TrialRunner]:
    """Two processes for all tests that need several: starting one takes longer than most tests."""
    with quick(2) as runner:
        yield runner


def trials_of(folder: Path, base: dict[str, Any], count: int) -> list[Trial]:
    return [
        Trial(folder / f"s{seed}", run_of(base, seed=seed, method="linear").resolved())
        for seed in range(count)
    ]


@pytest.mark.drawn
def test_sweep_command_makes_a_table_json_and_picture_and_never_reads_the_test_set(
    lion: Lion, base: dict[str, Any], tmp_path: Path
):
    arguments = ("sweep", "--data", base["data"], "--backbone", base["backbone"], "--shots", 3,
                 "--validation-shots", 3, "--epochs", 2, "--methods", "linear,lion",
                 "--grid", "lr=0.001,0.05", "--grid", "lion.hidden=2,4", "--seeds", "1,2",
                 "--runs", tmp_path, "--name", "s")  # fmt: skip
    done = lion(*arguments)
    assert done.code == 0, done.err
    assert "validation" in done.out
    written = json.loads((tmp_path / "s" / "sweep.json").read_text())
    assert len(written["cells"]) == 2 * 2 + 4 * 2
    accuracies = [one["validation_accuracy"] for one in written["settings"]]
    assert accuracies == sorted(accuracies, reverse=True)
    assert [one["method"] for one in written["chosen"]] in (["linear", "lion"], ["lion", "linear"])
    assert (tmp_path / "s" / "sweep.png").stat().st_size > 10_000
    assert not list((tmp_path / "s").rglob("test.json"))
    assert not list((tmp_path / "s").rglob("*.part"))
    assert not list((tmp_path / "s").glob("tested.*"))

    tested = lion(*arguments, "--test-best", "--test-seeds", "2,3")
    assert tested.code == 0, tested.err
    assert "wrote sweep.json, sweep.png, tested.md, tested.png" in tested.out
    assert "| lion |" in (tmp_path / "s" / "tested.md").read_text()
    assert (tmp_path / "s" / "tested.png").stat().st_size > 5_000
    written = json.loads((tmp_path / "s" / "sweep.json").read_text())
    read = {path.parent.name for path in (tmp_path / "s").rglob("test.json")}
    assert read == {run for one in written["tested"] for run in one["runs"]}
    assert len(read) == 4
    for one in written["tested"]:
        means = [json.loads((tmp_path / "s" / run / "test.json").read_text())["accuracy"]
                 for run in one["runs"]]  # fmt: skip
        assert one["test_accuracy"] == pytest.approx(sum(means) / 2)


def test_choice_is_the_best_mean_validation_accuracy_of_each_condition(
    base: dict[str, Any], tmp_path: Path
):
    plan = Plan(base, ("linear",), (1, 2), (Axis("lr", (1e-5, 0.05)),), (Axis("shots", (2, 3)),))
    with quick() as runner:
        content = run_sweep(tmp_path, plan, runner)
    for condition in ({"shots": 2}, {"shots": 3}):
        own = [one for one in content["settings"] if one["condition"] == condition]
        best = max(own, key=lambda one: (one["validation_accuracy"], -one["validation_loss"]))
        assert [one for one in content["chosen"] if one["condition"] == condition] == [best]
        for one in own:
            of_runs = [json.loads((tmp_path / run / "result.json").read_text())
                       for run in one["runs"]]  # fmt: skip
            mean = sum(result["validation_accuracy"] for result in of_runs) / 2
            assert one["validation_accuracy"] == pytest.approx(mean)
    assert {json.loads((path).read_text())["shots"] for path in tmp_path.glob("*/config.json")} == {
        2, 3}  # fmt: skip


def test_finished_trials_are_skipped_and_interrupted_ones_go_on(
    base: dict[str, Any], tmp_path: Path
):
    trials = trials_of(tmp_path, base | {"epochs": 4}, 2)

    def stop(event: Event) -> None:
        if event.index == 1 and event.epoch == 2:
            raise KeyboardInterrupt

    with quick() as runner, pytest.raises(KeyboardInterrupt):
        runner.run(trials, stop)
    stamp = (trials[0].folder / "result.json").stat().st_mtime_ns
    seen: list[tuple[int, int]] = []
    with quick() as runner:
        outcome = runner.run(
            trials, lambda e: seen.append((e.index, e.epoch)) if e.kind == "epoch" else None
        )
    assert seen == [(1, 3), (1, 4)]
    assert not outcome.failures
    assert (trials[0].folder / "result.json").stat().st_mtime_ns == stamp


def test_processes_share_the_trials_and_a_failed_trial_stops_no_other(
    base: dict[str, Any], team: TrialRunner, tmp_path: Path
):
    trials = trials_of(tmp_path, base, 4)
    trials[1] = Trial(trials[1].folder, trials[1].config.but(shots=400))
    outcome = team.run(trials)
    again = team.run(trials)  # only the failed trial is tried
    assert [result is None for result in outcome.results] == [False, True, False, False]
    assert list(outcome.failures) == [1]
    assert "lower `shots`" in outcome.failures[1]
    assert again.failures == outcome.failures
    with quick(1) as runner:
        alone = runner.run([Trial(tmp_path / "alone", trials[2].config)])
    assert alone.results[0] is not None
    trained = [(folder / "checkpoint.safetensors").read_bytes()
               for folder in (tmp_path / "alone", trials[2].folder)]  # fmt: skip
    assert trained[0] == trained[1]


def test_idle_workers_end_by_themselves_and_busy_ones_are_ended(
    base: dict[str, Any], tmp_path: Path
):
    """A process that is terminated leaves its locks behind, and Python warns of each."""
    others = set(multiprocessing.active_children())  # the team of the tests around this one
    with quick(2) as runner:
        runner.run(trials_of(tmp_path / "idle", base, 3))
        assert runner._team is not None
        workers = list(runner._team._workers)
    # One may have done all while the other was still starting, with no lock to leave behind.
    assert any(worker.ready for worker in workers)
    for worker in workers:
        assert worker.process.exitcode == (0 if worker.ready else -signal.SIGTERM)

    def give_up(event: Event) -> None:
        raise StopIteration

    endless = trials_of(tmp_path / "busy", base | {"epochs": 10**6}, 2)
    begun = time.monotonic()
    with pytest.raises(StopIteration), quick(2) as runner:
        runner.run(endless, give_up)
    assert set(multiprocessing.active_children()) == others
    assert time.monotonic() - begun < 60


def test_worker_that_is_killed_loses_its_cell_alone(
    base: dict[str, Any], team: TrialRunner, tmp_path: Path
):
    trials = trials_of(tmp_path, base | {"epochs": 400}, 1) + trials_of(tmp_path / "b", base, 2)
    killed = []

    def kill(event: Event) -> None:
        if event.index == 0 and event.kind == "epoch" and not killed:
            holder = int(run_lock(trials[0].folder).read_text().split()[1])
            os.kill(holder, signal.SIGKILL)
            killed.append(holder)

    outcome = team.run(trials, kill)
    assert killed
    assert list(outcome.failures) == [0]
    assert "ended by signal 9" in outcome.failures[0]
    assert all(result is not None for result in outcome.results[1:])


def test_progress_in_a_file_is_a_few_lines_with_the_last_state(
    base: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    trials = trials_of(tmp_path, base | {"epochs": 100}, 50)
    with TrialBars(2) as bars:
        hear = bars.together(trials)
        for index in range(len(trials)):
            for epoch in range(1, 101):
                hear(Event(index, "epoch", epoch, 0.5))
            hear(Event(index, "done", 100, 0.5))
    shown = capsys.readouterr().err
    assert "5000/5000" in shown
    assert "done=50/50, best val=50.0%" in shown
    assert shown.count("\r") < 10


def test_lock_of_a_living_process_holds_and_that_of_a_killed_one_is_free(tmp_path: Path):
    lock = tmp_path / "a.lock"
    ready, tell = os.pipe()
    holder = os.fork()
    if holder == 0:
        with claim(lock) as mine:
            os.write(tell, b"1" if mine else b"0")
            time.sleep(60)
        os._exit(1)
    assert os.read(ready, 1) == b"1"
    with claim(lock) as mine:
        assert not mine
    assert int(lock.read_text().split()[1]) == holder
    os.kill(holder, signal.SIGKILL)
    os.waitpid(holder, 0)
    with claim(lock) as mine:
        assert mine
    assert int(lock.read_text().split()[1]) == os.getpid()


def test_run_that_another_process_trains_is_neither_continued_nor_replaced(
    lion: Lion, trained: Path
):
    config = json.loads((trained / "config.json").read_text())
    with holding(trained):
        for option in ("--resume", "--overwrite"):
            refused = lion("train", "--data", config["data"], "--backbone", config["backbone"],
                           "--name", trained.name, "--runs", trained.parent, "--shots", 4,
                           "--validation-shots", 3, option)  # fmt: skip
            assert refused.code == 2
            assert f"another process (host and process: {socket.gethostname()} {os.getpid()})" in (
                refused.err
            )
    assert (trained / "result.json").exists()


def test_cell_of_another_command_is_waited_for(base: dict[str, Any], tmp_path: Path):
    [trial] = trials_of(tmp_path, base, 1)
    held = []
    with quick() as runner, claim(run_lock(trial.folder)):

        def hear(event: Event) -> None:
            held.append(event.kind)
            if held != ["held"]:
                return
            Run(trial.folder, trial.config).prepare()
            (trial.folder / "result.json").write_text('{"validation_accuracy": 0.5}')

        outcome = runner.run([trial], hear)
    assert held[0] == "held"
    assert outcome.results == [{"validation_accuracy": 0.5}]


def test_sweep_killed_at_any_time_ends_as_if_it_had_not_been(
    base: dict[str, Any], tmp_path: Path, image_folder: Path
):
    command = [sys.executable, "-m", "lion_models", "sweep", "--data", base["data"], "--backbone",
               base["backbone"], "--shots", "3", "--validation-shots", "3", "--epochs", "30",
               "--methods", "lion", "--grid", "lr=0.01,0.02,0.03", "--runs", str(tmp_path),
               "--name", "s", "--jobs", "2"]  # fmt: skip
    with subprocess.Popen(command, stderr=subprocess.DEVNULL) as process:
        deadline = time.monotonic() + 120
        while len(list((tmp_path / "s").glob("*/result.json"))) < 1:
            assert time.monotonic() < deadline
            time.sleep(0.02)
        process.send_signal(signal.SIGKILL)
    finished = {p: p.stat().st_mtime_ns for p in (tmp_path / "s").glob("*/result.json")}
    assert 1 <= len(finished) < 3
    plan = Plan(base | {"epochs": 30, "hidden": 8, "batch": 64}, ("lion",), (42,),
                (Axis("lr", (0.01, 0.02, 0.03)),))  # fmt: skip
    with quick() as runner:
        plan = replace(plan, base=plan.base | {"prompts": 10})
        content = run_sweep(tmp_path / "s", plan, runner)
    assert not content["failed"]
    assert all(path.stat().st_mtime_ns == stamp for path, stamp in finished.items())
    assert all(trial["epochs"] == 30 for trial in content["cells"])


@pytest.mark.parametrize(
    ("text", "axis"),
    [
        ("lr=0.01,0.03", Axis("lr", (0.01, 0.03))),
        ("lion.hidden=4,8", Axis("hidden", (4, 8), "lion")),
        ("weight-decay=0,1e-2", Axis("weight_decay", (0.0, 0.01))),
        ("augment=none,affine", Axis("augment", ("none", "affine"))),
        ("shots=5,all", Axis("shots", (5, None))),
        ("iterations=none,3", Axis("iterations", (None, 3))),
    ],
)
def test_axis_is_read_by_the_type_of_its_option(text: str, axis: Axis):
    assert parse_axis("grid", text) == axis


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("lr", "expected OPTION=VALUE,VALUE"),
        ("lr=", "expected OPTION=VALUE,VALUE"),
        ("hiden=4", "did you mean 'hidden'"),
        ("loin.hidden=4", "did you mean 'lion'"),
        ("hidden=4.5", "hidden expects int, got '4.5'"),
        ("lr=0.1,0.1", "lr has a value twice"),
        ("seed=1,2", "seed has an option of its own, `seeds`"),
    ],
)
def test_bad_axes_are_named(text: str, message: str):
    with pytest.raises(UserError, match=message):
        parse_axis("grid", text)


def test_options_of_one_method_do_not_repeat_the_runs_of_another():
    axes = (Axis("lr", (1.0, 2.0)), Axis("hidden", (4, 8)), Axis("rtol", (1e-3,), "lion"))
    plan = Plan(all_options(data="digits"), ("linear", "lion"), (1,), axes)
    assert plan.settings("linear") == [{"lr": 1.0}, {"lr": 2.0}]
    assert len(plan.settings("lion")) == 4


def test_axis_of_one_method_stands_in_for_that_of_all(base: dict[str, Any]):
    grid = (Axis("lr", (0.01, 0.03)), Axis("lr", (0.003,), "lion"), Axis("hidden", (2, 4)))
    plan = Plan(base, ("linear", "lion"), (1,), grid)
    assert plan.settings("linear") == [{"lr": 0.01}, {"lr": 0.03}]
    assert plan.settings("lion") == [{"lr": 0.003, "hidden": 2}, {"lr": 0.003, "hidden": 4}]


def test_bad_sweeps_are_named_before_anything_is_written(
    lion: Lion, base: dict[str, Any], tmp_path: Path
):
    for arguments, message in [
        (("--data", "digit"), "did you mean 'digits'?"),
        (("--data", base["data"], "--jobs", 0), "--jobs: expected 1 or more, got 0"),
        (("--data", base["data"], "--test-seeds", "1"), "goes with --test-best"),
        (("--data", base["data"], "--seeds", "1,2,1"), "--seeds: 1 is there twice"),
        (("--data", base["data"], "--methods", "lion,lion"), "--methods: lion is there twice"),
        (("--data", base["data"], "--backbone", base["backbone"], "--shots", 3, "--pad", 6,
          "--methods", "linear,vpt-pad"), "--pad"),
        (("--data", base["data"], "--grid", "hidden=0"), "--hidden: expected 1 or more, got 0"),
        (("--data", base["data"], "--over", "shots=5,900", "--backbone", base["backbone"]),
         "lower --shots"),
    ]:  # fmt: skip
        outcome = lion("sweep", *arguments, "--runs", tmp_path)
        assert outcome.code == 2, outcome.out
        assert message in outcome.err
    assert not list(tmp_path.rglob("config.json"))


def test_sweep_refuses_a_folder_of_other_options(lion: Lion, base: dict[str, Any], tmp_path: Path):
    arguments = ("sweep", "--data", base["data"], "--backbone", base["backbone"], "--shots", 3,
                 "--validation-shots", 2, "--methods", "linear", "--runs", tmp_path)  # fmt: skip
    assert lion(*arguments, "--epochs", 1).code == 0
    refused = lion(*arguments, "--epochs", 2)
    assert refused.code == 2
    assert "was run with other options; use --overwrite" in refused.err
    replaced = lion(*arguments, "--epochs", 2, "--overwrite")
    assert replaced.code == 0, replaced.err


def test_compare_gives_the_same_figures_with_several_processes(
    base: dict[str, Any], team: TrialRunner, tmp_path: Path
):
    figures = []
    for name, runner in (("one", quick()), ("two", team)):
        content = run_comparison(
            tmp_path / name, base, ["linear", "vpt-deep"], [1], [0.01, 0.05], runner=runner
        )
        figures.append([(c["run"], c["test_accuracy"], c["curve"]) for c in content["cells"]])
    assert len(figures[0]) == 2
    assert figures[0] == figures[1]
