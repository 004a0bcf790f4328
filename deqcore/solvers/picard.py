"""Picard iteration: z <- z + damping * (f(z) - z)."""

from __future__ import annotations

import math

from deqcore.ops._rows import Limits
from deqcore.ops.anderson_step import AndersonNumbers
from deqcore.solvers._options import Damping, options, require_damping
from deqcore.solvers.anderson import MixingSolver


@options
class Picard(MixingSolver):
    """Damped fixed-point iteration, z <- z + damping * (f(z) - z), row by row.

    It is Anderson acceleration with one stored residual, and runs on the same kernel.

    Args:
        damping: in (0, 2]; a float, or a function of the step (1, 2, ...).
        rtol, atol, max_steps, patience, check_every, record_trace: see ``deqcore.Solver``.

    Raises:
        TypeError: an unknown option.
        ValueError: an option out of range.
    """

    damping: Damping = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        require_damping(self)

    def ring_size(self) -> int:
        return 1

    def numbers(self, limits: Limits) -> AndersonNumbers:
        return AndersonNumbers(
            limits=limits, ridge=0.0, start=0, restart=0, safeguard=math.inf, max_weight=math.inf
        )
