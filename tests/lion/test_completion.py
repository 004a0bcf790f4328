"""What a shell completes, and where its script is written."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest
from click.shell_completion import BashComplete

from lion_models.cli.app import lion as group
from tests.support.command import Lion


def completed(*words: str) -> list[str]:
    """What follows the last word, which is being written."""
    *before, last = words
    return [item.value for item in BashComplete(group, {}, "lion", "X").get_completions(
        before, last)]  # fmt: skip


def test_commands_options_choices_and_names_are_completed():
    assert completed("pre") == ["predict"]
    assert completed("train", "--meth") == ["--method"]
    assert completed("train", "--method", "li") == ["linear", "lion"]
    assert completed("train", "--transform", "fgvc-") == ["fgvc-resized"]
    assert completed("train", "--data", "dig") == ["digits"]
    assert completed("train", "--backbone", "vit") == ["vit-s14-focus"]


@pytest.mark.parametrize("words", [("--data", "photos/"), ("--backbone", "file"), ("--runs", "r")])
def test_a_place_is_completed_as_a_file(words: tuple[str, str]):
    items = BashComplete(group, {}, "lion", "X").get_completions(["train", words[0]], words[1])
    assert [item.type for item in items] in (["file"], ["dir"])


@pytest.mark.parametrize(
    ("shell", "place"),
    [("bash", "bash-completion/completions/lion"), ("zsh", "lion/complete.zsh"),
     ("fish", "fish/completions/lion.fish")],
)  # fmt: skip
def test_the_script_is_written_where_the_shell_finds_it_or_is_told(
    lion: Lion, shell: str, place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    monkeypatch.setenv("SHELL", f"/usr/bin/{shell}")
    done = lion("--install-completion")
    assert done.code == 0, done.err
    assert str(tmp_path / place) in done.out
    assert "_LION_COMPLETE" in (tmp_path / place).read_text()
    if shutil.which(shell):
        subprocess.run([shell, "-n", tmp_path / place], check=True)


def test_an_unknown_shell_is_named(lion: Lion, monkeypatch: pytest.MonkeyPatch):
    done = lion("--install-completion", "tcsh")
    assert done.code == 2
    assert "expected one of bash, fish, zsh, got 'tcsh'" in done.err
    monkeypatch.delenv("SHELL", raising=False)
    assert "which shell?" in lion("--install-completion").err
