"""Every code block of the docs runs as it is printed, and every command is one that there is."""

from __future__ import annotations

import re
import shlex
import warnings
from collections import Counter
from pathlib import Path

import pytest
import torch

from lion_models.cli.app import lion
from tests.support.pages import PAGES, fenced, run_python, shell_lines, text

PYTHON = {
    page: blocks
    for page in PAGES
    if (blocks := [block for block in fenced(page) if block.language == "python"])
}
# What blocks may need that a machine that runs these tests may lack, and how many do.
NEEDS = {"gpu": 1, "network": 0, "jaxopt": 1, "optimistix": 1, "peft": 1, "transformers": 1}


def shape(output: str) -> str:
    """Without the digits, which differ between processors."""
    return re.sub(r"-?\d[\d,.]*(e[+-]\d+)?", "#", output).strip()


@pytest.mark.parametrize("page", [page for page in PYTHON if page != "README.md"])
def test_python_of_a_page_runs_from_top_to_bottom(
    page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MPLBACKEND", "Agg")
    torch.manual_seed(0)
    warnings.simplefilter("error", DeprecationWarning)
    for block, printed in run_python(page):
        if block.output is not None:
            assert shape(printed) == shape(block.output), f"{page}:{block.line}"


def test_blocks_that_this_suite_may_leave_out_are_counted():
    counts = Counter(need for blocks in PYTHON.values() for block in blocks for need in block.needs)
    assert counts == Counter({need: count for need, count in NEEDS.items() if count})


def test_no_python_hides_in_a_block_of_another_kind():
    for page in PAGES:
        for line in shell_lines(page):
            assert not re.match(r"(import|from) \w", line), f"{page}: fence it as python: {line}"


@pytest.mark.parametrize("page", [page for page in PAGES if "lion " in text(page)])
def test_commands_of_lion_parse(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    for line in shell_lines(page):
        words = shlex.split(line)
        if "-m lion_models " in line:  # by python or torchrun
            words = ["lion", *words[words.index("lion_models") + 1 :]]
        if words[0] != "lion" or "|" in words:
            continue
        arguments = [word for word in words[1:] if word != "..."]
        for word in arguments:  # folders and files that the command wants to find
            if "/" in word or "." in word:
                Path(word).mkdir(parents=True, exist_ok=True)
        context = lion.make_context("lion", arguments)
        name, command, rest = lion.resolve_command(context, context._protected_args + context.args)
        command.make_context(name, rest, parent=context)


@pytest.mark.parametrize("page", PAGES)
def test_targets_of_make_exist(page: str):
    makefile = text("Makefile")
    for line in shell_lines(page):
        words = line.split()
        if words[0] == "make" and len(words) > 1:
            assert re.search(rf"^{words[1]}:", makefile, flags=re.MULTILINE), f"{page}: {line}"
