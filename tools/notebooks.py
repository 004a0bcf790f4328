"""Run the examples that are notebooks, and write them with what they print and draw.

The script is the source, in jupytext's percent format; a notebook beside it is only ever written by
this, from all of its cells in order. ``make notebooks`` installs what it needs.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

EXAMPLES = Path(__file__).parents[1] / "examples"
NAMES = ("two_moons", "heat_plate")


def script_of(notebook: dict[str, Any]) -> str:
    """The script that a notebook was made from."""
    parts = []
    for cell in notebook["cells"]:
        text = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            lines = [f"# {line}".rstrip() for line in text.split("\n")]
            parts.append("\n".join(["# %% [markdown]", *lines]))
        else:
            parts.append(f"# %%\n{text}")
    return "\n\n".join(parts) + "\n"


def executed(script: Path) -> str:
    """A notebook's JSON, without anything of the machine that ran it or the time."""
    import jupytext
    import nbclient

    notebook = jupytext.read(script)
    with tempfile.TemporaryDirectory() as folder:
        nbclient.NotebookClient(notebook, resources={"metadata": {"path": folder}}).execute()
    notebook.metadata = {"kernelspec": {"name": "python3", "display_name": "Python 3"}}
    for number, cell in enumerate(notebook.cells):
        cell.id, cell.metadata = f"cell-{number}", {}
        for output in cell.get("outputs", ()):
            output.get("data", {}).pop("text/plain", None)  # has addresses
            if output.output_type == "stream" and output.name == "stderr":
                raise RuntimeError(f"{script.name}: a warning in a notebook:\n{output.text}")
    return json.dumps(notebook, indent=1, ensure_ascii=False) + "\n"


def main() -> None:
    for name in NAMES:
        path = EXAMPLES / f"{name}.ipynb"
        unfinished = path.with_suffix(".unfinished")
        unfinished.write_text(executed(path.with_suffix(".py")))
        unfinished.replace(path)
        print(f"{path.name}: {path.stat().st_size / 1e3:.0f} kB")


if __name__ == "__main__":
    main()
