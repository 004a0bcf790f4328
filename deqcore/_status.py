"""How a row ends, and what to do when it did not converge."""

from __future__ import annotations

import enum


class Status(enum.IntEnum):
    """How one row of a batch ended. ``Solution.status`` is an int8 tensor of these values."""

    CONVERGED = 0
    MAX_STEPS = 1
    STALLED = 2
    DIVERGED = 3
    NONFINITE = 4
    INCONSISTENT = 5  # it had converged, and evaluated again, without having moved, it had not

    @property
    def advice(self) -> str:
        """One sentence on what to try."""
        return _ADVICE[self]


RANDOM_ADVICE = (
    "numbers were drawn from torch's generator in its evaluations (dropout in training mode?), so "
    "there is no fixed point: use deqcore.FixedDropout, which draws one mask for a solve, eval() "
    "mode, or pass what is drawn as an argument."
)

_ADVICE = {
    Status.CONVERGED: "nothing to do.",
    Status.MAX_STEPS: (
        "no tolerance was met in time: raise max_steps, loosen rtol or atol, or start nearer; if "
        "record_trace=True shows a residual that grows, f expands: bound its Lipschitz constant, "
        "or use damping below 1."
    ),
    Status.STALLED: (
        "the residual stopped falling before the tolerance: loosen rtol or atol to what the dtype "
        "and f can reach, raise patience, or use float64; if record_trace=True shows one that "
        "grows, f expands: bound its Lipschitz constant, or use damping below 1."
    ),
    Status.DIVERGED: (
        "f expands here: bound its Lipschitz constant (spectral or weight norm), use damping below "
        "1, or add a Jacobian penalty in training."
    ),
    Status.NONFINITE: (
        "f returned NaN or inf, or float64 values whose squares are inf (near 1e154): check its "
        "inputs and parameters for these rows, or scale the problem."
    ),
    Status.INCONSISTENT: (
        "f gave a row that had converged, and had not moved, another value than before: either "
        "rows depend on each other (batch norm in training mode, graphs, attention over the "
        "batch): pass batch='coupled', which solves the whole batch as one problem; or f is random "
        "or changes from call to call (dropout, spectral norm in training mode): make it "
        "repeatable, dropout by deqcore.FixedDropout."
    ),
}
