"""Measured crossovers of the masked matmuls; written by ``python -m deqcore.tune --as-default``."""

CROSSOVERS: dict[str, dict[str, list[tuple[int, float]]]] = {}
