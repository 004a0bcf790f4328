"""`python -m lion_models` is the `lion` command."""

from lion_models.cli import main

main()
