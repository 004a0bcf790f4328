"""Transforms and traces that a solve cannot serve: errors that say what works."""

from __future__ import annotations

import sys

import torch
from torch import Tensor

_MAPPED = (
    "vmap over a solve needs adjoint=deqcore.Implicit() or deqcore.Phantom(), whose steps are "
    "taken outside of it, got Unrolled(); or make the mapped dimension a part of dim 0 of z0 and "
    "of f's inputs"
)
_BATCHED = (
    "is_grads_batched=True (vectorize=True) over the backward of a solve is not supported: use "
    "torch.func.jacrev, or torch.func.vmap over torch.autograd.grad, or loop"
)


def values_are_unknown(z0: Tensor) -> bool:
    """Whether this is a trace (torch.export) or a run without values (FakeTensorMode)."""
    if type(z0) is Tensor:
        return False
    fakes = sys.modules.get("torch._subclasses.fake_tensor")  # slow to import
    return fakes is not None and isinstance(z0, fakes.FakeTensor)


def refuse_steps_by_values(check_every: int) -> None:
    """Raise where a solve would have to look whether it is done, and cannot."""
    if check_every:
        raise RuntimeError(
            "torch.export, or FakeTensorMode, of a solve: how many steps it takes depends on "
            "values, which there are none of; with solver=deqcore.Anderson(check_every=0, "
            "max_steps=...), or another solver with these options, it takes all of its steps"
        )


def refuse_mapped(*tensors: Tensor) -> None:
    """Raise if vmap maps over one of them: rows that it hides can neither stop nor be counted."""
    if torch.compiler.is_dynamo_compiling():
        return
    for tensor in tensors:
        if torch._C._functorch.is_legacy_batchedtensor(tensor):  # of is_grads_batched
            raise RuntimeError(_BATCHED)
        while torch._C._functorch.is_functorch_wrapped_tensor(tensor):
            if torch._C._functorch.is_batchedtensor(tensor):
                raise RuntimeError(_MAPPED)
            tensor = torch._C._functorch.get_unwrapped(tensor)


def unwrapped(tensor: Tensor) -> Tensor:
    """The values of a tensor in transforms, mapped dimensions included, in any order."""
    while torch._C._functorch.is_functorch_wrapped_tensor(tensor):
        tensor = torch._C._functorch.get_unwrapped(tensor)
    return tensor
