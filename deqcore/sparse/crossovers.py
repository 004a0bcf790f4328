"""The tables of crossovers that come with deqcore: one file for each kind of processor.

``python -m deqcore.tune --as-default`` writes them. Those of CPUs were measured on an AMD EPYC of
the fourth generation (Zen 4), one thread, with the dense weight filled anew for each product. The
kinds without "-bf16" are that processor with its wider or bfloat16 instructions turned off, in
torch (ONEDNN_MAX_CPU_ISA, ATEN_CPU_CAPABILITY) and here (DEQCORE_CPU_ISA).
"""

from __future__ import annotations

import json
import re
import warnings
from pathlib import Path

# (tokens, least sparsity), by ascending number of tokens; 2.0 where sparse never wins.
Line = list[tuple[int, float]]
Table = dict[str, dict[str, Line]]  # kind of processor -> "dtype/op/block" -> line

TABLES = Path(__file__).with_name("tables")
# Compute capability of each GPU in TABLES: one that has no table takes that of its nearest.
GPUS = {"NVIDIA H200": (9, 0)}


def read_table(path: Path) -> Table:
    """The table in a file; empty if there is none, or if it is damaged (with a warning)."""
    try:
        data = json.loads(path.read_text())
        return {
            kind: {
                name: sorted((int(tokens), float(sparsity)) for tokens, sparsity in line)
                for name, line in lines.items()
            }
            for kind, lines in data.items()
        }
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, TypeError, AttributeError) as error:
        warnings.warn(
            f"deqcore: {path} is not a table of crossovers ({error}) and is ignored; delete it, or "
            "measure it again with python -m deqcore.tune",
            RuntimeWarning,
            stacklevel=2,
        )
        return {}


def write_table(path: Path, table: Table) -> None:
    """Write a table so that ``read_table`` reads it, and people a change of it."""
    kinds = []
    for kind, lines in sorted(table.items()):
        rows = [f"  {json.dumps(name)}: {json.dumps(line)}" for name, line in lines.items()]
        kinds.append(f" {json.dumps(kind)}: {{\n" + ",\n".join(rows) + "\n }")
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    temporary.write_text("{\n" + ",\n".join(kinds) + "\n}\n")
    temporary.replace(path)


def default_file(kind: str) -> Path:
    """Where the table of a kind of processor is that comes with deqcore."""
    return TABLES / (re.sub(r"[^a-z0-9_]+", "-", kind.lower()) + ".json")


def default_lines(kind: str) -> dict[str, Line]:
    """The lines that come with deqcore for a kind of processor; none where nobody measured it."""
    return read_table(default_file(kind)).get(kind, {})


def nearest_gpu(capability: tuple[int, int]) -> str | None:
    """The GPU with a table whose compute capability is nearest, of the same major version."""
    major, minor = capability
    alike = [kind for kind, (its, _) in GPUS.items() if its == major]
    return min(alike, key=lambda kind: (abs(GPUS[kind][1] - minor), kind), default=None)
