"""Single evaluations of f under control, which leave nothing behind."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_pre_hook
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from deqcore._checks import ROUNDING
from deqcore._module_buffers import ModuleBuffers
from deqcore._packing import Packing
from deqcore._random_numbers import RandomNumbers
from deqcore.adjoints._system import row_bits
from deqcore.dropout import FixedDropout

STEP = 0.1  # a row is moved by this share of its size, and of f's


@dataclass(frozen=True)
class Facts:
    """What evaluations at z0 show.

    Attributes:
        writes: f changes its argument in place.
        change: rms difference of two evaluations at z0, over rms(f(z0)); 0 where only rounding is.
        draws: f draws random numbers.
        suspects: classes of modules in training mode that f calls and that may do either.
        dtypes: floating-point dtypes that f computes in, that of z0 included.
        nonfinite: rows of f(z0) that hold NaN or inf.
        detached: f(z) depends on z, and autograd does not know it.
    """

    writes: bool
    change: float
    draws: bool
    suspects: tuple[str, ...]
    dtypes: tuple[torch.dtype, ...]
    nonfinite: tuple[int, ...]
    detached: bool

    @property
    def epsilon(self) -> float:
        """Of the coarsest dtype in f."""
        return max(torch.finfo(dtype).eps for dtype in self.dtypes)


class Probe:
    """f on packed states [B, D], each time with the same random numbers and buffers."""

    def __init__(
        self, f: Callable[..., Any], args: tuple[Any, ...], packing: Packing, start: RandomNumbers
    ) -> None:
        self.f, self.args, self.packing, self.numbers = f, args, packing, start

    def __call__(self, z: Tensor) -> Tensor:
        self.numbers.put_back()
        with ModuleBuffers().unchanged():
            return self.packing.pack(self.f(self.packing.unpack(z.clone()), *self.args))

    def facts(self, z0: Tensor) -> Facts:
        """Evaluate f at ``z0`` [B, D] a few times."""
        z, seen, called = z0.clone(), _DtypesSeen(), []
        hook = register_module_forward_pre_hook(lambda module, _: called.append(module))
        version = z._version
        try:
            with torch.no_grad(), ModuleBuffers().unchanged():
                with seen:
                    first = self.packing.pack(self.f(self.packing.unpack(z), *self.args))
                drawn = self.numbers.have_been_drawn()
                writes = z._version != version or not torch.equal(z.nan_to_num(), z0.nan_to_num())
                second = self.packing.pack(self.f(self.packing.unpack(z0.clone()), *self.args))
        finally:
            hook.remove()
        dtypes = tuple(sorted({*seen.dtypes, *self.packing.dtypes, first.dtype}, key=str))
        change = _relative(second - first, first)
        if not change > ROUNDING * max(torch.finfo(dtype).eps for dtype in dtypes):
            change = 0.0
        bad = ~first.isfinite().all(1)
        return Facts(
            writes=writes,
            change=change,
            draws=drawn,
            suspects=_suspects(called),
            dtypes=dtypes,
            nonfinite=tuple(bad.nonzero().flatten().tolist()),
            detached=self._is_detached(z0),
        )

    def _is_detached(self, z0: Tensor) -> bool:
        with torch.enable_grad():
            known = self(z0.detach().requires_grad_()).requires_grad
        if known:
            return False
        with torch.no_grad():
            return not torch.equal(self(z0), self(z0 + self._moves(z0, self(z0))))

    @torch.no_grad()
    def coupled_rows(self, z: Tensor, epsilon: float) -> tuple[int, ...]:
        """Rows of f(z) that change when other rows of z do, up to rounding.

        Rows are moved by the bits of their numbers, so that of any two rows each is once moved
        without the other: 2 log2(B) evaluations.
        """
        if len(z) < 2:
            return ()
        plain = self(z)
        moves = self._moves(z, plain)
        limit = ROUNDING * epsilon * plain.abs().amax(1)
        changed = torch.zeros_like(limit, dtype=torch.bool)
        for bits in row_bits(z):
            for moved in (bits, 1 - bits):
                difference = (self(z + moved * moves) - plain).abs().amax(1)
                changed |= (moved[:, 0] == 0) & limit.isfinite() & ~(difference <= limit)
        return tuple(changed.nonzero().flatten().tolist())

    def _moves(self, z: Tensor, f: Tensor) -> Tensor:
        """Where to move each row [B, D]: some way that no symmetry of f is likely to hide."""
        size = torch.maximum(_rms(z), _rms(f)).nan_to_num(0, 0, 0)
        size = torch.where(size > 0, size, 1)
        noise = torch.randn(z.shape, generator=torch.Generator().manual_seed(0))
        return (STEP * size[:, None] * noise.to(size)).to(z.dtype)


def _rms(x: Tensor) -> Tensor:
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    return torch.linalg.vector_norm(x, dim=1, dtype=dtype) / max(x.shape[1], 1) ** 0.5


def _relative(difference: Tensor, of: Tensor) -> float:
    """rms over finite elements."""
    finite = difference.isfinite() & of.isfinite()
    size = torch.linalg.vector_norm(of[finite].double()).item()
    return torch.linalg.vector_norm(difference[finite].double()).item() / (size or 1.0)


def _suspects(called: list[nn.Module]) -> tuple[str, ...]:
    """Class names of modules in training mode that are random or change what they compute."""
    kinds = (nn.modules.dropout._DropoutNd, nn.RReLU, nn.FractionalMaxPool2d)
    names = [
        type(module).__name__
        for module in called
        if module.training
        and not isinstance(module, FixedDropout)
        and (isinstance(module, kinds) or any(key in type(module).__name__ for key in _SUSPECT))
    ]
    return tuple(dict.fromkeys(names))


_SUSPECT = ("Dropout", "DropPath", "StochasticDepth", "SpectralNorm")


class _DtypesSeen(TorchFunctionMode):
    """The floating-point dtypes of all that is computed."""

    def __init__(self) -> None:
        super().__init__()
        self.dtypes: set[torch.dtype] = set()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.dtypes |= {
            leaf.dtype
            for leaf in pytree.tree_leaves(out)
            if isinstance(leaf, Tensor) and leaf.is_floating_point()
        }
        return out
