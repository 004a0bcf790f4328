"""How much of each 32-byte sector the kernels' warps use, by count, on every path.

The numbers agree with those that an H200's counters gave, where it gave any: a load of one number
by a whole warp uses 4 bytes of 32; lanes that each store 16 bytes into a row of their own, 16.
"""

from __future__ import annotations

import pytest
import torch

from deqcore import SparsityPattern
from tools.sectors import Count, Place, SectorCounter, by_kernel, cases, hot_places

ENOUGH = 28  # bytes of 32, in every hot place
# Kernel, kind and tensor -> the bytes that it uses at least: what has yet to be made better.
KNOWN = {
    # A warp's lanes take chunks, whose sums are a row of the workspace apart.
    ("anderson_move_chunk", "load", "workspace"): 8,
    ("broyden_move_chunk", "load", "workspace"): 8,
    # Rows of the steps in use, out of rows of the whole memory.
    ("broyden_move_chunk", "load", "gram"): 17,
    # A search in a row's columns; and all columns in turn, which begin behind rows + 1 offsets.
    ("masked_linear_prepare", "load", "columns"): 4,
    ("masked_outer_prepare", "load", "columns"): 4,
    # A warp's lanes look for a block among the first rows of rows of blocks.
    ("prepare_groups", "load", "offsets"): 4,
    # Two entries that a whole warp reads, and rows of y that each lane writes for itself.
    ("masked_linear_product", "load", "workspace"): 16,
    ("masked_linear_product", "store", "y"): 8,
    ("masked_linear_by_blocks", "store", "y"): 16,
    # Rows of few entries, which begin anywhere; each goes to where its column puts it.
    ("masked_linear_write_strips", "load", "columns"): 22,
    ("masked_linear_write_strips", "load", "values"): 16,
    ("masked_linear_write_strips", "store", "workspace"): 4,
    ("masked_outer_write_strips", "load", "columns"): 22,
    ("masked_outer_write_strips", "store", "workspace"): 4,
    # The same, and a row's first and last offset, for a whole warp.
    ("masked_linear_by_gathering", "load", "offsets"): 4,
    ("masked_linear_by_gathering", "load", "columns"): 22,
    ("masked_linear_by_gathering", "load", "values"): 16,
    # Sums in the order of the columns, at the end.
    ("masked_outer_by_strips", "store", "values"): 3,
    # One column that a whole warp reads; sums of eight entries, wherever these lie.
    ("masked_outer_product", "load", "columns"): 4,
    ("masked_outer_product", "load", "workspace"): 16,
    ("masked_outer_product", "store", "workspace"): 16,
    ("masked_outer_product", "store", "values"): 10,
    ("masked_outer_by_blocks", "store", "values"): 16,
}


@pytest.fixture(scope="module")
def hot(sector_counter) -> dict[str, dict[Place, Count]]:
    """The hot places of each case."""
    found = {}
    for name, run in cases().items():
        run(sector_counter)
        found[name] = hot_places(sector_counter.counts)
    return found


def key(place: Place) -> tuple[str, str, str]:
    return place.kernel, place.kind, place.tensor


@pytest.mark.parametrize("name", cases())
def test_hot_places_use_nearly_all_of_each_sector(hot, name):
    assert hot[name]
    for place, count in hot[name].items():
        assert count.of_32 >= KNOWN.get(key(place), ENOUGH), place


def test_what_is_known_to_waste_sectors_still_does(hot):
    wasteful = {key(p) for places in hot.values() for p, c in places.items() if c.of_32 < ENOUGH}
    assert KNOWN.keys() - wasteful == set(), "mended: take these off the list"


def collected(counter: SectorCounter, stride: int, dtype: torch.dtype) -> dict[str, Count]:
    """Values of every `stride`-th column gathered out of a dense matrix: counts by tensor."""
    mask = torch.zeros(8, 2048, dtype=torch.bool)
    mask[:, ::stride] = True
    pattern = SparsityPattern.from_mask(mask)
    dense = torch.randn(8, 2048).to(dtype)
    values = counter.masked("masked_from_dense", "only")(dense, pattern.indices)
    assert torch.equal(values, dense[mask])
    counts: dict[str, Count] = {}
    for place, count in counter.counts.items():
        counts.setdefault(place.tensor, Count()).__iadd__(count)
    return counts


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("stride", [1, 2, 4, 8, 16])
def test_the_count_of_a_gather_is_the_formulas(sector_counter, stride, dtype):
    size = dtype.itemsize
    counts = collected(sector_counter, stride, dtype)
    kept = 8 * 2048 // stride
    assert counts["dense"].requests == counts["values"].requests == kept // 32
    assert counts["dense"].used == counts["values"].used == kept * size
    assert counts["dense"].of_32 == max(size, 32 / stride)
    assert counts["values"].of_32 == 32
    # One row's first and last offset, for a whole warp each: a sector that holds both or not.
    assert counts["offsets"].of_32 == 4


def test_lanes_that_are_not_there_use_nothing(sector_counter):
    """Rows of 40 entries: a whole request, then one of 8 lanes."""
    counts = collected(sector_counter, 52, torch.float32)
    assert counts["values"].requests == 8 * 2
    assert counts["values"].used == 8 * 40 * 4


def test_loads_stores_and_copies_are_told_apart(sector_counter):
    cases()["masked_linear blocks bf16"](sector_counter)
    sums = by_kernel(sector_counter.counts)
    assert {kind for _, kind in sums} == {"load", "store", "copy"}
    tensors = {(p.kind, p.tensor) for p in sector_counter.counts}
    assert {("copy", "x"), ("copy", "values"), ("load", "columns"), ("store", "y")} <= tensors
