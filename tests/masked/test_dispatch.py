"""The table of crossovers: how it is read, and that `python -m deqcore.tune` writes it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from deqcore import SparsityPattern, _dispatch, _kernels, tune
from deqcore._crossovers import CROSSOVERS

F32 = _dispatch.line_name(torch.float32, "linear", 1)


def pattern(sparsity: float) -> SparsityPattern:
    return SparsityPattern.from_scores(torch.rand(20, 20), sparsity)


@pytest.fixture
def line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_kernels, "CPU_KERNELS", True)
    monkeypatch.setitem(_dispatch.LINES, F32, [(1, 0.5), (8, 0.2), (64, 0.7)])


@pytest.mark.parametrize(
    ("tokens", "sparsity", "sparse"),
    [
        (0, 0.5, True), (0, 0.4, False), (1, 0.5, True), (5, 0.4, False), (5, 0.5, True),
        (8, 0.4, False), (8, 0.7, True), (64, 0.7, True), (64, 0.6, False), (9999, 0.7, True),
    ],
)  # fmt: skip
def test_between_two_measurements_the_higher_crossover_holds(
    line: None, tokens: int, sparsity: float, sparse: bool
) -> None:
    x = torch.zeros(1)
    assert _dispatch.prefers_sparse("linear", tokens, pattern(sparsity), x) == sparse


def test_full_weights_other_devices_and_unknown_lines(
    line: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    x = torch.zeros(1)
    assert not _dispatch.prefers_sparse("linear", 8, pattern(0.0), x)
    assert not _dispatch.prefers_sparse("linear", 8, pattern(0.99), x.to("meta"))
    name = _dispatch.line_name(torch.float32, "outer", 1)
    monkeypatch.delitem(_dispatch.LINES, name, raising=False)
    assert _dispatch.prefers_sparse("outer", 8, pattern(0.9), x)
    assert not _dispatch.prefers_sparse("outer", 8, pattern(0.8), x)


def test_without_kernels_dense_is_used(line: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_kernels, "CPU_KERNELS", False)
    assert not _dispatch.prefers_sparse("linear", 8, pattern(0.99), torch.zeros(1))


def test_default_table_is_well_formed() -> None:
    assert CROSSOVERS
    for lines in CROSSOVERS.values():
        assert len(lines) == 32
        for measured in lines.values():
            assert measured == sorted(measured)
            assert all(tokens >= 1 and 0 <= sparsity <= 2 for tokens, sparsity in measured)


def test_damaged_table_is_ignored_with_a_warning(tmp_path: Path) -> None:
    path = tmp_path / "crossovers.json"
    assert _dispatch.read_table(path) == {}
    for text in ("{", '{"kind": 3}', '{"kind": {"line": [["a", "b"]]}}'):
        path.write_text(text)
        with pytest.warns(RuntimeWarning, match="is ignored; delete it, or measure it again"):
            assert _dispatch.read_table(path) == {}


def test_cache_file_follows_the_user_s_setting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.platform", "linux")
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    assert _dispatch.cache_file() == Path("/somewhere/deqcore/crossovers.json")


def test_tune_writes_a_table_that_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any, kernels_only: None
) -> None:
    path = tmp_path / "sub" / "crossovers.json"
    for name, value in {
        "SIZES": (64,), "TOKENS": (1, 8), "SPARSITIES": (0.5, 0.9),
        "DTYPES": (torch.float32,), "BLOCKS": (1, 16),
    }.items():  # fmt: skip
        monkeypatch.setattr(tune, name, value)
    monkeypatch.setattr("sys.argv", ["tune", "--seconds", "0.0001", "--out", str(path)])
    tune.main()
    assert f"written to {path}" in capsys.readouterr().out
    table = _dispatch.read_table(path)
    lines = table[_dispatch.processor_kind()]
    assert sorted(lines) == [f"float32/{op}/{b}" for op in ("linear", "outer") for b in (1, 16)]
    assert json.loads(path.read_text())
