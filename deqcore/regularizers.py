"""How contractive a cell is: a penalty to train with, and the spectral radius to look at.

Both need vector-Jacobian products of f alone, and both take J = df/dz row by row: an f that mixes
the rows of a batch (batch norm in training mode) has no such J, and needs batch="coupled".
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from deqcore._loop import Problem
from deqcore._packing import Packing


def jacobian_penalty(
    f: Callable[..., Any],
    z: Any,
    *args: Any,
    samples: int = 1,
    generator: torch.Generator | None = None,
    batch: Literal["rows", "coupled"] = "rows",
) -> Tensor:
    """Estimate |df/dz|_F^2 / D, averaged over the rows of the batch.

    The value is unbiased (Hutchinson): the mean of |v^T J|^2 / D over random signs v. It is exact
    when the rows of J are orthogonal, as for an elementwise f, and for D = 1.

    Args:
        f: a cell, called once as ``f(z, *args)``; it must be twice differentiable.
        z: where: a tensor [B, ...] or a pytree of tensors that share dim 0, D elements a row. It
            need not require grad. Where it does, the gradient reaches it, hence a solution's
            adjoint solve; pass ``z.detach()`` to hold the point fixed, as the paper's code does.
        *args: passed on to f; gradients reach them. In inference mode pass all tensors that f needs
            here: it cannot close over tensors made there.
        samples: random vectors, at least 1; each costs a VJP. The variance falls as 1 / samples.
        generator: of the random vectors; None: the global one. It may be on another device than z.
        batch: ``"coupled"`` takes the state as a whole: see ``deqcore.fixed_point``.

    Returns:
        A scalar, float32, or float64 for a float64 state; differentiable in grad mode. An empty
        batch gives 0.

    Raises:
        TypeError: ``f`` or ``z`` of a wrong kind.
        ValueError: ``samples`` below 1, or f returned another structure, shape or device.

    Source: Bai, Koltun & Kolter, "Stabilizing Equilibrium Models by Jacobian Regularization", ICML
    2021, section 4. Unlike them v holds signs, not Gaussians: same mean, smaller variance.
    """
    if isinstance(samples, bool) or not isinstance(samples, int) or samples < 1:
        raise ValueError(f"samples: expected an integer of at least 1, got {samples!r}")
    create_graph = torch.is_grad_enabled()
    point = _Linearization(f, z, args, batch)
    total = point.z.new_zeros((), dtype=point.packing.compute_dtype)
    for _ in range(samples):
        signs = _random(point.z, generator).bernoulli_(0.5, generator=generator).mul_(2).sub_(1)
        product = point.vjp(signs.to(point.z), create_graph=create_graph)
        total = total + product.to(total.dtype).square().sum()
    penalty = total / max(samples * point.z.numel(), 1)
    return penalty if create_graph else penalty.detach()


def spectral_radius(
    f: Callable[..., Any],
    z: Any,
    *args: Any,
    krylov: int = 20,
    generator: torch.Generator | None = None,
    batch: Literal["rows", "coupled"] = "rows",
) -> Tensor:
    """Estimate the largest absolute eigenvalue of df/dz, row by row.

    Plain iteration from near a fixed point converges when it is below 1. Arnoldi's method on VJPs
    (J and its transpose share their eigenvalues) finds complex pairs and eigenvalues of equal
    modulus too, where a power iteration does not settle.

    Args:
        f: a cell, called once as ``f(z, *args)``.
        z: where: a tensor [B, ...] or a pytree of tensors that share dim 0, D elements a row.
        *args: passed on to f; see ``jacobian_penalty``.
        krylov: dimension of the Krylov space, at least 1: as many VJPs, and rows of that many
            states in memory. From D on the result is exact to rounding; below, it is the largest
            Ritz value, which for a non-normal J may lie on either side.
        generator: of the first vector; None: the global one. It may be on another device than z.
        batch: ``"coupled"`` takes the state as a whole, and gives one number: see
            ``deqcore.fixed_point``.

    Returns:
        [B], float32, or float64 for a float64 state, without a graph; works with grad mode off. A
        row whose Jacobian holds NaN or inf gives NaN, and others are not affected.

    Raises:
        TypeError: ``f`` or ``z`` of a wrong kind.
        ValueError: ``krylov`` below 1, or f returned another structure, shape or device.

    Source: Saad, "Numerical Methods for Large Eigenvalue Problems" (2011), algorithm 6.2, with each
    vector orthogonalised twice.
    """
    values = ritz_values(f, z, args, krylov, generator, batch)
    return values.abs().amax(1)


def ritz_values(
    f: Callable[..., Any],
    z: Any,
    args: tuple[Any, ...],
    krylov: int,
    generator: torch.Generator | None,
    batch: Literal["rows", "coupled"],
) -> Tensor:
    """Approximate eigenvalues of df/dz, those of large modulus first to settle: complex [B, m].

    m is ``krylov``, or D where that is less; 1 where D is 0. A row whose Krylov space ends before
    has one of its values several times. All else as in ``spectral_radius``, which takes the
    largest.
    """
    if isinstance(krylov, bool) or not isinstance(krylov, int) or krylov < 1:
        raise ValueError(f"krylov: expected an integer of at least 1, got {krylov!r}")
    point = _Linearization(f, z, args, batch)
    start = _random(point.z, generator).normal_(generator=generator)
    start = start.to(point.z.device, point.packing.compute_dtype)
    size = min(krylov, point.packing.dim)
    with torch.no_grad():
        hessenberg = _arnoldi(point, start, size)
        finite = hessenberg.isfinite().flatten(1).all(1)
        # The host is the place for many small eigenproblems; one that is not finite would raise.
        safe = torch.where(finite[:, None, None], hessenberg, 0).cpu()
        values = start.new_zeros(point.packing.batch, max(size, 1), dtype=start.dtype.to_complex())
        # The space of a row ends where the subdiagonal is zero.
        used = 1 + (safe.diagonal(-1, 1, 2) != 0).cumprod(1).sum(1)
        for length in used.unique().tolist() if safe.numel() else ():
            rows = (used == length).nonzero().flatten()
            found = torch.linalg.eigvals(safe[rows, :length, :length])
            found = torch.cat([found, found[:, :1].expand(-1, size - length)], 1)
            values[rows.to(values.device)] = found.to(values)
        return values.masked_fill(~finite[:, None], torch.nan)


def _arnoldi(point: _Linearization, start: Tensor, size: int) -> Tensor:  # [B, D] -> [B, m, m]
    """J^T on the Krylov space of ``start``, in an orthonormal basis; float64.

    A row whose space is invariant early gets zero vectors from there on. They add zero columns,
    hence eigenvalues of zero, and no row waits for another.
    """
    batch, dim = start.shape
    basis = start.new_zeros(batch, size + 1, dim)
    hessenberg = start.new_zeros(batch, size + 1, size, dtype=torch.float64)
    basis[:, 0] = _unit(start, start.norm(dim=1))[0]
    for j in range(size):
        vector = point.vjp(basis[:, j].to(point.z.dtype), create_graph=False).to(start.dtype)
        length = vector.norm(dim=1)
        known = basis[:, : j + 1]
        for _ in range(2):  # once leaves what cancellation lost
            overlap = torch.einsum("bkd,bd->bk", known, vector)
            vector = vector - torch.einsum("bk,bkd->bd", overlap, known)
            hessenberg[:, : j + 1, j] += overlap
        basis[:, j + 1], hessenberg[:, j + 1, j] = _unit(vector, length)
    return hessenberg[:, :size]


def _unit(vector: Tensor, length: Tensor) -> tuple[Tensor, Tensor]:
    """The vector at unit norm, and its norm; both zero where only rounding of ``length`` is left.

    ``length`` is the norm before orthogonalisation.
    """
    norm = vector.norm(dim=1)
    gone = norm <= 10 * torch.finfo(vector.dtype).eps * length
    unit = torch.where(gone[:, None], 0, vector / norm.masked_fill(gone, 1)[:, None])
    return unit, norm.masked_fill(gone, 0)


class _Linearization:
    """f at one point, evaluated once, with a graph from the packed z; grad mode does not matter."""

    def __init__(
        self, f: Callable[..., Any], z: Any, args: tuple[Any, ...], batch: str = "rows"
    ) -> None:
        if not callable(f):
            raise TypeError(f"f: expected a callable, got {type(f).__name__}")
        with torch.inference_mode(False), torch.enable_grad():
            z, args = pytree.tree_map(_usable, (z, args))
            self.packing = Packing.of(z, batch)
            packed = self.packing.pack(z, "z")
            # A tensor of its own: what z depends on is not a way from z to f.
            self.z = packed.view_as(packed) if packed.requires_grad else packed.detach()
            self.z.requires_grad_()
            self.value = Problem(f, args, self.packing)(self.z)

    def vjp(self, v: Tensor, *, create_graph: bool) -> Tensor:  # [B, D] -> [B, D]
        """v^T J of each row; zero where f does not depend on z."""
        if not self.value.requires_grad:
            return torch.zeros_like(v)
        (product,) = torch.autograd.grad(
            self.value,
            self.z,
            v,
            retain_graph=True,
            create_graph=create_graph,
            allow_unused=True,
            materialize_grads=True,
        )
        return product


def _usable(leaf: Any) -> Any:
    """Autograd refuses tensors made in inference mode; a copy made outside it is a usual one."""
    return leaf.clone() if isinstance(leaf, Tensor) and leaf.is_inference() else leaf


def _random(like: Tensor, generator: torch.Generator | None) -> Tensor:
    """Room for random numbers, where the generator is; float64 is needed by no one."""
    device = like.device if generator is None else generator.device
    return torch.empty(like.shape, device=device, dtype=torch.float32)
