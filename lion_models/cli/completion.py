"""Shell completion of the `lion` command: where each shell looks for it, and what makes it."""

from __future__ import annotations

import os
from pathlib import Path

import rich_click as click
from click.shell_completion import get_completion_class
from platformdirs import user_config_path, user_data_path

from lion_models.base.errors import UserError, choose
from lion_models.base.files import make_folder, write_bytes

__all__ = ["SHELLS", "install_completion"]

SHELLS = ("bash", "zsh", "fish")
VARIABLE = "_LION_COMPLETE"


def install_completion(command: click.Command, shell: str) -> str:
    """Write the script by which a shell completes `lion`, and say how it is loaded.

    Args:
        command: what is completed.
        shell: one of `SHELLS`; empty means the user's, by $SHELL.

    Raises:
        UserError: another shell, or a file that cannot be written.
    """
    shell = shell or Path(os.environ.get("SHELL", "")).name
    if not shell:
        raise UserError(f"--install-completion: which shell? Expected {' or '.join(SHELLS)}")
    kind = get_completion_class(choose("--install-completion", shell, SHELLS))
    if kind is None:  # click has all three
        raise UserError(f"--install-completion: this click has no completion for {shell}")
    # Outside of the class's own `source`, which runs bash to ask for its version.
    maker = kind(command, {}, "lion", VARIABLE)
    script = maker.source_template % maker.source_vars()
    path = _path_of(shell)
    make_folder(path.parent)
    write_bytes(path, script.encode())
    return f"wrote {path}; {_HOW[shell].format(path=path)}"


_HOW = {
    "bash": "new shells complete lion where the package bash-completion is installed; elsewhere "
    "add to ~/.bashrc: source {path}",
    "zsh": "add to ~/.zshrc, after compinit: source {path}",
    "fish": "new shells complete lion",
}


def _path_of(shell: str) -> Path:
    if shell == "bash":
        return user_data_path("bash-completion") / "completions" / "lion"
    if shell == "fish":
        return user_config_path("fish") / "completions" / "lion.fish"
    return user_data_path("lion", appauthor=False) / "complete.zsh"
