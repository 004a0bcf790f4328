"""The joining of captured graphs, against a runtime that stands in for CUDA's on the host."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from tools import emulation

HERE = Path(__file__).parent
SANITIZERS = "-fsanitize=address,undefined"


@pytest.fixture(scope="module")
def lines(tmp_path_factory) -> list[list[str]]:
    """What the program says about each case: its name, its steps, what is left."""
    try:
        compiler = emulation._compiler()
    except emulation.CompilerMissingError as reason:
        pytest.skip(str(reason))
    program = tmp_path_factory.mktemp("solve_graph") / "program"
    sources = [f"-I{HERE / 'fake_runtime'}", f"-I{HERE.parents[1] / 'csrc'}"]
    flags = ["-std=c++20", "-g1", "-Wall", "-Wextra", "-Werror", SANITIZERS, *sources]
    source = str(HERE / "fake_runtime" / "solve_graph_program.cpp")
    subprocess.run([*compiler, *flags, source, "-o", str(program)], check=True)
    done = subprocess.run([program], check=True, capture_output=True, text=True)
    return [line.split("|") for line in done.stdout.splitlines()]


def steps(lines: list[list[str]], name: str) -> str:
    (line,) = (line for line in lines if line[0] == name)
    assert line[2] == "alive 0, taken 0"
    return line[1].strip()


def test_the_body_runs_while_rows_remain_and_anew_in_each_launch(lines):
    assert steps(lines, "early exit") == "fbbbl fbl fbbbbbl"
    assert steps(lines, "no last part") == "fbb"


def test_the_body_runs_once_even_if_no_row_is_active(lines):
    assert steps(lines, "nothing remains") == "fbl"


def test_a_row_that_never_ends_is_left_at_the_last_step_and_the_next_launch_is_whole(lines):
    assert steps(lines, "a row that never ends") == "fbbbbl fbbl fbbbbl"


def test_a_graph_of_fixed_length_takes_all_steps(lines):
    assert steps(lines, "fixed length") == "fbbbl fbbbl"


def test_each_call_that_fails_is_named_and_nothing_is_left_behind(lines):
    failures = [line[1] for line in lines if line[0] == "call fails"]
    names = [
        *["cudaGraphCreate", "cudaGraphAddChildGraphNode", "cudaGraphConditionalHandleCreate"],
        *["cudaGraphAddNode(conditional)", "cudaGraphAddChildGraphNode", "cudaGraphAddKernelNode"],
        *["cudaGraphAddChildGraphNode", "cudaGraphInstantiate", "cudaGraphLaunch"],
    ]
    expected = [f"error: deqcore.capture: {name}: the runtime's words" for name in names]
    assert failures == expected
    assert all(line[2].startswith("alive 0") for line in lines if len(line) > 1)


def test_an_old_driver_is_named_and_a_fixed_length_still_works(lines):
    reason = "this CUDA driver is older than 12.4"
    assert [reason] in lines
    assert steps(lines, "old driver") == f"error: deqcore.capture: {reason}"
    assert steps(lines, "old driver, fixed length") == "fbbl"
