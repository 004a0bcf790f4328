"""torch.func and traces around a solve: errors that say what works, not PyTorch's of internals."""

from __future__ import annotations

import sys

import torch
from torch import Tensor

_MAPPED = (
    "vmap (or is_grads_batched) over a solve or its backward is not supported: its rows are a "
    "batch already; make the mapped dimension a part of dim 0 of z0 and of f's inputs, or loop"
)


def refuse_transforms(adjoint: object) -> None:
    """Raise inside of a transform, through which ``adjoint``'s own graph nodes cannot go."""
    if not torch._C._are_functorch_transforms_active():
        return
    top = torch._C._functorch.peek_interpreter_stack().key()
    if top == torch._C._functorch.TransformType.Vmap:
        raise RuntimeError(_MAPPED)
    raise RuntimeError(
        "torch.func transforms (grad, vjp, jacrev, jvp) of a solve need "
        f"adjoint=deqcore.Unrolled(), got {type(adjoint).__name__}; or use torch.autograd"
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
            raise RuntimeError(_MAPPED)
        while torch._C._functorch.is_functorch_wrapped_tensor(tensor):
            if torch._C._functorch.is_batchedtensor(tensor):
                raise RuntimeError(_MAPPED)
            tensor = torch._C._functorch.get_unwrapped(tensor)
