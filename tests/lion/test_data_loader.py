"""Decoded images: kept up to a limit, decoded ahead by workers, the same whatever both are."""

from __future__ import annotations

import copy
import os
import pickle
import signal
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lion_models.backbones import FrozenBackbone
from lion_models.base.errors import UserError
from lion_models.data import (
    ArraySource,
    FolderSource,
    Geometry,
    make_task,
    open_source,
    split_source,
)
from lion_models.data import loader as loader_module
from lion_models.data.loader import ImageCache, in_batches
from lion_models.data.splits import take_task
from lion_models.run import RunConfig, build_model
from lion_models.run import features as features_module
from lion_models.run.seeding import seed_all
from lion_models.run.trainer import FitState
from lion_models.study.runner import TrialRunner
from lion_models.study.trial import Trial, TrialOptions
from tests.support.command import Lion
from tests.support.small import cats_and_dogs, fit_run, noise

IMAGE = 12 * 12 / 2**30  # GiB of one decoded image of the small backbone


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Workers have something to share even where there are few images."""
    monkeypatch.setattr(loader_module, "PIECE", 2)


@pytest.fixture
def source(image_folder: Path) -> FolderSource:
    return open_source(str(image_folder), 1, 12)


@pytest.fixture
def decoded(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The files that this process decodes."""
    seen: list[Path] = []
    real = FolderSource.decode

    def decode(self: FolderSource, row: int, training: bool) -> torch.Tensor:
        seen.append(self.paths[row])
        return real(self, row, training)

    monkeypatch.setattr(FolderSource, "decode", decode)
    return seen


class StoppedError(Exception):
    pass


def weights(
    config: RunConfig, backbone: FrozenBackbone, cache: ImageCache | None, stop: int = 0
) -> dict[str, torch.Tensor]:
    """What training ends with; `stop` ends it after that epoch and resumes from its state."""
    source = open_source(config.data.data, 1, 12, transform=config.data.transform)
    task = take_task(source, split_source(source, config.training.seed, config.data.shots), cache)
    assert isinstance(task.train_images, torch.Tensor) == (cache is None)

    def on_epoch(state: FitState) -> None:
        if len(state.history) == stop and not reached:
            reached.append(copy.deepcopy(state))
            raise StoppedError

    reached: list[FitState] = []
    while True:
        seed_all(config.training.seed)
        model = build_model(config, backbone, 3)
        try:
            state = reached[0] if reached else None
            return fit_run(model, task, config, state, on_epoch).best
        except StoppedError:
            continue


RUNS = {
    "random views": {"augment": "affine"},
    "random crops": {"transform": "fgvc", "method": "vpt-deep", "prompts": 2},
    "features kept": {"augment": "none"},
    "features too large": {"augment": "none", "hidden": 2, "strength": 0.1},
}


@pytest.fixture
def plain(image_folder: Path, backbone: FrozenBackbone) -> dict[str, dict]:
    """The weights that images decoded at once lead to, by run."""
    return {name: weights(run_config(image_folder, name), backbone, None) for name in RUNS}


def run_config(folder: Path, name: str) -> RunConfig:
    method = {"method": "lion" if "large" in name else "linear"}
    options = method | RUNS[name]
    return RunConfig.of(str(folder), shots=4, epochs=3, batch=5, lr=0.02, **options).resolved()


@settings(
    max_examples=16,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(
    name=st.sampled_from(sorted(RUNS)),
    workers=st.sampled_from([0, 1, 2]),
    kept=st.sampled_from([0, 1, 7, 1000]),
    stop=st.integers(0, 2),
)
def test_weights_do_not_depend_on_workers_cache_or_interruptions(
    image_folder, backbone, plain, name, workers, kept, stop
):
    limit = features_module.CACHE_LIMIT_BYTES
    features_module.CACHE_LIMIT_BYTES = 0 if "large" in name else limit
    try:
        cache = ImageCache(kept * IMAGE, workers)
        got = weights(run_config(image_folder, name), backbone, cache, stop)
    finally:
        features_module.CACHE_LIMIT_BYTES = limit
    assert got.keys() == plain[name].keys()
    assert all(torch.equal(got[key], plain[name][key]) for key in got)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("kept", [0, 5, 100])
def test_images_are_those_of_the_source_in_any_order_and_twice(source, workers: int, kept: int):
    rows = torch.arange(0, 36, 2)
    cache = ImageCache(kept * IMAGE, workers)
    images, expected = cache.images(source, rows), source.load(rows)
    assert len(images) == 18
    for _ in range(2):
        assert torch.equal(images[:], expected)
        assert torch.equal(images[:3], expected[:3])
        assert torch.equal(images[torch.tensor([4, 1, 4, 4, 9])], expected[[4, 1, 4, 4, 9]])
        assert torch.equal(torch.cat(list(images.split(4))), expected)
        parts = [torch.tensor([7, 0]), torch.tensor([], dtype=torch.int64), torch.tensor([0, 8])]
        taken, plain = list(images.batches(parts)), list(in_batches(expected, parts))
        assert [len(each) for each in taken] == [2, 0, 2]
        assert all(torch.equal(*pair) for pair in zip(taken, plain, strict=True))
    assert images[:0].shape == (0, 1, 12, 12)


def test_passes_at_the_same_time_do_not_disturb_each_other(source):
    cache = ImageCache(0, workers=2)
    images = cache.images(source, torch.arange(36))
    for first, second in zip(images.split(5), images.split(5), strict=True):
        assert torch.equal(first, second)


def test_what_is_kept_is_decoded_once_and_the_rest_every_time(source, decoded):
    images = ImageCache(7 * IMAGE).images(source, torch.arange(20))
    for _ in range(3):
        _ = images[:]
    assert len(decoded) == 20 + 2 * 13
    decoded.clear()
    margin = ImageCache(100 * IMAGE)
    for training in (False, True, False, True):
        _ = margin.images(source, torch.arange(20), training)[:]
    assert len(decoded) == 40  # both kinds are kept apart


def test_another_source_s_images_make_room_the_longest_unused_first(source, decoded):
    cache = ImageCache(20 * IMAGE)
    sources = [replace(source, name=str(number)) for number in range(3)]
    rows = torch.arange(10)
    first = cache.images(sources[0], rows)
    for each in (first, cache.images(sources[1], rows)):
        _ = each[:]
    steps = first.split(2)
    _ = next(steps)
    cache.images(sources[1], rows)  # used last
    _ = cache.images(sources[2], rows)[:]
    decoded.clear()
    _ = cache.images(sources[1], rows)[:], cache.images(sources[2], rows)[:]
    assert decoded == []
    # A pass that had begun goes on with what it decodes itself.
    assert torch.equal(torch.cat(list(steps)), source.load(rows[2:]))


def test_keys_of_images_differ_where_the_images_may(source):
    cache = ImageCache()
    rows = torch.arange(4)
    kinds = [(source, rows, False), (source, rows, True), (source, rows[:3], False),
             (replace(source), rows, False)]  # fmt: skip
    assert len({cache.images(*kind).key for kind in kinds}) == 4
    assert cache.images(source, rows).key == cache.images(source, rows.clone()).key


def test_training_draws_the_same_random_numbers_with_workers(source):
    for workers in (0, 2):
        torch.manual_seed(3)
        _ = ImageCache(0, workers).images(source, torch.arange(36))[:]
        assert torch.rand(()) == torch.rand((), generator=torch.Generator().manual_seed(3))


def test_images_that_fit_are_handed_out_as_tensors(source, monkeypatch):
    assert isinstance(make_task(source, 0, 4).train_images, torch.Tensor)
    monkeypatch.setattr(ImageCache.__init__, "__defaults__", (23 * IMAGE, 0))
    task = make_task(source, 0, 4)  # 12 + 12 images
    assert not isinstance(task.train_images, torch.Tensor)
    rows = split_source(source, 0, 4).train
    assert torch.equal(task.train_images[:], source.load(rows, training=True))


@pytest.mark.parametrize("options", [{"limit": -0.5}, {"workers": -1}, {"limit": float("nan")}])
def test_numbers_below_zero_are_refused(options):
    with pytest.raises(UserError, match=r"`(image_cache|workers)`: expected 0 or more, got "):
        ImageCache(**options)


def test_damaged_image_is_named_by_workers_as_it_is_without(tmp_path: Path):
    folder = cats_and_dogs(tmp_path / "photos", 6, ".png")
    source = open_source(str(folder), 3, 8, verify="header")
    path = folder / "dog" / "3.png"
    path.write_bytes(path.read_bytes()[:200])
    said = []
    for workers in (0, 2):
        with pytest.raises(UserError) as caught:
            _ = ImageCache(0, workers).images(source, torch.arange(12))[:]
        said.append(str(caught.value))
    assert said[0] == said[1]
    assert f"{path}: damaged image" in said[0]
    noise(path, seed=13)
    assert len(ImageCache(0, 2).images(source, torch.arange(12))[:]) == 12


def test_worker_that_is_killed_is_named(source, monkeypatch):
    def die(self: FolderSource, rows: torch.Tensor, training: bool) -> torch.Tensor:
        os.kill(os.getpid(), signal.SIGKILL)
        raise AssertionError

    monkeypatch.setattr(FolderSource, "load", die)
    with pytest.raises(UserError, match=r"`workers`: a process that decodes images has ended"):
        _ = ImageCache(0, 1).images(source, torch.arange(12))[:]


def test_sources_can_be_sent_to_processes_that_are_not_forked(source):
    arrays = ArraySource("a", ("x", "y"), torch.tensor([0, 1]), torch.zeros(2, 1, 4, 4),
                         Geometry(1, 8))  # fmt: skip
    for each in (source, arrays):
        sent = pickle.loads(pickle.dumps(each))
        assert torch.equal(sent.load(torch.arange(2)), each.load(torch.arange(2)))


def test_jobs_have_workers_too(image_folder: Path, backbone_file: Path, tmp_path: Path):
    config = RunConfig.of(str(image_folder), "linear", backbone=str(backbone_file), shots=3,
                          epochs=2, augment="affine", lr=0.1).resolved()  # fmt: skip
    trials = [Trial(tmp_path / str(seed), config.but(seed=seed)) for seed in (1, 2)]
    options = TrialOptions(plot=False, workers=1, image_cache=0)
    with TrialRunner(2, 1, options) as runner:
        outcome = runner.run(trials)
    assert outcome.failures == {}


def test_train_with_workers_and_without_a_cache_writes_the_same_run(
    lion: Lion, image_folder: Path, backbone_file: Path, tmp_path: Path
):
    written = []
    for name, options in (("plain", ()), ("ahead", ("--workers", 2, "--image-cache", 0))):
        done = lion("train", "--data", image_folder, "--backbone", backbone_file, "--shots", 4,
                    "--epochs", 2, "--augment", "affine", "--method", "linear", "--runs", tmp_path,
                    "--name", name, *options)  # fmt: skip
        assert done.code == 0, done.err
        folder = tmp_path / name
        names = ("checkpoint.safetensors", "config.json", "test.json", "data.json")
        written.append([(folder / each).read_bytes() for each in names])
    assert written[0] == written[1]
    refused = lion("train", "--data", image_folder, "--runs", tmp_path, "--workers", -1)
    assert refused.code == 2
    assert "--workers: expected 0 or more, got -1" in refused.err
