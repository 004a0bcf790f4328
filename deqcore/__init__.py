"""Fast, trustworthy fixed-point layers for PyTorch."""

from typing import TYPE_CHECKING, Any

from deqcore import _kernels
from deqcore._build_info import build_info
from deqcore._loop import Problem, Solved
from deqcore._notices import ConvergenceWarning
from deqcore._solution import ConvergenceError, Solution, SolveReport
from deqcore._status import Status
from deqcore._version import __version__
from deqcore.adjoints import Adjoint, Implicit, Phantom, Unrolled
from deqcore.capture import CapturedSolver, capture
from deqcore.dropout import FixedDropout
from deqcore.fixed_point import fixed_point, root
from deqcore.layers import ImplicitLayer
from deqcore.regularizers import jacobian_penalty, spectral_radius
from deqcore.solvers import Anderson, Broyden, NewtonKrylov, Picard, Solver, StepInfo
from deqcore.sparse import (
    MaskedLinear,
    SparsityPattern,
    masked_linear,
    prune_layer,
    restore_pruned,
    rewind_pruned,
)

if TYPE_CHECKING:
    from deqcore.diagnosis import Diagnosis, diagnose

_kernels.load()

__all__ = [
    "Adjoint",
    "Anderson",
    "Broyden",
    "CapturedSolver",
    "ConvergenceError",
    "ConvergenceWarning",
    "Diagnosis",
    "FixedDropout",
    "Implicit",
    "ImplicitLayer",
    "MaskedLinear",
    "NewtonKrylov",
    "Phantom",
    "Picard",
    "Problem",
    "Solution",
    "SolveReport",
    "Solved",
    "Solver",
    "SparsityPattern",
    "Status",
    "StepInfo",
    "Unrolled",
    "__version__",
    "build_info",
    "capture",
    "diagnose",
    "fixed_point",
    "jacobian_penalty",
    "masked_linear",
    "prune_layer",
    "restore_pruned",
    "rewind_pruned",
    "root",
    "spectral_radius",
]


if not TYPE_CHECKING:  # to whom each name that there is not would be Any

    def __getattr__(name: str) -> Any:
        if name in ("Diagnosis", "diagnose"):  # which a training run does not need
            from deqcore import diagnosis

            return getattr(diagnosis, name)
        raise AttributeError(f"module 'deqcore' has no attribute {name!r}")
