"""What the tools for CUDA conclude from a compiler's or a sanitizer's words."""

from __future__ import annotations

import json
import sys
import time
import types

import pytest
import torch

from benchmarks import gpu as gpu_benchmarks
from benchmarks import gpu_solvers
from benchmarks.gpu_bench import Bench
from benchmarks.harness import Report, Result
from deqcore import _kernels
from tools import cuda_build, gpu_check

PTXAS = """
ptxas info    : Compiling entry function '_ZN7deqcore4cuda4goodEi' for 'sm_90'
ptxas info    : Function properties for _ZN7deqcore4cuda4goodEi
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 64 registers, used 1 barriers, 128 bytes smem
ptxas info    : Compiling entry function '_ZN7deqcore4cuda5spillEi' for 'sm_80'
ptxas info    : Function properties for _ZN7deqcore4cuda5spillEi
    0 bytes stack frame, 8 bytes spill stores, 4 bytes spill loads
ptxas info    : Used 128 registers, used 1 barriers
ptxas info    : Compiling entry function '_ZN7deqcore4cuda5arrayEi' for 'sm_80'
ptxas info    : Function properties for _ZN7deqcore4cuda5arrayEi
    512 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 40 registers, used 0 barriers
"""


def test_a_spill_or_a_local_array_is_found_in_the_assemblers_report():
    good, spill, array = cuda_build.read_report(PTXAS)
    assert (good.architecture, good.registers, good.static_shared, good.fine) == (
        "sm_90", 64, 128, True,
    )  # fmt: skip
    assert (spill.spills, spill.fine) == (12, False)
    assert (array.stack, array.fine) == (512, False)


PTX = """
.visible .entry _ZN7deqcore4cuda4goodEi(
	ld.param.u64 	%rd1, [x];
	ld.global.v4.f32 	{%f1, %f2, %f3, %f4}, [%rd1];
	@%p1 ld.global.nc.v4.u32 {%r1, %r2, %r3, %r4}, [%rd1+16];
	ld.global.cs.v2.u32 {%r1, %r2}, [%rd2];
	ld.shared.u32 	%r9, [%r1];
	st.global.u16 	[%rd3], %rs1;
	st.global.u16 	[%rd3+2], %rs2;
	st.global.v4.b32 [%rd4], {%r1, %r2, %r3, %r4};
.visible .entry _ZN7deqcore4cuda5spillEi(
"""


def test_widths_of_loads_and_stores_are_found_in_ptx():
    good, spill, array = cuda_build.read_report(PTXAS, PTX)
    assert (good.loads, good.stores) == ("16x2 8x1", "16x1 2x2")
    assert (spill.loads, spill.stores, array.loads) == ("", "", "")


CASES_RAN = "40 steps on cuda are as exact as their references\n"


@pytest.mark.parametrize(
    ("status", "text", "outcome"),
    [
        (0, CASES_RAN + "========= ERROR SUMMARY: 0 errors", "passed"),
        (
            0,
            CASES_RAN + "=== RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)",
            "passed",
        ),
        (9, CASES_RAN + "========= ERROR SUMMARY: 3 errors", "failed"),
        (
            9,
            CASES_RAN + "=== RACECHECK SUMMARY: 2 hazards displayed (2 errors, 0 warnings)",
            "failed",
        ),
        (0, CASES_RAN, "failed"),
        (1, "Traceback: AssertionError\n========= ERROR SUMMARY: 0 errors", "failed"),
        (1, "========= Error: Device not supported.", "refused"),
        (1, "Error: unable to launch the target: permission denied", "refused"),
        (0, "========= ERROR SUMMARY: 0 errors\n========= Device not supported", "refused"),
        (1, "", "failed"),
    ],
)
def test_a_sanitizer_is_clean_only_if_it_says_so_and_the_cases_ran(status, text, outcome):
    assert gpu_check.judge_sanitizer(status, text)[0] == outcome


def test_the_usual_parts_fit_into_twelve_minutes():
    assert sum(gpu_check.SECONDS[part] for part in gpu_check.USUAL) <= 12 * 60
    assert set(gpu_check.SECONDS) == set(gpu_check.PARTS)


@pytest.mark.parametrize(
    ("status", "text", "outcome"),
    [
        (0, "..s\n2 passed, 1 skipped in 3.21s\n[W1124] a word of a library at its end", "passed"),
        (0, "==== 3 skipped in 0.51s ====", "none ran"),
        (5, "7 deselected in 0.51s", "none ran"),
        (1, "1 failed, 2 passed in 70.20s (0:01:10)", "failed"),
        (4, "ERROR: no such option", "failed"),
    ],
)
def test_tests_that_were_all_skipped_have_not_passed(status, text, outcome):
    assert gpu_check.judge_tests(status, text)[0] == outcome


@pytest.fixture
def check(tmp_path):
    return gpu_check.Check(tmp_path, rehearse=True, wheels=None, deadline=time.monotonic() + 60)


def test_a_step_out_of_time_is_ended_with_its_children_and_its_words_are_kept(check):
    child = "import time; time.sleep(60)"
    run = f"subprocess.run([sys.executable, '-c', {child!r}])"
    check.deadline = time.monotonic() + 2
    step = check.run(
        "slow", [sys.executable, "-c", f"import subprocess, sys; print('begun'); {run}"]
    )
    assert step.outcome == "out of time"
    assert step.seconds < 10  # not the child's 60
    assert "begun" in (check.out / "gpu_check.log").read_text()


def test_each_step_is_on_disk_when_it_ends_and_a_later_one_runs_in_any_case(check):
    check.run("broken", [sys.executable, "-c", "raise SystemExit('reason')"])
    written = json.loads((check.out / "gpu_check.json").read_text())["steps"]
    assert [(s["outcome"], s["detail"]) for s in written] == [("failed", "reason")]
    assert check.run("absent", ["/no/such/program"]).outcome == "absent"
    assert check.run("fine", [sys.executable, "-c", "print(1)"]).outcome == "passed"
    written = json.loads((check.out / "gpu_check.json").read_text())["steps"]
    assert [s["outcome"] for s in written] == ["failed", "absent", "passed"]


def test_a_long_output_is_cut_in_the_middle(check):
    check.run("talks", [sys.executable, "-c", "print('a' + 'x' * 3_000_000 + 'z')"])
    log = (check.out / "gpu_check.log").read_text()
    assert len(log) < 1.1 * gpu_check.KEPT
    assert "\nax" in log
    assert "xz\n" in log


def test_a_part_that_breaks_off_leaves_the_others_to_run(monkeypatch, tmp_path):
    def broken(check):
        raise SystemExit("no such thing")

    parts = {"build": broken, "test": lambda check: check.run("t", [sys.executable, "-c", "0"])}
    monkeypatch.setattr(gpu_check, "PARTS", parts)
    monkeypatch.setattr(
        sys, "argv", ["gpu_check", "--rehearse", "--only", "build,test", "--out", str(tmp_path)]
    )
    with pytest.raises(SystemExit):
        gpu_check.main()
    steps = json.loads((tmp_path / "gpu_check.json").read_text())["steps"]
    assert [(s["name"], s["outcome"]) for s in steps] == [("build", "failed"), ("t", "passed")]
    assert steps[0]["detail"] == "SystemExit: no such thing"


def test_each_gate_has_a_verdict_measured_or_not():
    rows = [
        {"work": "G1 Anderson step", "verdict": "met"},
        {"work": "G2 steps 1x2", "verdict": "met"},
        {"work": "G2 steps 3x4", "verdict": "MISSED"},
        {"work": "S1 blocks", "verdict": "met"},
        {"work": "G4 captured solve", "verdict": "-"},
    ]
    facts = {
        "G4": {"verdict": "met"},
        "G6": "needs a GPU",
        "failures": {"G5 30 steps against torchdeq": "ModuleNotFoundError: torchdeq"},
    }
    assert gpu_check.gate_verdicts({"results": rows, "facts": facts}) == {
        "G1": "met",
        "G2": "MISSED (1 of 2)",
        "G3": "not measured",
        "G4": "met",
        "G5": "not measured; ModuleNotFoundError: torchdeq",
        "G6": "not measured",
        "G7": "not measured",
        "S1": "met",
        **{f"S{number}": "not measured" for number in (2, 4, 5, 6, 7)},
    }
    assert set(gpu_check.gate_verdicts({}).values()) == {"not measured"}


def test_earlier_ratios_stand_beside_the_new_ones(tmp_path, capsys):
    """Also where the work has got a gate, and so its name in front, since."""
    report = Report()
    report.add(Result("steps 1x2", "peer", 2.0, 1.9, 2.1, 1.0, 2.0, "us"))
    report.write(tmp_path / "before.json")
    later = Report()
    later.compare_with(tmp_path / "before.json")
    later.add(Result("G3 steps 1x2", "peer", 3.0, 2.9, 3.1, 1.0, 3.0, "us", gate=2.5))
    later.add(Result("G3 steps 1x2", "another peer", 3.0, 2.9, 3.1, 1.0, 3.0, "us"))
    assert [result.note for result in later.results] == ["was 2.00x", ""]
    assert "was 2.00x" in capsys.readouterr().out


def test_a_benchmark_goes_on_without_a_peer_and_after_a_part_that_fails(monkeypatch, tmp_path):
    def no_peer(*args):
        raise ModuleNotFoundError("No module named 'torchdeq'")

    def broken(bench):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(gpu_solvers, "torchdeq_anderson", no_peer)
    monkeypatch.setitem(gpu_benchmarks.PARTS, "bandwidth", broken)
    target = tmp_path / "gpu.json"
    torch.manual_seed(1)  # not that of the free function, or x is a solution
    words = ["gpu", "bandwidth", "anderson", "accuracy", "--rehearse", "--out", str(target)]
    monkeypatch.setattr(sys, "argv", words)
    assert gpu_benchmarks.main() == 1
    written = json.loads(target.read_text())
    failures = written["facts"]["failures"]
    assert failures["G1 bandwidth"] == "RuntimeError: out of memory"
    assert sum(name.startswith("G2") for name in failures) == 3  # of four, two the same here
    assert sum(row["work"].startswith("G3") for row in written["results"]) == 3
    assert "G6" in written["facts"]
    assert gpu_check.gate_verdicts(written)["G6"] == "not measured"  # nor on a CPU


def test_what_cannot_be_timed_itself_is_a_failure_of_its_work():
    bench = Bench(Report(), "cpu", 1, 600)
    bench.compare("G3 work", {"ours": lambda: 1 / 0, "peer": lambda: None}, {})
    assert bench.report.facts["failures"] == {"G3 work": "ZeroDivisionError: division by zero"}
    assert not bench.report.results


def test_required_kernels_that_do_not_load_beside_a_gpu_are_an_error(monkeypatch):
    """Whatever the build says it left out: nothing, if it built them and they do not load."""
    monkeypatch.setattr(_kernels, "KERNELS_MODE", "require")
    monkeypatch.setattr(_kernels, "loaded", {})
    monkeypatch.setattr(_kernels, "missing", {})
    monkeypatch.setattr(_kernels, "_left_out_of_the_build", dict)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)

    def load(part, name):
        if part == "cuda":
            _kernels.missing[part] = "undefined symbol"
        else:
            _kernels.loaded[part] = {}

    monkeypatch.setattr(_kernels, "_load_module", load)
    there = types.SimpleNamespace(util=types.SimpleNamespace(find_spec=lambda name: True))
    monkeypatch.setattr(_kernels, "importlib", there)
    with pytest.raises(ImportError, match="CUDA kernels are missing: undefined symbol"):
        _kernels.load()
