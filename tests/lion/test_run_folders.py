"""What --runs, --name and --overwrite may write to and remove: a run's folder and nothing else."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from lion_models.errors import UserError
from lion_models.training import RunConfig, prepare_folder


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (("config.json",), r"not a run \(it has neither a run's config"),
        (("config.json", "metrics.jsonl"), "not a run"),
        (("config.json", "model.safetensors", "notes.md", "onnx/m.onnx"), "model.safetensors"),
    ],
)
def test_overwrite_spares_a_folder_whose_configuration_is_of_something_else(
    files: tuple[str, ...], message: str, tmp_path: Path
):
    folder = tmp_path / "model"
    for name in files:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(json.dumps({"model_type": "vit", "hidden_size": 8}))
    with pytest.raises(UserError, match=message):
        prepare_folder(folder, RunConfig("digits"), resume=False, overwrite=True)
    assert all((folder / name).is_file() for name in files)


def test_overwrite_spares_a_run_that_holds_a_file_of_the_users(trained: Path):
    for name in ("model.pt2", "model.onnx", "tensorboard/events.out.1"):
        (trained / name).parent.mkdir(exist_ok=True)
        (trained / name).write_text("of the run")
    (trained / "thesis.txt").write_text("years of work")
    config = RunConfig("digits", epochs=1)
    with pytest.raises(UserError, match=r"holds thesis\.txt, which is no file of a run"):
        prepare_folder(trained, config, resume=False, overwrite=True)
    assert (trained / "thesis.txt").exists()
    assert (trained / "checkpoint.safetensors").exists()
    (trained / "thesis.txt").unlink()
    prepare_folder(trained, config, resume=False, overwrite=True)
    assert [path.name for path in trained.iterdir()] == ["config.json"]
