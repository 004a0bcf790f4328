"""The PTX that runs a strip's code, against the sums that it stands for, for one lane."""

from __future__ import annotations

import shutil
import struct

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.ptx import Machine, blocks_of, float_bits
from tools.emulation import ROOT

# In the order of the file: what, rows of a strip, tokens of a lane, type.
BLOCKS = [
    *[("linear", 8, 8, dtype) for dtype in ("f32", "bf16", "f16")],
    *[("linear", 16, 4, dtype) for dtype in ("f32", "bf16", "f16")],
    *[("linear", 8, 4, dtype) for dtype in ("f32", "bf16", "f16")],
    *[("outer", 8, 8, dtype) for dtype in ("f32", "bf16", "f16")],
]
COLUMNS = 5  # of a chunk
BATCH, CHUNK, PARTS = 0x1000, 0x10000, 0x40000
LAST, OTHER = 1 << 31, 128


@pytest.fixture(scope="module")
def programs() -> list[list[str]]:
    compiler = shutil.which("c++")
    if compiler is None:
        pytest.skip("no C++ compiler")
    return blocks_of(ROOT / "csrc" / "cuda" / "strip_code.cuh", compiler)


def small(*shape: int) -> np.ndarray:
    """Numbers that every type holds, and whose sums are exact."""
    return np.random.default_rng(sum(shape)).integers(-8, 9, shape).astype(np.float32) / 4


def store_column(memory: dict[int, int], at: int, numbers: np.ndarray, dtype: str) -> None:
    """A lane's tokens: neighbours in groups of 16 bytes at most, one in each 32 groups."""
    size = 4 if dtype == "f32" else 2
    group = min(len(numbers), 16 // size)
    for i in range(0, len(numbers), group):
        own = numbers[i : i + group]
        if dtype == "f32":
            data = own.tobytes()
        elif dtype == "f16":
            data = own.astype(np.float16).tobytes()
        else:
            data = (own.view(np.uint32) >> 16).astype(np.uint16).tobytes()
        first = at + i // group * 32 * group * size
        for j in range(0, len(data), 4):
            memory[first + j] = struct.unpack_from("I", data, j)[0]


@pytest.mark.parametrize(
    "index", range(len(BLOCKS)), ids=[f"{b[0]} {b[1]}x{b[2]} {b[3]}" for b in BLOCKS]
)
@settings(max_examples=10)
@given(cells=st.sets(st.tuples(st.integers(0, COLUMNS - 1), st.integers(0, 15)), max_size=30))
def test_a_batch_does_what_its_entries_say(programs, index, cells):
    assert len(programs) == len(BLOCKS)
    what, rows, tokens, dtype = BLOCKS[index]
    entries = sorted((column, row % rows) for column, row in cells)
    entries = list(dict.fromkeys(entries))
    x, values, own = small(COLUMNS, tokens), small(len(entries) + 1), small(rows, tokens)
    memory: dict[int, int] = {BATCH + 4 * i: 0xDEADBEEF for i in range(128)}
    stride = 32 * tokens * (4 if dtype == "f32" else 2)
    for column in range(COLUMNS):
        store_column(memory, CHUNK + column * stride, x[column], dtype)

    codes = []
    for i, (column, row) in enumerate(entries):
        other = OTHER if i > 0 and entries[i - 1][0] != column else 0
        codes.append(row | other | column * stride << 8)
    codes = [*codes, rows]
    codes[0] |= LAST
    for i, code in enumerate(codes):
        word = (2 * i + 1 if i > 0 else 0) if what == "linear" else i
        memory[BATCH + 4 * word] = code
        if what == "linear":
            memory[BATCH + 4 * (2 * i + 2)] = float_bits(values[i])

    operands = [float_bits(number) for number in own.flatten()] + [BATCH, CHUNK, PARTS]
    machine = Machine(programs[index], operands, memory)
    machine.run()
    if what == "outer":
        parts = [machine.memory[PARTS + 33 * 4 * i] for i in range(len(entries))]
        assert parts == [float_bits(own[row] @ x[column]) for column, row in entries]
        return
    expected = own.copy()
    for value, (column, row) in zip(values, entries, strict=False):
        expected[row] += value * x[column]
    assert machine.operands[: rows * tokens] == [float_bits(n) for n in expected.flatten()]
