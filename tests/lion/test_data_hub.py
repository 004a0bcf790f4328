"""torchvision and Hugging Face data sets, through stand-ins for the optional packages."""

from __future__ import annotations

import io
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from lion_models.base.errors import UserError
from lion_models.data import open_source, split_source
from lion_models.data.base import TEST, TRAIN, VALIDATION
from tests.support.command import Lion

GREY = [Image.new("L", (6, 6), 10 * index) for index in range(20)]


def install(monkeypatch: pytest.MonkeyPatch, name: str, **content: Any) -> None:
    """Put a module of that name where imports look first."""
    module = types.ModuleType(name)
    for key, value in content.items():
        setattr(module, key, value)
    parent = name.partition(".")[0]
    monkeypatch.setitem(sys.modules, parent, types.ModuleType(parent))
    monkeypatch.setitem(sys.modules, name, module)


class Part:
    """The shape of torchvision's data sets: `targets`, `classes` and `[row] -> (image, label)`."""

    classes = ("even", "odd")

    def __init__(self, offset: int, count: int) -> None:
        self.offset, self.targets = offset, [(offset + row) % 2 for row in range(count)]

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, row: int) -> tuple[Image.Image, int]:
        return GREY[self.offset + row], self.targets[row]


class ByTrain(Part):
    def __init__(self, root: str, train: bool = True, download: bool = False) -> None:
        folder = Path(root)
        if download:
            folder.mkdir(parents=True, exist_ok=True)
            (folder / "data").write_text("here")
        if not (folder / "data").is_file():
            raise RuntimeError("Dataset not found. You can use download=True to download it")
        super().__init__(0 if train else 12, 12 if train else 8)


class BySplit(Part):
    parts = types.MappingProxyType({"train": (0, 8), "val": (8, 6), "test": (14, 6)})

    def __init__(self, root: str, split: str = "train") -> None:
        if split not in self.parts:
            raise ValueError(f"Unknown value '{split}' for argument split")
        super().__init__(*self.parts[split])
        self._labels, self.categories = np.array(self.targets), ["even", "odd"]
        del self.targets

    def __len__(self) -> int:
        return len(self._labels)

    def __getitem__(self, row: int) -> tuple[np.ndarray, int]:
        return np.asarray(GREY[self.offset + row]), int(self._labels[row])


class OnlyTest(BySplit):
    parts = types.MappingProxyType({"test": (0, 20)})


class Boxes(Part):
    def __init__(self, root: str) -> None:
        super().__init__(0, 4)
        self.targets = [{"box": 1}] * 4


@pytest.fixture
def torchvision(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setenv("LION_DATA", str(tmp_path))
    install(monkeypatch, "torchvision.datasets", CIFAR10=ByTrain, Flowers102=BySplit,
            Odd=OnlyTest, Boxes=Boxes)  # fmt: skip
    return tmp_path


def test_torchvision_sets_keep_their_parts(torchvision: Path):
    (torchvision / "torchvision/CIFAR10").mkdir(parents=True)
    (torchvision / "torchvision/CIFAR10/data").write_text("")
    source = open_source("torchvision:CIFAR10", 3, 4)
    assert source.classes == ("even", "odd")
    assert source.official.tolist() == [TRAIN] * 12 + [TEST] * 8
    assert source.load(torch.tensor([0, 11, 12, 19]))[:, 0, 0, 0].tolist() == [0, 110, 120, 190]
    flowers = open_source("torchvision:Flowers102", 1, 4)
    assert flowers.official.tolist() == [TRAIN] * 8 + [VALIDATION] * 6 + [TEST] * 6
    assert flowers.labels.tolist() == [0, 1] * 10
    assert flowers.load(torch.tensor([14])).unique().tolist() == [140]
    assert split_source(flowers, 0, 2).test.tolist() == list(range(14, 20))


def test_torchvision_mistakes_are_named(torchvision: Path):
    with pytest.raises(UserError, match="has no 'CIFAR1'; did you mean 'torchvision:CIFAR10'"):
        open_source("torchvision:CIFAR1", 3, 4)
    with pytest.raises(UserError, match=r"Dataset not found.*run: lion data prepare torchvision:C"):
        open_source("torchvision:CIFAR10", 3, 4)
    with pytest.raises(UserError, match="knows no part 'train'"):
        open_source("torchvision:Odd", 3, 4)
    with pytest.raises(UserError, match="labels are not one class to an image"):
        open_source("torchvision:Boxes", 3, 4)


def test_prepare_lets_torchvision_fetch(torchvision: Path, lion: Lion):
    done = lion("data", "prepare", "torchvision:CIFAR10", "--folder", torchvision / "else")
    assert done.code == 0, done.err
    assert "20 images in 2 classes" in done.out
    assert (torchvision / "else/torchvision/CIFAR10/data").is_file()


@pytest.mark.parametrize(
    ("name", "extra"), [("torchvision:CIFAR10", "torchvision"), ("hf:beans", "datasets")]
)
def test_a_missing_package_names_its_extra(name: str, extra: str, monkeypatch):
    for loaded in [key for key in sys.modules if key.startswith(f"{extra}.")]:
        monkeypatch.delitem(sys.modules, loaded)
    monkeypatch.setitem(sys.modules, extra, None)
    with pytest.raises(UserError, match=rf"run: pip install 'deqcore\[{extra}\]'"):
        open_source(name, 3, 8)


class ClassLabel:
    def __init__(self, *names: str) -> None:
        self.names = list(names)


ImageFeature = type("Image", (), {})
Value = type("Value", (), {})


class Table:
    """The shape of a Hugging Face data set: `features`, `[column]` and `[row]`."""

    def __init__(self, labels: list[Any], features: dict[str, Any] | None = None, offset: int = 0):
        self.features = features or {"image": ImageFeature(), "label": ClassLabel("even", "odd")}
        self.offset, self.labels = offset, labels

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, key: int | str) -> Any:
        if isinstance(key, str):
            return self.labels
        return {"image": GREY[self.offset + key], "label": self.labels[key]}


def hugging_face(monkeypatch: pytest.MonkeyPatch, loaded: Any) -> list[tuple[Any, ...]]:
    calls: list[tuple[Any, ...]] = []

    def load(*arguments: Any) -> Any:
        calls.append(arguments)
        if isinstance(loaded, Exception):
            raise loaded
        return loaded

    install(monkeypatch, "datasets", load_dataset=load, load_from_disk=load)
    return calls


def test_hugging_face_splits_keep_their_roles(monkeypatch):
    calls = hugging_face(monkeypatch, {
        "train": Table([0, 1] * 4), "validation": Table([0, 1] * 3, offset=8),
        "test": Table([0, 1] * 3, offset=14), "unsupervised": Table([-1] * 5)})  # fmt: skip
    source = open_source("hf:org/name:small", 1, 6)
    assert calls == [("org/name", "small")]
    assert source.official.tolist() == [TRAIN] * 8 + [VALIDATION] * 6 + [TEST] * 6
    assert source.load(torch.tensor([9, 15]))[:, 0, 0, 0].tolist() == [90, 150]


def test_a_saved_data_set_without_splits_is_divided_here(monkeypatch, tmp_path: Path):
    (tmp_path / "dataset_info.json").write_text("{}")
    (tmp_path / "state.json").write_text("{}")
    calls = hugging_face(monkeypatch, Table([0, 1] * 10))
    source = open_source(str(tmp_path), 1, 6)
    assert calls == [(str(tmp_path),)]
    assert source.official is None
    assert len(split_source(source, 0, 3).test) == 6


def test_pictures_as_bytes_and_arrays_are_read(monkeypatch):
    stored = io.BytesIO()
    Image.new("RGB", (6, 6), (7, 7, 7)).save(stored, "PNG")
    values: list[Any] = [
        {"bytes": stored.getvalue(), "path": None},
        np.full((6, 6, 3), 9, "uint8"),
        torch.full((1, 6, 6), 11, dtype=torch.uint8),
        {"bytes": b"not an image"},
    ]

    class Values(Table):
        def __getitem__(self, key: int | str) -> Any:
            return self.labels if isinstance(key, str) else {"image": values[key]}

    hugging_face(monkeypatch, Values([0, 1, 0, 1]))
    source = open_source("hf:x", 3, 6)
    assert source.load(torch.arange(3))[:, 2, 0, 0].tolist() == [7, 9, 11]
    with pytest.raises(UserError, match="`data` hf:x: image 3 of part 1 cannot be decoded"):
        source.load(torch.tensor([3]))


def test_a_test_split_without_labels_is_left_out_with_a_warning(monkeypatch):
    hugging_face(monkeypatch, {"train": Table([0, 1] * 8), "test": Table([-1] * 4)})
    with pytest.warns(UserWarning, match="its split 'test' has no labels and is left out"):
        source = open_source("hf:x", 1, 6)
    assert len(source) == 16
    assert source.official is None


@pytest.mark.parametrize(
    ("loaded", "message"),
    [(FileNotFoundError("no such data set"), "cannot be loaded .FileNotFoundError: no such data"),
     ({"train": Table([0, None, 1])}, "1 of 3 rows of split 'train' have no label in column 'la"),
     ({"a": Table([0]), "b": Table([1])}, "has the splits a, b; expected one called 'train'"),
     (Table([0, 1], {"image": ImageFeature(), "text": Value()}), r"it has image \(Image\), text"),
     (Table([0, 1], {"a": ImageFeature(), "b": ImageFeature(), "label": Value()}), "one column of"),
     (Table([0, 2]), "labels run to 2 for 2 class names"),
     (Table([0, 0], {"image": ImageFeature(), "label": Value()}), "at least two classes")],
)  # fmt: skip
def test_hugging_face_mistakes_are_named(loaded: Any, message: str, monkeypatch):
    hugging_face(monkeypatch, loaded)
    with pytest.raises(UserError, match=message):
        open_source("hf:x", 1, 6)


def test_hugging_face_data_sets_need_no_preparation(lion: Lion):
    done = lion("data", "prepare", "hf:beans")
    assert done.code == 2
    assert "use --data hf:beans" in done.err
