"""Fixed-point problems and solvers that the tests share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

from deqcore import Anderson, Broyden, NewtonKrylov, Picard
from examples.own_solver import Aitken


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def affine(
    dim: int, radius: float, seed: int = 0, dtype: torch.dtype = torch.float64
) -> tuple[Tensor, Tensor]:
    """A with that spectral radius, and b: the map z -> A z + b."""
    g = generator(seed)
    A = torch.randn(dim, dim, generator=g, dtype=torch.float64)
    A = A * (radius / torch.linalg.eigvals(A).abs().max())
    return A.to(dtype), torch.randn(dim, generator=g, dtype=torch.float64).to(dtype)


def wave(z: Tensor, shift: Tensor, strength: Tensor) -> Tensor:  # [B, D], [B, D], [B, 1]
    """A non-linear map that couples neighbours, and whose rows are independent bit for bit.

    It is made of correctly rounded operations on single elements alone: a gemm, or a vectorised
    tanh, may depend on where in the batch a row is.
    """
    neighbours = 0.4 * z.roll(1, 1) - 0.3 * z
    return strength * (neighbours + 0.5 * z / (1 + z * z)) + shift


def wave_batch(
    batch: int, dim: int, seed: int, dtype: torch.dtype = torch.float64
) -> tuple[Tensor, Tensor, Tensor]:
    """z0, shift, strength: rows of different difficulty, so that they end at different steps."""
    g = generator(seed)
    z0 = torch.randn(batch, dim, generator=g, dtype=torch.float64)
    shift = torch.randn(batch, dim, generator=g, dtype=torch.float64)
    strength = 1.2 * torch.rand(batch, 1, generator=g, dtype=torch.float64)
    return z0.to(dtype), shift.to(dtype), strength.to(dtype)


@dataclass
class Counted:
    """A callable that keeps what it was given and how often."""

    f: Callable[..., Any]
    seen: list[Any] = field(default_factory=list)

    def __call__(self, z: Any, *args: Any) -> Any:
        self.seen.append(z)
        return self.f(z, *args)

    @property
    def calls(self) -> int:
        return len(self.seen)


def halving_damping(step: int) -> float:
    return 0.5 + 0.5**step


DAMPINGS = st.sampled_from([1.0, 0.7, 1.3, halving_damping])


def picards(**fixed: Any) -> st.SearchStrategy[Picard]:
    return st.builds(Picard, damping=DAMPINGS, **_constants(fixed))


def andersons(**fixed: Any) -> st.SearchStrategy[Anderson]:
    drawn = {
        "memory": st.sampled_from([1, 2, 3, 5, 9, 12]),
        "damping": DAMPINGS,
        "ridge": st.sampled_from([1e-8, 0.0, 1e-4]),
        "start": st.sampled_from([0, 0, 1, 3]),
        "restart": st.sampled_from([None, None, 1, 4]),
        "safeguard": st.sampled_from([2.0, 1.0, float("inf")]),
        "max_weight": st.sampled_from([1e4, 2.0]),
    }
    return st.builds(Anderson, **{**drawn, **_constants(fixed)})


def broydens(**fixed: Any) -> st.SearchStrategy[Broyden]:
    drawn = {"memory": st.sampled_from([1, 2, 5, 10, 30]), "damping": DAMPINGS}
    return st.builds(Broyden, **{**drawn, **_constants(fixed)})


def aitkens(**fixed: Any) -> st.SearchStrategy[Aitken]:
    """The solver of examples/own_solver.py: the laws hold for what users write, too."""
    drawn = {"damping": DAMPINGS, "bound": st.sampled_from([10.0, 1.0, float("inf")])}
    return st.builds(Aitken, **{**drawn, **_constants(fixed)})


def newton_krylovs(**fixed: Any) -> st.SearchStrategy[NewtonKrylov]:
    drawn = {"memory": st.sampled_from([1, 2, 5, 20]), "damping": DAMPINGS}
    return st.builds(NewtonKrylov, **{**drawn, **_constants(fixed)})


def solvers(**fixed: Any) -> st.SearchStrategy[Any]:
    """Any solver, with any options; ``fixed`` are those that all share."""
    kinds = (picards, andersons, broydens, newton_krylovs, aitkens)
    return st.one_of(*(kind(**fixed) for kind in kinds))


def _constants(options: dict[str, Any]) -> dict[str, Any]:
    return {name: st.just(value) for name, value in options.items()}


def rms(x: Tensor) -> Tensor:
    """Of each row, in float64."""
    x = x.flatten(1).double()
    return x.square().sum(1).div(max(x.shape[1], 1)).sqrt()


def equal(a: Tensor, b: Tensor) -> bool:
    """Bit for bit (up to the payload of NaN)."""
    return (
        a.shape == b.shape
        and a.dtype == b.dtype
        and torch.equal(torch.nan_to_num(a, 12345.0), torch.nan_to_num(b, 12345.0))
        and torch.equal(a.isnan(), b.isnan())
    )
