"""The masked matmuls' CUDA kernels under sanitizers, and defects that these must see."""

from __future__ import annotations

import shutil

import pytest
import torch

from tests.support.defects import Defect
from tests.support.masked_cases import arguments, make
from tools import emulation
from tools.emulation import ROOT, EmulationError, Emulator

SEEDS = {"address_program": range(2), "thread_program": range(1, 2)}
CASES = {  # what, path, rows, columns, tokens, sparsity, structure, dtype
    "large": ("forward", "large", 20, 98, 20, 0.8, None, torch.float32),
    "large, double": ("forward", "large", 20, 98, 20, 0.8, None, torch.float64),
    "tall strips, transposed": ("input gradient", "large", 90, 40, 9, 0.98, None, torch.bfloat16),
    "medium, transposed": ("input gradient", "medium", 20, 30, 70, 0.7, None, torch.bfloat16),
    "few": ("forward", "few", 20, 200, 5, 0.9, None, torch.float64),
    "gather": ("forward", "gather", 40, 70, 3, 0.5, None, torch.float32),
    "gather, transposed": ("input gradient", "gather", 70, 20, 8, 0.7, None, torch.bfloat16),
    "few, half": ("input gradient", "few", 20, 30, 33, 0.5, None, torch.float16),
    "outer": ("values' gradient", "many", 5, 20, 130, 0.5, None, torch.float32),
    "outer, half": ("values' gradient", "many", 6, 21, 30, 0.5, None, torch.bfloat16),
    "outer, few": ("values' gradient", "few", 7, 200, 40, 0.8, None, torch.float64),
    "blocks": ("forward", "blocks", 32, 48, 20, 0.3, 16, torch.bfloat16),
    "blocks, transposed": ("input gradient", "few_blocks", 64, 64, 70, 0.5, 32, torch.float16),
    "large blocks": ("forward", "few_blocks", 64, 128, 5, 0.0, 64, torch.float16),
    "outer by blocks": ("values' gradient", "blocks", 64, 64, 70, 0.5, 32, torch.bfloat16),
    "groups": ("forward", "groups", 128, 128, 70, 0.3, 64, torch.bfloat16),
    "groups, transposed": ("input gradient", "groups", 64, 192, 20, 0.3, 64, torch.float16),
    "outer by segments": ("values' gradient", "segments", 64, 192, 70, 0.3, 64, torch.bfloat16),
    "outer by segments, long": ("values' gradient", "segments", 64, 64, 520, 0, 64, torch.float16),
    "nothing kept": ("forward", "medium", 20, 30, 10, 1.0, None, torch.float32),
    "no tokens": ("values' gradient", "few", 20, 30, 0, 0.5, None, torch.float32),
}


def arguments_of(name: str):
    what, path, *shape, dtype = CASES[name]
    op, args = arguments(what, make(*shape).to(dtype))
    return op, path, args


def run_program(program, name: str, seeds=range(2)):
    op, path, args = arguments_of(name)
    _, pointers, ints = emulation.masked_arguments(op, path, *args)
    done, results = emulation.run_case(program, op, pointers, ints, [], seeds)
    place = 3 if op == "masked_linear" else 2  # of the result among the pointers
    return done, [tensors[place] for tensors in results]


@pytest.mark.parametrize(
    ("name", "sanitizer"),
    [
        (name, sanitizer)
        for name in CASES
        for sanitizer in SEEDS
        # "few" is the same kernel with fewer threads, which cost ThreadSanitizer much.
        if (name, sanitizer) != ("large, double", "thread_program")
    ],
)
def test_sanitizers_find_nothing_and_every_order_of_threads_gives_the_same_bits(
    name, sanitizer, emulator, request
):
    op, path, args = arguments_of(name)
    expected = emulator.masked(op, path)(*args)
    seeds = SEEDS[sanitizer]
    done, results = run_program(request.getfixturevalue(sanitizer), name, seeds)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert len(results) == len(seeds)
    assert all(torch.equal(result, expected) for result in results)


DEFECTS = {
    "a missing barrier": Defect(
        "cuda/masked_linear.cu",
        "    wait_for_copies();\n    __syncthreads();",
        "    wait_for_copies();\n",
        "few",
        "thread",
        "WARNING: ThreadSanitizer: data race",
    ),
    "two blocks that write one entry": Defect(
        "cuda/masked_outer.cu",
        "chunk > 0 ? ready.ends[(chunk - 1) * entries.rows + row]",
        "chunk > 99 ? ready.ends[(chunk - 1) * entries.rows + row]",
        "outer, few",
        "thread",
        "WARNING: ThreadSanitizer: data race",
    ),
    "a token too many is read": Defect(
        "cuda/masked_tile.cuh",
        "row < turned.tokens",
        "row <= turned.tokens",
        "few",
        "address",
        "AddressSanitizer: heap-buffer-overflow",
    ),
    "padding is written": Defect(
        "cuda/masked_linear.cu",
        "if (token + t < args.tokens)",
        "if (token + t < ready.padded)",
        "few, half",
        "address",
        "AddressSanitizer: heap-buffer-overflow",
    ),
    "too little shared memory": Defect(
        "cuda/masked_outer.cu",
        "ready.padded > Tile::kWidth ? kChunkBytes",
        "ready.padded > Tile::kWidth ? kChunkBytes / 2",
        "outer, few",
        "address",
        "AddressSanitizer: heap-buffer-overflow",
    ),
    "a tile that another warp still writes": Defect(
        "cuda/masked_outer_blocks.cu",
        "    wait_for_copies();\n    __syncthreads();",
        "    wait_for_copies();\n    __syncwarp();",
        "outer by blocks",
        "thread",
        "WARNING: ThreadSanitizer: data race",
    ),
    "tokens past the last one are copied": Defect(
        "cuda/masked_linear_blocks.cu",
        "token + row < args.tokens ? token + row : args.tokens - 1",
        "token + row",
        "blocks",
        "address",
        "AddressSanitizer: heap-buffer-overflow",
    ),
    "tiles that are not aligned": Defect(
        "cuda/mma.cuh",
        "* kRowBytes + (piece",
        "* (kRowBytes + 4) + (piece",
        "blocks",
        "library",
        "loads a tile not aligned",
    ),
    "a place of the ring that one reader too few empties": Defect(
        "cuda/tile_ring.cuh",
        "start_barrier(&empty[i], kReaders * kCluster);",
        "start_barrier(&empty[i], kReaders * kCluster + 1);",
        "outer by segments, long",
        "library",
        "wait for each other forever",
    ),
    "a tile that is read before it has come": Defect(
        "cuda/masked_outer_segments.cu",
        "    ring.await(left);\n",
        "",
        "outer by segments",
        "thread",
        "WARNING: ThreadSanitizer: data race",
    ),
    "a tile for which no place is awaited": Defect(
        "cuda/tile_ring.cuh",
        "    wait_for(&empty[place.slot], place.round ^ 1u);\n",
        "",
        "outer by segments, long",
        "thread",
        "WARNING: ThreadSanitizer: data race",
    ),
    "a batch that some lanes still run": Defect(
        "cuda/masked_linear_strips.cu",
        "      __syncwarp();\n      reinterpret_cast<Part*>(batch)[lane] = part;",
        "      reinterpret_cast<Part*>(batch)[lane] = part;",
        "large",
        "thread",
        "WARNING: ThreadSanitizer: data race",
    ),
    "a chunk that another strip still reads": Defect(
        "cuda/masked_outer_strips.cu",
        "    wait_for_copies();\n    __syncthreads();",
        "    wait_for_copies();\n    __syncwarp();",
        "outer",
        "thread",
        "WARNING: ThreadSanitizer: data race",
    ),
    "tokens past the last one are stored": Defect(
        "cuda/masked_linear_strips.cu",
        "if (token >= args.tokens || left <= 0) continue;",
        "if (left <= 0) continue;",
        "large",
        "address",
        "AddressSanitizer: heap-buffer-overflow",
    ),
    "copies that are not awaited": Defect(
        "cuda/masked_outer.cu",
        "    wait_for_copies();\n",
        "",
        "outer, few",
        "library",
        "left with copies that it has not awaited",
    ),
}


@pytest.mark.parametrize("name", DEFECTS)
def test_a_planted_defect_is_caught(name, tmp_path):
    defect = DEFECTS[name]
    sources = tmp_path / "csrc"
    shutil.copytree(ROOT / "csrc", sources)
    text = (sources / defect.file).read_text()
    assert text.count(defect.before) == 1, "the kernels have changed: move the defect"
    (sources / defect.file).write_text(text.replace(defect.before, defect.after))
    op, path, args = arguments_of(defect.case)
    try:
        built = emulation.build(defect.flavour, sources, tmp_path / defect.flavour, op)
    except emulation.CompilerMissingError as reason:
        pytest.skip(str(reason))
    if defect.flavour == "library":
        with pytest.raises(EmulationError, match=defect.message):
            Emulator(built).masked(op, path)(*args)
        return
    done, _ = run_program(built, defect.case)
    assert done.returncode != 0
    assert defect.message in done.stderr, done.stderr
