"""Which files and sub-folders of a folder are data, and which are its split."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from lion_models.data import find_images, open_source


def noise(path: Path, seed: int = 0) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 255, (12, 12, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    return path


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    for seed, name in enumerate(("cat", "dog")):
        for index in range(3):
            noise(tmp_path / "photos" / name / f"{index}.png", seed=10 * seed + index)
    return tmp_path / "photos"


CLUTTER = (".ipynb_checkpoints", "__MACOSX", "@eaDir")


@pytest.mark.parametrize("name", CLUTTER)
def test_folders_that_programs_leave_behind_hold_no_data(photos: Path, name: str):
    before = find_images(photos)
    noise(photos / "cat" / name / "0-checkpoint.png")
    noise(photos / "cat" / "inner" / name / "deep" / "0.png")
    assert find_images(photos) == before
    assert len(open_source(str(photos), 3, 8)) == 6


def test_a_folder_below_a_hidden_one_can_be_named(tmp_path: Path):
    path = noise(tmp_path / ".cache" / "cat" / "0.png")
    assert find_images(path.parent) == [path]


@pytest.mark.parametrize("name", CLUTTER)
def test_folders_that_programs_leave_behind_are_no_classes(photos: Path, name: str):
    (photos / name).mkdir()
    assert open_source(str(photos), 3, 8).classes == ("cat", "dog")
    noise(photos / name / "0.png")
    assert open_source(str(photos), 3, 8).classes == ("cat", "dog")
