"""`python -m deqcore`: print what this installation consists of."""

from __future__ import annotations

import argparse
import json

from deqcore._build_info import build_info, format_build_info


def main() -> None:
    """Print build_info(), aligned or as JSON."""
    parser = argparse.ArgumentParser(prog="python -m deqcore", description=__doc__)
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    arguments = parser.parse_args()
    info = build_info()
    print(json.dumps(info, indent=2) if arguments.json else format_build_info(info))


if __name__ == "__main__":
    main()
