"""Norms for cells: keep a cell contractive, or train the lengths and directions of its weights.

They are parametrizations (``torch.nn.utils.parametrize``), so a module that has them can be
deep-copied, and saved and loaded by its state dict, but not pickled: PyTorch refuses, with a
message. Make the module anew, normalise it in the same way, then load the state dict:

    torch.save(cell.state_dict(), path)
    fresh = spectral_normalize(Cell(), bound=0.9)
    fresh.load_state_dict(torch.load(path))

or call ``remove_normalization`` first, which leaves an ordinary module with the same weights.

A solve inside of ``parametrize.cached()`` computes each weight twice: once without a graph for its
steps, once with one for the gradient, which is kept.
"""

from __future__ import annotations

import difflib
import math
import weakref
from collections.abc import Iterable, Iterator
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

M = TypeVar("M", bound=nn.Module)

_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, *_TRANSPOSED)


def spectral_normalize(
    cell: M, bound: float = 1.0, names: Iterable[str] | None = None, iterations: int = 1
) -> M:
    """Scale weights down to a spectral norm of at most ``bound``; smaller ones stay as they are.

    The largest singular value is followed by power iteration, from exact singular vectors. It takes
    steps only in training mode and only after the weight has changed (an optimizer step), so that
    f stays the same function during a solve. PyTorch's own ``spectral_norm`` steps at every use of
    the weight, which a solver sees as an f that moves.

    In evaluation mode the stored singular vectors are used, whatever the weight. They belong to the
    weight that was trained or loaded. Another one may exceed the bound: by some percent if it is
    near (an ``AveragedModel``, with ``use_buffers=True`` too), by any factor if it is not (one that
    ``torch.func.functional_call`` puts in its place). Normalised anew, it meets the bound exactly:
    ``spectral_normalize(remove_normalization(model), bound)``. In training mode a weight that is
    put in is followed as a changed one is.

    A change made through ``weight.data`` is none that PyTorch counts, and is not followed until
    another is: after ``vector_to_parameters`` or ``p.data.add_(...)``, call ``p.mul_(1)`` under
    ``torch.no_grad()``.

    Args:
        cell: changed in place.
        bound: above 0, for each weight by itself. It is met to the accuracy of the iteration, which
            lags behind large optimizer steps. For a convolution it is on the kernel as a matrix
            [out, in * size]: the norm of the map may exceed it by up to sqrt(size of the kernel).
        names: submodules to normalise, as in ``cell.named_modules()`` ("" is the cell itself);
            None: every ``nn.Linear`` and convolution.
        iterations: steps of power iteration after each change of a weight, at least 1.

    Returns:
        ``cell``.

    Raises:
        ValueError: a bad number, an unknown name, a weight that is parametrized already, no layer.

    Source: Miyato et al., "Spectral Normalization for GANs", ICLR 2018; unlike them a weight whose
    norm is below the bound is not scaled up.
    """
    if isinstance(bound, bool) or not isinstance(bound, (int, float)) or not 0 < bound < math.inf:
        raise ValueError(f"bound: expected a finite number above 0, got {bound!r}")
    if isinstance(iterations, bool) or not isinstance(iterations, int) or iterations < 1:
        raise ValueError(f"iterations: expected an integer of at least 1, got {iterations!r}")
    for layer in _layers(cell, names):
        weight = layer.get_parameter("weight")
        norm = _SpectralBound(weight, bound, iterations, _output_dim(layer))
        parametrize.register_parametrization(layer, "weight", norm.train(layer.training))
    return cell


def weight_normalize(cell: M, names: Iterable[str] | None = None) -> M:
    """Train a length and a direction for each output of a weight: w = length * v / |v|.

    The weights keep their values; the parameters become ``parametrizations.weight.original0``
    (lengths) and ``original1`` (v), so make the optimizer afterwards. An output whose weights are
    all zero gets a direction of ones, so that it can be trained.

    Args:
        cell: changed in place.
        names: as in ``spectral_normalize``.

    Returns:
        ``cell``.

    Raises:
        ValueError: an unknown name, a weight that is parametrized already, no layer.

    Source: Salimans & Kingma, "Weight Normalization", NeurIPS 2016.
    """
    for layer in _layers(cell, names):
        norm = _LengthAndDirection(_output_dim(layer))
        parametrize.register_parametrization(layer, "weight", norm)
    return cell


def remove_normalization(cell: M) -> M:
    """Undo ``spectral_normalize`` and ``weight_normalize``; the weights keep their values.

    The parameters are new ones, so make the optimizer afterwards. Other parametrizations stay.

    Returns:
        ``cell``.
    """
    for layer in list(cell.modules()):
        if parametrize.is_parametrized(layer, "weight") and any(
            isinstance(item, _NORMS)
            for item in layer.get_submodule("parametrizations.weight").children()
        ):
            parametrize.remove_parametrizations(layer, "weight", leave_parametrized=True)
    return cell


class _SpectralBound(nn.Module):
    """weight * min(1, bound / sigma), sigma = u^T W v with u, v held constant in backward."""

    constant_in_solve = True  # u and v step when the weight has changed; put back they never would

    u: Tensor
    v: Tensor

    def __init__(self, weight: Tensor, bound: float, iterations: int, output_dim: int) -> None:
        super().__init__()
        self.bound, self.iterations, self.output_dim = bound, iterations, output_dim
        with torch.no_grad():
            left, _, right = torch.linalg.svd(self._matrix(weight), full_matrices=False)
        self.register_buffer("u", left[:, 0].contiguous())
        self.register_buffer("v", right[0].contiguous())
        self._remember(weight)

    def forward(self, weight: Tensor) -> Tensor:
        matrix = self._matrix(weight)
        if self.training and self._has_changed(weight):
            self._follow(matrix.detach())
            self._remember(weight)
        # Copies: the next step of the power iteration must not change what backward needs.
        u, v = (vector.to(matrix.dtype, copy=True) for vector in (self.u, self.v))
        # The average of unit vectors, as of an averaged model, is shorter than they are.
        lengths = torch.linalg.vector_norm(u) * torch.linalg.vector_norm(v)
        sigma = torch.dot(u, torch.mv(matrix, v)) / lengths
        return weight * (self.bound / sigma.clamp(min=self.bound)).to(weight.dtype)

    def right_inverse(self, weight: Tensor) -> Tensor:
        return weight

    def extra_repr(self) -> str:
        return f"bound={self.bound}, iterations={self.iterations}"

    def _remember(self, weight: Tensor) -> None:
        self.version = weight._version
        # Weakly, as this may be a tensor that functional_call has put in the parameter's place. A
        # copy of this module refers to the weight that was copied: its own is another one.
        if not torch.compiler.is_compiling():
            self.seen = weakref.ref(weight)

    def _has_changed(self, weight: Tensor) -> bool:
        if weight._version != self.version:
            return True
        # A compiled program sees tensors that stand for the weight.
        return not torch.compiler.is_compiling() and self.seen() is not weight

    @torch.no_grad()
    def _follow(self, matrix: Tensor) -> None:
        u, v = self.u.to(matrix.dtype), self.v.to(matrix.dtype)
        for _ in range(self.iterations):
            # A weight that was zero, or has an unused input, may map v to zero, where the iteration
            # would stay for ever; it does not map its row with the largest entry to zero.
            row = matrix.index_select(0, matrix.abs().amax(1).argmax(0, keepdim=True))[0]
            v = torch.where(torch.mv(matrix, v).any(), v, _unit(row, v))
            u = _unit(torch.mv(matrix, v), u)
            v = _unit(torch.mv(matrix.mT, u), v)
        self.u.copy_(u)
        self.v.copy_(v)

    def _matrix(self, weight: Tensor) -> Tensor:  # [out, in, ...] -> [out, in * size]
        matrix = weight.movedim(self.output_dim, 0).flatten(1)
        return matrix.to(torch.promote_types(matrix.dtype, torch.float32))


def _unit(vector: Tensor, otherwise: Tensor) -> Tensor:
    """``vector`` at unit length, whatever its scale; ``otherwise`` if it is zero or not finite."""
    largest = vector.abs().amax()
    scaled = vector / largest
    usable = (largest > 0) & largest.isfinite()
    return torch.where(usable, scaled / torch.linalg.vector_norm(scaled), otherwise)


class _LengthAndDirection(nn.Module):
    """length * v / |v| for each output. PyTorch's own leaves a hook that cannot be pickled."""

    def __init__(self, output_dim: int) -> None:
        super().__init__()
        self.output_dim = output_dim

    def forward(self, length: Tensor, direction: Tensor) -> Tensor:
        return direction * (length / self._length(direction))

    def right_inverse(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        length = self._length(weight)
        return length, torch.where(length == 0, 1, weight)

    def _length(self, weight: Tensor) -> Tensor:
        others = [dim for dim in range(weight.dim()) if dim != self.output_dim]
        return torch.linalg.vector_norm(weight, dim=others, keepdim=True)


def _layers(cell: nn.Module, names: Iterable[str] | None) -> Iterator[nn.Module]:
    """The chosen layers, all checked before the first is changed."""
    modules = dict(cell.named_modules())
    if names is None:
        chosen = [name for name, module in modules.items() if isinstance(module, _LAYERS)]
        if not chosen:
            raise ValueError(f"{type(cell).__name__} has no nn.Linear or convolution to normalise")
    else:
        chosen = [names] if isinstance(names, str) else list(names)
    for name in chosen:
        if name not in modules:
            close = difflib.get_close_matches(name, list(modules), n=1, cutoff=0.0)
            raise ValueError(f"names: no submodule {name!r}; the nearest is {close[0]!r}")
        module = modules[name]
        if not isinstance(module, _LAYERS):
            raise ValueError(
                f"names: {name!r} is a {type(module).__name__}; expected nn.Linear or a convolution"
            )
        if parametrize.is_parametrized(module, "weight"):
            raise ValueError(
                f"names: the weight of {name!r} is parametrized already; call "
                "remove_normalization first, or leave it out of names"
            )
    return iter([modules[name] for name in dict.fromkeys(chosen)])


def _output_dim(layer: nn.Module) -> int:
    return 1 if isinstance(layer, _TRANSPOSED) else 0


_NORMS = (_SpectralBound, _LengthAndDirection)
