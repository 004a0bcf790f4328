"""Messages name what to change, and to what."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import pytest
import torch
from PIL import Image

from lion_models.base.errors import UserError, few
from lion_models.cli.app import plain_warnings
from lion_models.data import split_rows
from lion_models.run.log import METRICS
from tests.support.command import Lion


def labels_of(*counts: int) -> torch.Tensor:
    return torch.cat([torch.full((count,), label) for label, count in enumerate(counts)])


def pictures(folder: Path, count: int, size: tuple[int, int] = (16, 16)) -> None:
    folder.mkdir(parents=True)
    generator = torch.Generator().manual_seed(sum(str(folder).encode()))
    for index in range(count):
        noise = torch.randint(0, 256, size, generator=generator, dtype=torch.uint8)
        Image.fromarray(noise.numpy()).save(folder / f"{index}.png")


def test_the_smallest_class_and_the_largest_shots_are_named():
    names = ("a", "b", "c")
    with pytest.raises(UserError) as caught:
        split_rows(labels_of(200, 40, 6), names, 0, 20)
    assert "class 'c' has 6 images" in str(caught.value)
    assert "lower `shots` to 2, the largest that every class has room for" in str(caught.value)
    assert len(split_rows(labels_of(200, 40, 6), names, 0, 2).train) == 6
    with pytest.raises(UserError, match="to 2, the largest"):
        split_rows(labels_of(200, 40, 6), names, 0, 3)


def test_a_class_of_one_image_is_not_helped_by_fewer_shots():
    with pytest.raises(UserError) as caught:
        split_rows(labels_of(9, 1), ("many", "one"), 0, 1)
    assert "class 'one' has 1 image; expected 3 or more" in str(caught.value)
    assert "shots" not in str(caught.value)


def test_a_training_part_alone_is_named(lion: Lion, tmp_path: Path):
    pictures(tmp_path / "photos/train/cats", 9)
    pictures(tmp_path / "photos/train/dogs", 9)
    done = lion("train", "--data", tmp_path / "photos", "--runs", tmp_path / "runs")
    assert done.code == 2
    assert f"name {tmp_path}/photos/train" in done.err


def test_an_unfinished_run_is_told_from_a_folder_without_one(lion: Lion, trained: Path):
    (trained / "checkpoint.safetensors").unlink()
    rows = (trained / METRICS).read_text().splitlines()
    (trained / METRICS).write_text(rows[0] + "\n")
    picture = trained.parent / "one.png"
    Image.new("L", (16, 16)).save(picture)
    for command in (("predict", trained, picture), ("export", trained), ("info", trained)):
        done = lion(*command)
        assert done.code == 2
        assert "is not finished (1 of 3 epochs)" in done.err
        assert "train it on with --resume --name finished --runs " in done.err


def test_a_list_of_names_is_cut():
    names = [f"class-{index:03}" for index in range(200)]
    assert few(names) == "class-000, class-001, class-002, class-003, class-004 and 195 more"
    assert few(names[:3]) == "class-000, class-001, class-002"
    assert len(few(["x" * 900] * 4)) < 300


def test_other_classes_are_named_and_not_all_of_them(lion: Lion, trained: Path, tmp_path: Path):
    for index in range(60):
        pictures(tmp_path / f"other/{index:02}-{'x' * 60}", 1)
    done = lion("eval", trained, "--data", tmp_path / "other")
    assert done.code == 2
    assert len(done.err) < 1500


def test_warnings_show_neither_file_nor_line():
    with plain_warnings():
        text = warnings.formatwarning("rows did not converge", RuntimeWarning, "solver.py", 12)
    assert text == "warning: rows did not converge\n"
    assert "solver.py" in warnings.formatwarning("x", RuntimeWarning, "solver.py", 12)  # as before


def test_a_run_that_diverged_says_so_and_ends_with_an_error(
    lion: Lion, image_folder: Path, backbone_file: Path, tmp_path: Path
):
    done = lion("train", "--data", image_folder, "--backbone", backbone_file, "--shots", 4,
                "--validation-shots", 3, "--epochs", 3, "--lr", 999,
                "--runs", tmp_path, "--name", "wild", "--method", "linear")  # fmt: skip
    assert done.code == 1
    assert "diverged" in done.err
    assert "lower --lr" in done.err
    assert json.loads((tmp_path / "wild/result.json").read_text())["diverged"] is True


def test_resume_remembers_the_data(lion: Lion, trained: Path, tmp_path: Path):
    done = lion("train", "--resume", "--runs", trained.parent, "--name", "finished")
    assert done.code == 0, done.err
    assert "test accuracy" in done.out
    missing = lion("train", "--runs", tmp_path / "none")
    assert missing.code == 2
    assert "Missing option '--data'" in missing.err
    nameless = lion("train", "--resume", "--runs", trained.parent)
    assert nameless.code == 2
    assert "--name" in nameless.err


def test_forty_photographs_a_class_are_trained_on_without_an_option(
    lion: Lion, backbone_file: Path, tmp_path: Path
):
    for name, count in (("cats", 40), ("dogs", 45)):
        pictures(tmp_path / "photos" / name, count)
    data = ("--data", tmp_path / "photos", "--backbone", backbone_file, "--epochs", 1,
            "--method", "linear", "--runs", tmp_path / "runs")  # fmt: skip
    done = lion("train", *data)
    assert done.code == 0, done.err
    assert "14 images a class" in done.err  # 12 of 40 are for the test, and half of the rest
    config = json.loads((tmp_path / "runs/photos-linear-s42/config.json").read_text())
    assert config["shots"] == 14
    again = lion("train", *data, "--resume")
    assert again.code == 0, again.err
    asked = lion("train", *data, "--shots", 20, "--name", "asked")
    assert asked.code == 2
    assert "lower --shots to 14" in asked.err


def test_compare_and_sweep_fit_shots_and_say_what_they_learn_from(
    lion: Lion, image_folder: Path, backbone_file: Path, tmp_path: Path
):
    shared = ("--data", image_folder, "--backbone", backbone_file, "--epochs", 1, "--hidden", 4,
              "--methods", "linear,lion", "--runs", tmp_path)  # fmt: skip
    compared = lion("compare", *shared, "--seeds", "1,2", "--name", "c")
    swept = lion("sweep", *shared, "--grid", "lr=0.01,0.02", "--name", "s")
    for done in (compared, swept):
        assert done.code == 0, done.err
        assert "training on 4 images a class, not 20" in done.err
        assert done.out.count("36 images in 3 classes (dark, light, middle), 12 a class") == 1
        assert "images: 12 for training, 12 for validation, 12 for test" in done.out
        assert "12 x 12 pixels in grey; methods: linear, lion" in done.out
    again = lion("compare", *shared, "--seeds", "1,2", "--name", "c")
    assert "images in 3 classes" not in again.out
    chosen = lion("sweep", *shared, "--over", "shots=2,3", "--name", "o")
    assert "images: 6 for training" in chosen.out
    assert "images: 9 for training" in chosen.out
    assert "training on" not in chosen.err
