"""The `lion` command."""

import sys

__all__ = ["main"]


def main() -> None:
    """Entry point of the `lion` script."""
    try:
        from lion_models.cli.app import lion
    except ModuleNotFoundError as error:
        sys.exit(f"error: lion needs the package '{error.name}'; run: pip install 'deqcore[lion]'")
    lion()
