"""Files with bytes flipped, cut off or overwritten: an error that says so, or what was written."""

from __future__ import annotations

import io
from dataclasses import asdict

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import deqcore
from deqcore import SparsityPattern
from lion_models.backbones import freeze_vit, load_backbone
from lion_models.backbones.files import read_state as read_weights
from lion_models.backbones.tiny_vit import read_vit, save_vit
from lion_models.base.errors import UserError
from lion_models.base.torch_files import DamagedError, load_torch
from lion_models.methods.base import trained_state
from lion_models.run import RunConfig
from lion_models.run.checkpoint import load_run, save_checkpoint
from lion_models.run.config import build_model
from lion_models.run.log import read_state, write_state
from lion_models.run.trainer import FitState
from tests.support.problems import equal, generator
from tests.support.small import small_vit

FLIPS = st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(1, 255)), min_size=1,
                 max_size=4)  # fmt: skip
DAMAGES = st.one_of(
    FLIPS.map(lambda flips: ("flip", flips)),
    st.floats(0, 1, exclude_max=True).map(lambda share: ("cut", share)),
    st.tuples(st.floats(0, 1, exclude_max=True), st.binary(min_size=1, max_size=40)).map(
        lambda splice: ("write", splice)
    ),
)
# Headers are short, and have the most to say.
IN_HEADER = FLIPS.map(lambda flips: ("flip", [(at * 0.05, by) for at, by in flips]))
DAMAGE = st.one_of(DAMAGES, IN_HEADER)


def damaged(content: bytes, damage) -> bytes:
    kind, how = damage
    out = bytearray(content)
    if kind == "flip":
        for share, by in how:
            out[int(share * len(out))] ^= by
    elif kind == "cut":
        del out[int(how * len(out)) :]
    else:
        at = int(how[0] * len(out))
        out[at : at + len(how[1])] = how[1]
        del out[len(content) :]
    return bytes(out)


def same(a, b) -> bool:
    return a.keys() == b.keys() and all(
        a[name].dtype == b[name].dtype and equal(a[name], b[name]) for name in a
    )


def pattern(structure) -> SparsityPattern:
    scores = torch.rand(64, 96, generator=generator(3))
    return SparsityPattern.from_scores(scores, 0.5, structure=structure)


@pytest.mark.parametrize("structure", [None, 16, "2:4"])
@given(damage=DAMAGE)
def test_a_packed_pattern(structure, damage):
    whole = pattern(structure)
    packed = damaged(whole.to_packed().numpy().tobytes(), damage)
    tensor = torch.from_numpy(np.frombuffer(packed, np.uint8).copy())
    try:
        read = SparsityPattern.from_packed(tensor)
    except ValueError as error:
        assert "packed: " in str(error)  # noqa: PT017  (it may also succeed)
    else:
        assert (read, read.structure) == (whole, whole.structure)


def test_two_bits_of_a_pattern_that_keep_their_sum():
    """As many entries as the header says, and others."""
    packed = pattern(None).to_packed()
    bits = np.unpackbits(packed[16:].numpy())
    ones, zeros = bits.nonzero()[0], (1 - bits).nonzero()[0]
    bits[[ones[5], zeros[7]]] ^= 1
    packed[16:] = torch.from_numpy(np.packbits(bits))
    with pytest.raises(ValueError, match=r"damaged.*save it again"):
        SparsityPattern.from_packed(packed)


@pytest.mark.parametrize("structure", [None, 64, "2:4"])
def test_a_pattern_of_version_0_1_0_has_no_checksum_and_is_read(structure):
    whole = SparsityPattern.from_scores(torch.rand(64, 64), 0.5, structure=structure)
    packed = whole.to_packed()
    packed[13:16] = 0
    assert SparsityPattern.from_packed(packed) == whole


@pytest.mark.parametrize("shape", [(0, 5), (5, 0), (0, 0), (1, 1), (3, 7)])
def test_patterns_of_any_shape_come_back(shape):
    whole = SparsityPattern.from_mask(torch.rand(shape) > 0.5)
    assert SparsityPattern.from_packed(whole.to_packed()) == whole


def pruned() -> nn.Module:
    torch.manual_seed(4)
    return deqcore.prune_layer(nn.Sequential(nn.Linear(24, 16), nn.Linear(16, 8)), sparsity=0.75)


@given(damage=DAMAGE)
def test_a_state_dict_of_a_pruned_layer(damage, tmp_path_factory):
    """What torch.save has written has checksums, which `load_torch` looks at."""
    state = pruned().state_dict()
    file = io.BytesIO()
    torch.save(state, file)
    path = tmp_path_factory.getbasetemp() / "state.pt"
    path.write_bytes(damaged(file.getvalue(), damage))
    try:
        read = load_torch(path)
    except DamagedError:
        return
    restored = deqcore.restore_pruned(nn.Sequential(nn.Linear(24, 16), nn.Linear(16, 8)), read)
    assert same(restored.state_dict(), state)


@given(damage=DAMAGE)
def test_a_state_dict_whose_patterns_are_damaged_is_not_loaded_in_part(damage):
    layer, other = pruned(), pruned()
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.zero_()
    state = layer.state_dict()
    packed = damaged(state["0.pattern"].numpy().tobytes(), damage)
    state["0.pattern"] = torch.from_numpy(np.frombuffer(packed, np.uint8).copy())
    if equal(state["0.pattern"], pruned().state_dict()["0.pattern"]):
        return
    with pytest.raises(RuntimeError, match=r"0\.pattern: packed: "):
        other.load_state_dict(state)
    assert not other[0].values.any()


@pytest.fixture(scope="module")
def vit():
    return freeze_vit(small_vit(), "small")


@pytest.fixture(scope="module", params=["lion", "linear"])
def checkpoint(request, vit, tmp_path_factory):
    """(file, what is in it)."""
    path = tmp_path_factory.mktemp(request.param) / "checkpoint.safetensors"
    config = RunConfig.of("digits", request.param)
    torch.manual_seed(0)
    model = build_model(config, vit, 3)
    weights = {name: value.detach().clone() for name, value in trained_state(model).items()}
    save_checkpoint(path, weights, config, vit, ("cat", "dog", "hen"))
    return path, weights, config


@given(damage=DAMAGE)
def test_a_checkpoint(damage, checkpoint, vit):
    path, weights, config = checkpoint
    copy = path.with_name("damaged.safetensors")
    copy.write_bytes(damaged(path.read_bytes(), damage))
    try:
        read = load_run(copy, vit)
    except UserError as error:
        assert str(copy) in str(error)  # noqa: PT017  (it may also succeed)
    else:
        assert same({k: v.detach() for k, v in trained_state(read.model).items()}, weights)
        assert (read.config, read.classes) == (config, ("cat", "dog", "hen"))


def test_one_bit_of_a_checkpoints_weights_is_noticed(checkpoint, vit):
    path, *_ = checkpoint
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    copy = path.with_name("one_bit.safetensors")
    copy.write_bytes(content)
    with pytest.raises(UserError, match=r"one_bit.safetensors: damaged.*copy it again"):
        load_run(copy, vit)


@given(damage=DAMAGE)
def test_the_state_of_an_interrupted_run(damage, tmp_path_factory):
    path = tmp_path_factory.getbasetemp() / "training_state.pt"
    weights = {"head.weight": torch.rand(3, 4, generator=generator(1)), "head.bias": torch.ones(3)}
    state = FitState([{"epoch": 1, "loss": 0.5}], 1, weights, weights, {"lr": 0.1, "state": {}})
    write_state(path, state)
    path.write_bytes(damaged(path.read_bytes(), damage))
    try:
        read = read_state(path)
    except UserError as error:
        assert "training_state.pt: damaged" in str(error)  # noqa: PT017  (it may also succeed)
    else:
        assert same(read.weights, weights)
        assert str(asdict(read)) == str(asdict(state))


@given(damage=DAMAGE)
def test_weights_of_a_backbone(damage, tmp_path_factory):
    """They have a fingerprint instead, with which a run names the weights that it was made for."""
    path = tmp_path_factory.getbasetemp() / "small.safetensors"
    save_vit(small_vit(), path, {"data": "none"}, ("a", "b"))
    path.write_bytes(damaged(path.read_bytes(), damage))
    for read in (read_vit, read_weights, lambda path: load_backbone(str(path))):
        try:
            read(path)
        except UserError as error:
            assert str(path) in str(error)  # noqa: PT017  (it may also succeed)
