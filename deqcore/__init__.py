"""Fast, trustworthy fixed-point layers for PyTorch."""

from deqcore import _kernels
from deqcore._build_info import build_info
from deqcore._loop import Problem, Solved
from deqcore._notices import ConvergenceWarning
from deqcore._solution import ConvergenceError, Solution, SolveReport
from deqcore._status import Status
from deqcore._version import __version__
from deqcore.adjoints import Adjoint, Implicit, Phantom, Unrolled
from deqcore.capture import CapturedSolver, capture
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

_kernels.load()

__all__ = [
    "Adjoint",
    "Anderson",
    "Broyden",
    "CapturedSolver",
    "ConvergenceError",
    "ConvergenceWarning",
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
    "fixed_point",
    "jacobian_penalty",
    "masked_linear",
    "prune_layer",
    "restore_pruned",
    "rewind_pruned",
    "root",
    "spectral_radius",
]
