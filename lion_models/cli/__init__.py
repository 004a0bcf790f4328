"""The `lion` command."""

from lion_models.cli.commands import app, main

__all__ = ["app", "main"]
