"""The linear problem of an implicit gradient, u = g + J^T u, at unit scale; captured or not."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from deqcore.ops import _rows


class UnitGradient(NamedTuple):
    """An incoming gradient, each row scaled to unit size by a power of two: exactly."""

    rows: Tensor  # [B, D]
    exponent: Tensor  # [B, 1]: the gradient is rows * 2 ** exponent
    zero: Tensor  # bool [B]: rows without any gradient

    @classmethod
    def of(cls, grad: Tensor) -> UnitGradient:
        exponent = _binary_exponent(grad)
        rows = (grad.double() * _power_of_two(-exponent)).to(grad.dtype)
        return cls(rows, exponent, (grad == 0).all(1))


def scaled_back(u: Tensor, exponent: Tensor) -> Tensor:
    """u * 2 ** exponent, in u's dtype."""
    return (u.double() * _power_of_two(exponent)).to(u.dtype)


def vector_jacobian(f: Tensor, z: Tensor, u: Tensor, create_graph: bool = False) -> Tensor:
    """(df/dz)^T u, [B, D]; the graph of f stays for the next product."""
    (product,) = torch.autograd.grad(
        f, z, u,
        retain_graph=True, create_graph=create_graph, allow_unused=True, materialize_grads=True,
    )  # fmt: skip
    return product


def graph_nodes(f: Tensor) -> Iterator[Any]:
    """The nodes of f's graph, in a fixed order."""
    nodes, seen = [f.grad_fn], set()
    while nodes:
        node = nodes.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        yield node
        nodes.extend(following for following, _ in node.next_functions)


def graph_leaves(f: Tensor) -> Iterator[Tensor]:
    """The leaves that the graph of f reaches, in a fixed order."""
    for node in graph_nodes(f):
        leaf = getattr(node, "variable", None)  # of an AccumulateGrad node
        if leaf is not None:
            yield leaf


def _binary_exponent(grad: Tensor) -> Tensor:
    """[B, 1]: 2 to this is each row's rms, up to a factor of 2; 0 for a row that is not finite.

    Exactly covariant: a gradient times 2^k has an exponent larger by k, at any k.
    """
    wide = grad.double()
    if not wide.shape[1]:
        return torch.zeros_like(wide.sum(1, keepdim=True))
    _, largest = torch.frexp(wide.abs().amax(1, keepdim=True))
    wide = wide * _power_of_two(-largest)
    _, exponent = torch.frexp(_rows.rms(_rows.row_dot(wide, wide), grad.shape[1])[:, None])
    finite = wide.isfinite().all(1, keepdim=True)
    return torch.where(finite, largest + exponent, 0)


def _power_of_two(exponent: Tensor) -> Tensor:
    """2 ** exponent as float64, from its bits: torch.ldexp and exp2 go through float32 or round."""
    return ((exponent.long().clamp(-1022, 1023) + 1023) << 52).view(torch.float64)
