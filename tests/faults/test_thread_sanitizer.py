"""The CPU kernels under ThreadSanitizer, and proof that it would see a race."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tools import sanitized_threads
from tools.sanitized_threads import RACE, ROOT

DEFECTS = {
    "all chunks write the first one's sums": (
        "cpu/step_work.h",
        "push(first, last, parts.data() + (first - begin) * width);",
        "push(first, last, parts.data());",
    ),
    "a decision that is shared by all rows": (
        "cpu/step_work.h",
        "      Decision decision;\n      for (int64_t row = begin",
        "      static Decision decision;\n      for (int64_t row = begin",
    ),
    "tiles that are transposed into one place": (
        "cpu/masked_outer.cpp",
        "transpose(args.left, entries.rows, lefts + i * left_bytes);",
        "transpose(args.left, entries.rows, lefts);",
    ),
}


def built(sources: Path = ROOT / "csrc") -> Path:
    try:
        return sanitized_threads.build(sources)
    except sanitized_threads.UnavailableError as reason:
        pytest.skip(str(reason))


def test_no_op_races_with_itself_or_with_another_call():
    done = sanitized_threads.run(built())
    assert done.returncode == 0, done.stdout + done.stderr
    assert "no race, and the same bits" in done.stdout
    assert "ThreadSanitizer" not in done.stderr


@pytest.mark.parametrize("name", DEFECTS)
def test_a_race_that_is_planted_is_seen(name):
    file, before, after = DEFECTS[name]
    # At the same place from the repository's root in every run, by which ccache knows its files.
    copy = sanitized_threads.BUILD / "planted" / name.replace(" ", "_") / "csrc"
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(ROOT / "csrc", copy)
    text = (copy / file).read_text()
    assert text.count(before) == 1
    (copy / file).write_text(text.replace(before, after))
    done = sanitized_threads.run(built(copy))
    assert done.returncode == RACE, done.stdout + done.stderr
    assert "WARNING: ThreadSanitizer: data race" in done.stderr
