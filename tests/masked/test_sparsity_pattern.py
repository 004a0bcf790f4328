"""SparsityPattern: how it is built, what it refuses, and that it is a value."""

from __future__ import annotations

import copy
import io
import pickle
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from deqcore import SparsityPattern

STRUCTURES = [None, 16, 32, 64, "2:4"]


def some(structure: Any = None, sparsity: float = 0.5) -> SparsityPattern:
    return SparsityPattern.from_scores(torch.rand(64, 128), sparsity, structure=structure)


@given(rows=st.integers(0, 20), columns=st.integers(0, 20), seed=st.integers(0, 99))
def test_mask_survives_every_form(rows: int, columns: int, seed: int) -> None:
    g = torch.Generator().manual_seed(seed)
    mask = torch.rand(rows, columns, generator=g) < torch.rand(1, generator=g)
    pattern = SparsityPattern.from_mask(mask)
    assert pattern.kept == int(mask.sum())
    assert torch.equal(pattern.mask(), mask)
    assert SparsityPattern.from_packed(pattern.to_packed()) == pattern
    weight = torch.randn(rows, columns, generator=g)
    values = pattern.from_dense(weight)
    assert torch.equal(values, weight[mask])
    assert torch.equal(pattern.to_dense(values), weight * mask)


@pytest.mark.parametrize("structure", STRUCTURES)
def test_structure_survives_every_form(structure: Any) -> None:
    pattern = some(structure)
    assert pattern.sparsity == 0.5
    for other in (
        SparsityPattern.from_packed(pattern.to_packed()),
        pickle.loads(pickle.dumps(pattern)),
        copy.deepcopy(pattern),
        pattern.to("meta").to("cpu"),
    ):
        assert other == pattern
        assert other.structure == structure
        assert torch.equal(other.indices, pattern.indices)


@pytest.mark.parametrize("structure", [None, 16])
def test_indices_list_the_entries_by_row_and_by_column(structure: Any) -> None:
    pattern = some(structure, 0.75)
    mask, kept = pattern.mask(), pattern.kept
    parts = pattern.indices.long().split([65, kept, 129, kept, kept])
    rows, columns = mask.nonzero(as_tuple=True)
    assert torch.equal(parts[0].diff(), mask.sum(1))
    assert torch.equal(parts[1], columns)
    assert torch.equal(parts[2].diff(), mask.sum(0))
    assert torch.equal(parts[3], mask.t().nonzero()[:, 1])
    assert torch.equal(rows[parts[4]], parts[3])


def test_scores_keep_the_highest() -> None:
    scores = torch.tensor([[1.0, 5.0, 2.0], [4.0, 0.0, 3.0]])
    assert SparsityPattern.from_scores(scores, 0.5).mask().tolist() == [
        [False, True, False],
        [True, False, True],
    ]
    ties = SparsityPattern.from_scores(torch.ones(2, 4), 0.75)
    assert ties.mask().nonzero().tolist() == [[0, 0], [0, 1]]
    assert SparsityPattern.from_scores(scores, 0.0).kept == 6
    assert SparsityPattern.from_scores(scores, 1.0).kept == 0


def test_two_of_four_keeps_the_higher_two() -> None:
    scores = torch.tensor([[1.0, 5.0, 2.0, 3.0, 0.0, 0.0, 9.0, 0.0]])
    kept = SparsityPattern.from_scores(scores, 0.5, structure="2:4").mask().nonzero()[:, 1]
    assert kept.tolist() == [1, 3, 4, 6]


def test_blocks_keep_the_highest_sums() -> None:
    scores = torch.zeros(32, 32)
    scores[16:, :16] = 0.1
    scores[3, 20] = 1.0
    mask = SparsityPattern.from_scores(scores, 0.75, structure=16).mask()
    assert mask[16:, :16].all()
    assert int(mask.sum()) == 256


def test_equal_and_hash_alike_if_they_keep_the_same() -> None:
    mask = torch.rand(16, 16) < 0.5
    first, second = SparsityPattern.from_mask(mask), SparsityPattern.from_mask(mask.clone())
    assert first == second
    assert hash(first) == hash(second)
    assert first == first.to("meta")
    mask[0, 0] = ~mask[0, 0]
    third = SparsityPattern.from_mask(mask)
    assert third != first
    assert third.difference(first) == 1
    assert len({first, second, third}) == 2
    full = torch.ones(4, 6, dtype=torch.bool)
    assert SparsityPattern.from_mask(full) != SparsityPattern.from_mask(full.view(6, 4))
    assert first != "pattern"


def test_cannot_be_changed() -> None:
    pattern = some()
    with pytest.raises(AttributeError, match="cannot be changed; build another"):
        pattern.kept = 3
    with pytest.raises(AttributeError, match="cannot be changed"):
        del pattern.indices
    with pytest.raises(TypeError, match=r"SparsityPattern\.from_mask"):
        SparsityPattern(torch.ones(2, 2))


def test_loads_where_torch_load_is_told_to() -> None:
    file = io.BytesIO()
    torch.save(some(), file)
    file.seek(0)
    loaded = torch.load(file, map_location="meta", weights_only=False)
    assert loaded.device.type == "meta"


def test_packed_form_is_one_bit_an_entry() -> None:
    assert some().to_packed().numel() == 16 + 64 * 128 // 8


def test_repr_says_what_it_is() -> None:
    text = "SparsityPattern(64 x 128, 4096 kept, 50.0% sparse, structure=16, device='cpu')"
    assert repr(some(16)) == text


def torn_blocks() -> torch.Tensor:
    mask = torch.zeros(32, 32, dtype=torch.bool)
    mask[:16, :16] = True
    mask[20, 20] = True
    return mask


BAD_MASKS: list[tuple[Any, Any, type[Exception], str]] = [
    (torch.ones(3, 4), None, TypeError, r"expected dtype torch.bool, got torch.float32.*mask != 0"),
    ([[True]], None, TypeError, "expected a bool tensor, got list"),
    (torch.ones(3, dtype=torch.bool), None, ValueError, r"expected \(rows, columns\), got.*\(3,\)"),
    (torch.ones(3, 4, dtype=torch.bool), 16, ValueError, "multiple of 16 rows, got 3; pad"),
    (torch.ones(3, 5, dtype=torch.bool), "2:4", ValueError, "multiple of 4 columns, got 5"),
    (torch.ones(3, 4, dtype=torch.bool), "2:4", ValueError, "at most two of four.*3 groups"),
    (torn_blocks(), 16, ValueError, "1 of 4 blocks of 16 x 16 are kept in part"),
    (torch.ones(3, 4, dtype=torch.bool), 8, ValueError, "structure: expected None, 16, 32, 64"),
]


@pytest.mark.parametrize(("mask", "structure", "error", "match"), BAD_MASKS)
def test_bad_mask(mask: Any, structure: Any, error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        SparsityPattern.from_mask(mask, structure=structure)


def test_too_large_a_mask_for_int32() -> None:
    with pytest.raises(ValueError, match=r"fewer than 2\*\*31 entries"):
        SparsityPattern.from_mask(torch.empty(1 << 16, 1 << 15, dtype=torch.bool, device="meta"))


@pytest.mark.parametrize(
    ("scores", "sparsity", "structure", "match"),
    [
        (torch.ones(2, 2), 1.5, None, "sparsity: expected a share from 0 to 1, got 1.5"),
        (torch.ones(2, 2), 90, None, "got 90"),
        (torch.ones(2), 0.5, None, r"scores: expected \(rows, columns\), got \(2,\)"),
        (torch.full((2, 2), torch.nan), 0.5, None, "got NaN; replace"),
        (torch.ones(2, 4), 0.9, "2:4", "2:4 drops half of the entries, got 0.9"),
    ],
)
def test_bad_scores(scores: torch.Tensor, sparsity: float, structure: Any, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        SparsityPattern.from_scores(scores, sparsity, structure=structure)


def test_damaged_packed_patterns() -> None:
    packed = some().to_packed()
    with pytest.raises(ValueError, match="expected the uint8 tensor"):
        SparsityPattern.from_packed(packed.float())
    with pytest.raises(ValueError, match="damaged"):
        SparsityPattern.from_packed(packed[:-1])
    packed[20] ^= 1
    with pytest.raises(ValueError, match=r"damaged.*save it again"):
        SparsityPattern.from_packed(packed)


def test_weight_of_another_shape() -> None:
    with pytest.raises(ValueError, match=r"weight: expected shape \(64, 128\), got \(128, 64\)"):
        some().from_dense(torch.ones(128, 64))
