"""A run and data that changes after it: neither tested on training images nor continued."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image

from lion_models.base.errors import UserError
from lion_models.data import ArraySource, Source, Split, open_source, split_source
from lion_models.run import Run, RunConfig
from lion_models.run.data_record import check_unchanged, record_data
from lion_models.run.trainer import FitState
from lion_models.run.workbench import Workbench
from tests.support.command import Lion


@pytest.fixture
def photos(image_folder: Path, tmp_path: Path) -> Path:
    """A copy of the images that the test may change."""
    return Path(shutil.copytree(image_folder, tmp_path / "photos"))


@pytest.fixture
def config(photos: Path, backbone_file: Path) -> RunConfig:
    return RunConfig.of(str(photos), method="linear", backbone=str(backbone_file), shots=3,
                     validation_shots=2, epochs=3).resolved()  # fmt: skip


def train(folder: Path, config: RunConfig) -> Path:
    Run(folder, config).train(test=False, plot=False)
    return folder


def test_run_is_not_tested_on_data_that_has_changed(lion: Lion, config: RunConfig, photos: Path):
    run = train(photos.parent / "run", config)
    shutil.copy(photos / "dark" / "0.png", photos / "dark" / "extra.png")
    refused = lion("eval", run)
    assert refused.code == 2
    assert "has changed since" in refused.err
    assert "class 'dark' had 12 images and has 13" in refused.err
    assert "put the files back as they were, or train again" in refused.err
    assert not (run / "test.json").exists()
    (photos / "dark" / "extra.png").unlink()
    assert lion("eval", run).code == 0
    # What was measured stays known, whatever becomes of the data.
    shutil.copy(photos / "dark" / "0.png", photos / "dark" / "extra.png")
    assert lion("eval", run).code == 0


def test_file_that_is_skipped_later_is_a_change_and_a_new_name_is_one(
    config: RunConfig, photos: Path
):
    config = config.but(bad_files="skip")
    run = train(photos.parent / "run", config)
    whole = (photos / "light" / "0.png").read_bytes()
    (photos / "light" / "0.png").write_bytes(b"cut")
    with (
        pytest.warns(UserWarning, match="left out 1 unusable"),
        pytest.raises(UserError, match="class 'light' had 12 images and has 11"),
    ):
        Run.open(run).measure(plot=False)
    (photos / "light" / "0.png").write_bytes(whole)
    (photos / "light" / "0.png").rename(photos / "light" / "zz.png")
    with pytest.raises(UserError, match="as many images as then, but they are others"):
        Run.open(run).measure(plot=False)


def test_moved_data_is_the_same_data_and_older_runs_are_measured(config: RunConfig, photos: Path):
    source = open_source(str(photos), 1, 12)
    split = split_source(source, 42, 3, 2)
    record_data(photos.parent, str(photos), source, split)
    moved = Path(shutil.move(photos, photos.parent / "elsewhere"))
    again = open_source(str(moved), 1, 12)
    check_unchanged(photos.parent, again, split_source(again, 42, 3, 2))
    with pytest.raises(UserError, match="has changed since"):
        check_unchanged(photos.parent, source, split_source(source, 7, 3, 2))
    old = train(photos.parent / "old", config.but(data=str(moved)))
    (old / "data.json").unlink()
    shutil.copy(moved / "dark" / "0.png", moved / "dark" / "extra.png")
    assert Run.open(old).measure(plot=False)["test"]["images"] == 12


def test_interrupted_run_goes_on_with_the_data_it_began_with_alone(
    config: RunConfig, photos: Path, tmp_path: Path
):
    class StopError(Exception):
        pass

    def stop(state: FitState) -> None:
        raise StopError

    run = tmp_path / "run"
    with pytest.raises(StopError):
        Run(run, config).train(on_epoch=stop, plot=False, state_seconds=0)
    record = json.loads((run / "data.json").read_text())
    Image.new("L", (16, 16)).save(photos / "middle" / "extra.png")
    with pytest.raises(UserError, match="class 'middle' had 12 images and has 13"):
        Run(run, config).train(plot=False)
    assert json.loads((run / "data.json").read_text()) == record
    # Without a state nothing has been learnt, and training begins with the data of today.
    (run / "training_state.pt").unlink()
    assert Run(run, config).train(plot=False)["test"]["images"] > 0


def test_every_part_of_a_split_belongs_to_what_is_remembered(tmp_path: Path):
    labels = torch.arange(2).repeat(12)
    images = torch.zeros(24, 1, 12, 12, dtype=torch.uint8)

    def source(labels: torch.Tensor, official: torch.Tensor | None = None) -> Source:
        return ArraySource("arrays", ("a", "b"), labels, images, official=official)

    def split(source: Source) -> Split:
        return split_source(source, 42, 3, 2)

    record_data(tmp_path, "digits", source(labels), split(source(labels)))
    check_unchanged(tmp_path, source(labels.clone()), split(source(labels)))
    others = [source(labels.flip(0)), source(labels, (labels * 0).to(torch.int8))]
    for other in others:
        with pytest.raises(UserError, match="but they are others or in other parts"):
            check_unchanged(tmp_path, other, split(other))


def test_source_that_remembers_images_passes_names_on(config: RunConfig, photos: Path):
    bench = Workbench()
    names = bench.source(config.data, bench.backbone(config.backbone.backbone)).row_names()
    assert names[:2] == ["dark/0.png", "dark/1.jpg"]
    assert len(names) == 36


@pytest.mark.parametrize("verify", ["full", "header"])
def test_other_contents_under_the_same_names_are_noticed_and_may_be_accepted(
    lion: Lion, config: RunConfig, photos: Path, verify: str
):
    run = train(photos.parent / "run", config.but(verify=verify))
    path = photos / "light" / "2.bmp"
    with Image.open(path) as image:
        image.point(lambda value: 255 - value).save(path)  # of the same size
    refused = lion("eval", run)
    assert refused.code == 2
    assert "images of class 'light' of" in refused.err
    assert "have other contents than when" in refused.err
    assert refused.err.endswith("go on with what is there now: --changed-data")
    assert not (run / "test.json").exists()
    with pytest.warns(UserWarning, match="what is there now is used"):
        done = lion("eval", run, "--changed-data")
    assert done.code == 0, done.err
    assert json.loads((run / "result.json").read_text())["test"]["changed_data"] is True
    assert lion("eval", run).code == 0


def test_touched_and_copied_files_are_the_same_data(lion: Lion, config: RunConfig, photos: Path):
    run = train(photos.parent / "run", config)
    for path in photos.rglob("*.*"):
        os.utime(path, ns=(1, 1))
    assert lion("eval", run).code == 0
    arrays = torch.zeros(24, 1, 12, 12, dtype=torch.uint8)
    source = ArraySource("a", ("a", "b"), torch.arange(2).repeat(12), arrays)
    split = split_source(source, 42, 3, 2)
    record_data(photos.parent, "digits", source, split)
    assert not check_unchanged(photos.parent, source, split)
    arrays[3] = 1
    with pytest.raises(UserError, match="images of class 'b' of a have other contents"):
        check_unchanged(photos.parent, source, split)


def test_interrupted_run_may_go_on_with_other_contents(
    lion: Lion, config: RunConfig, photos: Path, tmp_path: Path
):
    def stop(state: FitState) -> None:
        raise KeyboardInterrupt

    run = tmp_path / "run"
    with pytest.raises(KeyboardInterrupt):
        Run(run, config).train(on_epoch=stop, plot=False, state_seconds=0)
    record = json.loads((run / "data.json").read_text())
    path = photos / "dark" / "0.png"
    with Image.open(path) as image:
        image.rotate(90).save(path)
    with pytest.raises(UserError, match="class 'dark'"):
        Run(run, config).train(plot=False)
    with pytest.warns(UserWarning, match="what is there now is used"):
        Run(run, config, changed_data=True).train(plot=False)
    now = json.loads((run / "data.json").read_text())
    assert now["sha256"] == record["sha256"]
    assert now["contents"] != record["contents"]
    new = lion("train", "--data", photos, "--runs", tmp_path, "--name", "n", "--changed-data")
    assert "--changed-data: goes with --resume" in new.err


def test_a_record_without_contents_is_of_a_version_that_knew_none(config: RunConfig, photos: Path):
    run = train(photos.parent / "run", config)
    record = json.loads((run / "data.json").read_text())
    del record["contents"]
    (run / "data.json").write_text(json.dumps(record))
    path = photos / "dark" / "0.png"
    with Image.open(path) as image:
        image.rotate(90).save(path)
    assert Run.open(run).measure(plot=False)["test"]["images"] == 12
