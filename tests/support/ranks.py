"""Two processes of torch.distributed, for what only they show."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from tests.support.environments import ROOT


def run_on_two_ranks(call: str, folder: Path) -> None:
    """Run ``call(rank, store)``, a dotted name, in two processes; both must end well.

    Args:
        call: a function of a module, "tests.adjoints.test_x.run_rank".
        folder: an empty one, for the file by which the two find each other.
    """
    module, _, name = call.rpartition(".")
    code = f"from {module} import {name}; {name}({{}}, {str(folder / 'store')!r})"
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", code.format(rank)],
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=ROOT,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )
        for rank in range(2)
    ]  # fmt: skip
    try:
        outputs = [rank.communicate(timeout=300)[0] for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    for rank, output in zip(ranks, outputs, strict=True):
        assert rank.returncode == 0, output
