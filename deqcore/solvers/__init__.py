"""Solvers: one file each, options and steps; the iteration itself is ``deqcore._loop``."""

from deqcore.solvers._options import SolverOptions
from deqcore.solvers.anderson import Anderson
from deqcore.solvers.broyden import Broyden
from deqcore.solvers.picard import Picard

__all__ = ["Anderson", "Broyden", "Picard", "SolverOptions"]
