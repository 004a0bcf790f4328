"""Bytes of x, y and their copies that the masked matmuls move, against the formulas of the docs."""

from __future__ import annotations

import mmap

import pytest
import torch
from torch import Tensor

from tests.support.masked_cases import arguments, make
from tools.emulation import MASKED_PATHS, TYPES, Emulator

# Path -> tokens of a tile, rows of a tile.
TILES = {"large": (256, 160), "medium": (128, 64), "few": (32, 32)}


def tiles(length: int, tile: int) -> int:
    return -(-length // tile)


def moved(emulator: Emulator, name: str, path: str, case) -> tuple[int, int, int]:
    op, args = arguments(name, case)
    emulator.masked(op, path)(*args)
    return emulator.traffic.read, emulator.traffic.written, emulator.traffic.launches


@pytest.mark.parametrize("path", TILES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_x_is_turned_once_and_read_once_for_each_tile_of_rows(emulator, path, dtype):
    rows, columns, tokens = 300, 500, 130
    case = make(rows, columns, tokens, 0.97).to(dtype)
    width, height = TILES[path]
    padded = tiles(tokens, width) * width
    read = tokens * columns + tiles(rows, height) * columns * padded
    written = columns * padded + tokens * rows
    size = case.x.element_size()
    expected = (read * size, written * size, 2)
    assert moved(emulator, "forward", path, case) == expected


def test_the_outer_product_reads_a_left_column_for_each_block_and_a_right_one_for_each_tile(
    emulator,
):
    rows, columns, tokens, size = 40, 800, 130, 4
    case = make(rows, columns, tokens, 0.5).to(torch.float32)
    padded = tiles(tokens, 256) * 256
    # Two chunks beside the code and the parts of 20 warps; so few rows: a block has one chunk.
    chunk = (99 * 1024 - 20 * 4 * 1024) // (2 * 256 * size)
    read = (rows + columns) * tokens + columns * padded + tiles(columns, chunk) * rows * padded
    written = (rows + columns) * padded
    assert moved(emulator, "values' gradient", "many", case) == (read * size, written * size, 2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_each_block_reads_the_few_tokens_that_it_gathers_from(emulator, dtype):
    case = make(70, 500, 3, 0.9).to(dtype)
    size = case.x.element_size()
    expected = (tiles(70, 16) * 3 * 500 * size, 3 * 70 * size, 1)
    assert moved(emulator, "forward", "gather", case) == expected


def test_few_tokens_read_a_left_column_for_each_chunk_and_a_right_one_for_each_tile(emulator):
    rows, columns, tokens, size = 40, 800, 130, 4
    case = make(rows, columns, tokens, 0.5).to(torch.float32)
    padded = tiles(tokens, 32) * 32
    chunk = 48 * 1024 // (32 * size)
    read = (rows + columns) * tokens
    read += tiles(rows, 8) * columns * padded  # so few rows: one for each of a block's warps
    read += tiles(columns, chunk) * rows * padded  # each row has entries in each chunk
    written = (rows + columns) * padded
    assert moved(emulator, "values' gradient", "few", case) == (read * size, written * size, 2)


@pytest.mark.parametrize("side", [16, 32, 64])
@pytest.mark.parametrize(("path", "width"), [("blocks", 256), ("few_blocks", 64)])
def test_blocks_read_their_columns_of_x_and_themselves_once_a_tile(emulator, path, width, side):
    case = make(2 * side, 192, 70, 0.5, structure=side).to(torch.bfloat16)
    blocks = case.pattern.kept // side**2
    read = blocks * (side * width + side**2) * tiles(70, width)
    written = 70 * 2 * side
    assert moved(emulator, "forward", path, case) == (2 * read, 2 * written, 1)


@pytest.mark.parametrize("side", [16, 32, 64])
def test_blocks_of_the_outer_product_read_their_columns_once(emulator, side):
    case = make(2 * side, 192, 70, 0.5, structure=side).to(torch.bfloat16)
    kept = case.pattern.kept
    expected = (2 * kept // side * 2 * 70, 2 * kept, 1)
    assert moved(emulator, "values' gradient", "blocks", case) == expected


def huge(tokens: int, columns: int) -> Tensor:
    """Addresses for more than 2^31 elements, with memory where it is written to."""
    assert tokens * columns > 2**31
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_NORESERVE", 0x4000)
    try:
        buffer = mmap.mmap(-1, 2 * tokens * columns, flags=flags)
    except OSError as reason:
        pytest.skip(f"no address space: {reason}")
    return torch.frombuffer(buffer, dtype=torch.bfloat16).view(tokens, columns)


@pytest.mark.parametrize("op", ["masked_linear", "masked_outer"])
def test_offsets_are_64_bits_wide(emulator, op):
    """A weight of one block, at the end of more columns than 2^31 / tokens."""
    tokens, side, columns = 33, 16, 1 << 26
    x, small = huge(tokens, columns), torch.randn(tokens, side).to(torch.bfloat16)
    x[-1, -side:] = torch.randn(side)
    values = torch.randn(side * side).to(torch.bfloat16)
    offsets = torch.arange(0, side * side + 1, side, dtype=torch.int32)
    places = torch.arange(columns - side, columns, dtype=torch.int32).repeat(side)
    entries = [offsets, places, None]
    sizes = [side, columns, side * side, side, tokens]
    path = MASKED_PATHS[op]["blocks"]
    if op == "masked_linear":
        out, operands = torch.empty_like(small), [x, values, None]
        expected = x[:, -side:].float() @ values.view(side, side).float().t()
    else:
        out, operands = torch.empty_like(values), [small, x]
        expected = (small.float().t() @ x[:, -side:].float()).flatten()
    emulator.run(op, 1, [*operands, out, *entries], [TYPES[x.dtype], path, *sizes], [])
    torch.testing.assert_close(out, expected.to(x.dtype))
    assert out.any()
