"""torch.func around a solve: errors that say what works, in place of PyTorch's about internals."""

from __future__ import annotations

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
