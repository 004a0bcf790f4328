"""Adjoints: how the gradient of a solution is computed; one file each."""

from deqcore.adjoints.base import Adjoint
from deqcore.adjoints.implicit import Implicit
from deqcore.adjoints.phantom import Phantom
from deqcore.adjoints.unrolled import Unrolled

__all__ = ["Adjoint", "Implicit", "Phantom", "Unrolled"]
