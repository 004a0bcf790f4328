"""The table of crossovers: how it is read, and that `python -m deqcore.tune` writes it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from deqcore import SparsityPattern, _kernels
from deqcore.sparse import choice, crossovers, tune

F32 = choice.line_name(torch.float32, "linear", 1)


def pattern(sparsity: float) -> SparsityPattern:
    return SparsityPattern.from_scores(torch.rand(20, 20), sparsity)


@pytest.fixture
def line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_kernels, "CPU_KERNELS", True)
    monkeypatch.setitem(choice.LINES, F32, [(1, 0.5), (8, 0.2), (64, 0.7)])


@pytest.mark.parametrize(("sparsity", "sparse"), [(0.6, False), (0.7, True)])
def test_for_any_number_of_tokens_sparse_has_to_win_at_each(
    line: None, sparsity: float, sparse: bool
) -> None:
    x = torch.zeros(1)
    assert choice.prefers_sparse("linear", None, pattern(sparsity), x) == sparse


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
    assert choice.prefers_sparse("linear", tokens, pattern(sparsity), x) == sparse


def test_full_weights_other_devices_and_unknown_lines(
    line: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    x = torch.zeros(1)
    assert not choice.prefers_sparse("linear", 8, pattern(0.0), x)
    assert not choice.prefers_sparse("linear", 8, pattern(0.99), x.to("meta"))
    name = choice.line_name(torch.float32, "outer", 1)
    monkeypatch.delitem(choice.LINES, name, raising=False)
    assert choice.prefers_sparse("outer", 8, pattern(0.9), x)
    assert not choice.prefers_sparse("outer", 8, pattern(0.8), x)


def test_without_kernels_dense_is_used(line: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_kernels, "CPU_KERNELS", False)
    assert not choice.prefers_sparse("linear", 8, pattern(0.99), torch.zeros(1))


class OnGpu:
    """What the choice looks at in a CUDA tensor."""

    device = torch.device("cuda", 0)

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> dict[str, crossovers.Line]:
    """A GPU whose table the test fills in."""
    lines: dict[str, crossovers.Line] = {}
    monkeypatch.setattr(_kernels, "CUDA_KERNELS", True)
    monkeypatch.setattr(choice, "_GPU_LINES", {0: lines})
    return lines


def large(sparsity: float, structure: int | None = None) -> SparsityPattern:
    """2048 x 2048."""
    mask = torch.rand(32, 32) >= sparsity
    mask = mask.repeat_interleave(64, 0).repeat_interleave(64, 1)
    return SparsityPattern.from_mask(mask, structure=structure)


def test_an_unmeasured_gpu_multiplies_densely_but_where_counting_leaves_a_margin(
    gpu: dict[str, crossovers.Line], monkeypatch: pytest.MonkeyPatch
) -> None:
    def prefers(pattern: SparsityPattern, dtype: torch.dtype, op: Any = "linear", n: Any = 8192):
        return choice.prefers_sparse(op, n, pattern, OnGpu(dtype))

    high, blocks = large(0.97), large(0.97, 64)
    assert high.sparsity > 0.95
    assert prefers(high, torch.float32)
    assert prefers(high, torch.float64, "outer")
    assert prefers(blocks, torch.bfloat16)
    assert not prefers(high, torch.bfloat16)  # unstructured, against tensor cores
    assert not prefers(large(0.97, 16), torch.bfloat16)
    assert not prefers(large(0.97, 32), torch.float16, "outer")
    assert not prefers(large(0.8), torch.float32)
    assert not prefers(high, torch.float32, n=64)
    assert not prefers(high, torch.float32, n=None)
    assert not prefers(pattern(0.99), torch.float32)
    monkeypatch.setattr(choice, "_multiplies_in_tf32", lambda: True)
    assert not prefers(high, torch.float32)
    assert prefers(high, torch.float64)
    monkeypatch.setattr(_kernels, "CUDA_KERNELS", False)
    assert not prefers(high, torch.float64)


def test_a_gpu_s_table_decides_where_there_is_one(gpu: dict[str, crossovers.Line]) -> None:
    gpu[F32] = [(1, 2.0), (64, 0.4)]
    x: Any = OnGpu(torch.float32)
    assert not choice.prefers_sparse("linear", 8, pattern(0.9), x)
    assert choice.prefers_sparse("linear", 64, pattern(0.5), x)
    assert not choice.prefers_sparse("linear", 64, pattern(0.3), x)


def test_tf32_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not choice._multiplies_in_tf32()
    matmul = torch.backends.cuda.matmul
    before = matmul.fp32_precision
    try:
        matmul.fp32_precision = "tf32"
        assert choice._multiplies_in_tf32()
    finally:
        matmul.fp32_precision = before


def test_tune_says_why_a_gpu_cannot_be_measured(
    monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.setattr(_kernels, "CUDA_KERNELS", False)
    monkeypatch.setitem(_kernels.missing, "cuda", "no nvcc")
    monkeypatch.setattr("sys.argv", ["tune", "--device", "cuda"])
    with pytest.raises(SystemExit):
        tune.main()
    assert "no CUDA kernels: no nvcc" in capsys.readouterr().err


DEFAULTS = sorted(crossovers.TABLES.glob("*.json"))


@pytest.mark.parametrize("path", DEFAULTS, ids=lambda path: path.stem)
def test_default_table_is_well_formed(path: Path) -> None:
    ((kind, lines),) = crossovers.read_table(path).items()
    assert crossovers.default_file(kind) == path
    assert crossovers.default_lines(kind) == lines
    assert len(lines) == 32
    for measured in lines.values():
        assert all(tokens >= 1 and 0 <= sparsity <= 2 for tokens, sparsity in measured)


def test_every_gpu_with_a_table_has_its_compute_capability() -> None:
    kinds = {kind for path in DEFAULTS for kind in crossovers.read_table(path)}
    assert kinds >= set(crossovers.GPUS)
    assert all(kind.startswith("x86_64-") for kind in kinds - set(crossovers.GPUS))


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """A GPU of some name and compute capability, whose table the test may measure."""

    def make(name: str, capability: tuple[int, int], measured: Any = None) -> None:
        monkeypatch.setattr(_kernels, "CUDA_KERNELS", True)
        monkeypatch.setattr(choice, "_GPU_LINES", {})
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: name)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: capability)
        monkeypatch.setattr(choice, "cache_file", lambda: tmp_path / "table.json")
        if measured:
            crossovers.write_table(tmp_path / "table.json", measured)

    return make


def test_a_gpu_takes_its_own_table_or_that_of_the_nearest_of_its_generation(
    machine: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    h200 = crossovers.default_lines("NVIDIA H200")[F32]
    machine("NVIDIA H200", (9, 0))
    assert choice._gpu_line(0, F32) == h200
    machine("NVIDIA H100 PCIe", (9, 0))
    assert choice._gpu_line(0, F32) == h200
    machine("NVIDIA A100", (8, 0))
    assert choice._gpu_line(0, F32) is None
    machine("NVIDIA H100 PCIe", (9, 0), {"NVIDIA H100 PCIe": {F32: [(1, 0.3)]}})
    assert choice._gpu_line(0, F32) == [(1, 0.3)]
    monkeypatch.setattr(crossovers, "GPUS", {"L4": (8, 9), "A10": (8, 6), "A100": (8, 0)})
    assert [crossovers.nearest_gpu((8, minor)) for minor in (0, 2, 7, 9)] == [
        *["A100", "A100", "A10", "L4"]
    ]
    assert crossovers.nearest_gpu((9, 0)) is None


def test_a_default_table_is_written_where_it_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(crossovers, "TABLES", tmp_path)
    assert crossovers.default_lines("NVIDIA RTX 6000 Ada") == {}
    path = crossovers.default_file("NVIDIA RTX 6000 Ada")
    crossovers.write_table(path, {"NVIDIA RTX 6000 Ada": {F32: [(1, 2.0), (64, 0.9)]}})
    assert path.name == "nvidia-rtx-6000-ada.json"
    assert crossovers.default_lines("NVIDIA RTX 6000 Ada") == {F32: [(1, 2.0), (64, 0.9)]}


def test_damaged_table_is_ignored_with_a_warning(tmp_path: Path) -> None:
    path = tmp_path / "crossovers.json"
    assert crossovers.read_table(path) == {}
    for text in ("{", '{"kind": 3}', '{"kind": {"line": [["a", "b"]]}}'):
        path.write_text(text)
        with pytest.warns(RuntimeWarning, match="is ignored; delete it, or measure it again"):
            assert crossovers.read_table(path) == {}


def test_cache_file_follows_the_user_s_setting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.platform", "linux")
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    assert choice.cache_file() == Path("/somewhere/deqcore/crossovers.json")


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
    table = crossovers.read_table(path)
    lines = table[choice.processor_kind()]
    assert sorted(lines) == [f"float32/{op}/{b}" for op in ("linear", "outer") for b in (1, 16)]
    assert json.loads(path.read_text())
