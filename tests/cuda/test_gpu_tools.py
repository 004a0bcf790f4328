"""What the tools for CUDA conclude from a compiler's or a sanitizer's words."""

from __future__ import annotations

import cuda_build
import gpu_check
import pytest

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


def test_the_parts_fit_into_nine_minutes():
    assert sum(gpu_check.SECONDS.values()) < 9 * 60
