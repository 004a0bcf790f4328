"""`python -m benchmarks.report`: docs/performance.md and its pictures, from committed results.

Without options, the tables between the page's markers and the pictures in docs/images are made.
`--check` only says whether the tables are what the results give (exit code 1 if not). `--compare`
names what became slower from BEFORE to AFTER, two files of `python -m benchmarks --out FILE` or
`benchmarks.gpu`: by ratio to the peer, beyond 5% and beyond the p10 - p90 of both runs'
repetitions; exit code 1 if anything did.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from benchmarks.report.comparison import compare, describe
from benchmarks.report.results import Results, Run
from benchmarks.report.tables import fill

DOCS = Path(__file__).parents[2] / "docs"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.report",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--check", action="store_true", help="write nothing")
    parser.add_argument("--compare", nargs=2, type=Path, metavar=("BEFORE", "AFTER"))
    options = parser.parse_args(arguments)
    if options.compare:
        try:
            before, after = map(Run.read, options.compare)
            changes = compare(before, after)
        except (OSError, ValueError) as error:
            parser.error(str(error))
        print("\n".join(describe(before, after, changes)))
        return int(any(change.verdict == "slower" for change in changes))

    page, results = DOCS / "performance.md", Results.read()
    text = page.read_text()
    filled = fill(text, results)
    if options.check:
        print(f"{page}: {'up to date' if filled == text else 'run python -m benchmarks.report'}")
        return int(filled != text)
    temporary = page.with_suffix(".tmp")
    temporary.write_text(filled)
    temporary.replace(page)

    from benchmarks.report.pictures import draw_all  # matplotlib takes its time

    for path in draw_all(results, DOCS / "images"):
        print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
