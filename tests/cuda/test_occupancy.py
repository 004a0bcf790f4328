"""Launches, and what fits a multiprocessor, against what an H200's counters said of each."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from tests.support.problems import equal
from tests.support.step_cases import anderson_case
from tools.occupancy import GPUS, LaunchRecorder, works

# Threads, registers and bytes of shared memory; the counters' waves for so many blocks.
MEASURED = {
    "anderson_push_chunk": (256, 72, 992, 1184, 2.99),
    "anderson_whole_row": (256, 124, 992, 256, 0.97),
    "anderson_whole_row, short rows": (128, 124, 2624, 1024, 1.94),
    "broyden_push_chunk": (256, 122, 12952, 1184, 4.48),
    "masked_linear_prepare": (128, 32, 4224, 47252, 22.37),
    "masked_linear_product": (512, 118, 98304, 1024, 7.76),
    "masked_outer_product": (256, 76, 98304, 688, 2.61),
    "masked_linear_by_blocks": (128, 252, 81920, 2048, 7.76),
}


@pytest.fixture(scope="module")
def recorder(sector_counter) -> Iterator[LaunchRecorder]:
    found = LaunchRecorder(sector_counter.library)
    yield found
    found.run_kernels()


@pytest.mark.parametrize("name", MEASURED)
def test_waves_are_those_that_the_counters_gave(name):
    threads, registers, shared, blocks, waves = MEASURED[name]
    h200 = GPUS["sm_90a"]
    fitting = h200.fitting(threads, registers, shared)
    assert blocks / (fitting * h200.count) == pytest.approx(waves, abs=0.006)


def test_too_much_for_one_multiprocessor_fits_not_once():
    assert GPUS["sm_80"].fitting(1024, 65, 0) == 0
    assert GPUS["sm_80"].fitting(128, 32, 164 * 1024) == 0
    assert GPUS["sm_80"].fitting(32, 16, 0) == 32


def test_every_benchmark_launches_kernels_that_are_there(recorder):
    for work, launches in works(recorder):
        assert 1 <= len(launches) <= 2, work
        for launch in launches:
            assert launch.kernel.startswith(work.split()[0].lower()), work
            assert launch.threads % 32 == 0


def test_the_kernels_themselves_do_not_run(recorder):
    case = anderson_case(2, 300, 3, torch.float32, 1)
    before = {name: tensor.clone() for name, tensor in case.tensors.items()}
    traffic = recorder.step("anderson_step", "warp")(*case.args)
    assert (traffic.launches, traffic.read, traffic.written) == (1, 0, 0)
    for name, tensor in case.tensors.items():
        assert equal(tensor, before[name]), name
    recorder.run_kernels()
    assert recorder.step("anderson_step", "warp")(*case.args).written > 0
    recorder.run_no_kernels()
