"""Solvers: one file each, options and steps; the iteration itself is ``deqcore._loop``."""

from deqcore.solvers.anderson import Anderson
from deqcore.solvers.base import Solver, StepInfo
from deqcore.solvers.broyden import Broyden
from deqcore.solvers.newton_krylov import NewtonKrylov
from deqcore.solvers.picard import Picard

__all__ = ["Anderson", "Broyden", "NewtonKrylov", "Picard", "Solver", "StepInfo"]
