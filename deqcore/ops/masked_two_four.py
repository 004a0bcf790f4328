"""y = x W^T + bias for a 2:4 weight on a GPU, by PyTorch's semi-structured support.

That support compresses a dense weight, which costs more than a product of few tokens. So what was
compressed is kept with ``values`` until these change in place (their version counter says so, which
writes through ``values.data`` pass by). While a CUDA graph is captured nothing kept is used: the
graph compresses the weight it finds at each replay.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.weak import WeakTensorKeyDictionary

from deqcore._compile import constant_when_traced
from deqcore.ops._library import LIBRARY, define_pure
from deqcore.ops.masked_dense import to_dense_reference

_kept: WeakTensorKeyDictionary = WeakTensorKeyDictionary()  # values -> (version, pattern, weight)


def fits(x: Tensor, rows: int, columns: int) -> bool:
    """Whether PyTorch multiplies x by a 2:4 [rows, columns] with the GPU's sparse tensor cores.

    Those are there from compute capability 8.0 on; the shapes are what both of PyTorch's libraries
    for it (CUTLASS and cuSPARSELt) take.
    """
    return (
        x.device.type == "cuda"
        and x.dtype in (torch.bfloat16, torch.float16)
        and rows > 0
        and columns > 0
        and rows % 32 == 0
        and columns % 64 == 0
        and _has_sparse_tensor_cores(x.device.index or 0)
    )


@constant_when_traced
def _has_sparse_tensor_cores(index: int) -> bool:
    return torch.version.hip is None and torch.cuda.get_device_capability(index) >= (8, 0)


def reference(
    x: Tensor, values: Tensor, pattern: Tensor, bias: Tensor | None, rows: int, columns: int
) -> Tensor:
    """The op in pure PyTorch: x [tokens, columns] -> [tokens, rows]."""
    return F.linear(x, to_dense_reference(values, pattern, rows, columns), bias)


def _on_gpu(
    x: Tensor, values: Tensor, pattern: Tensor, bias: Tensor | None, rows: int, columns: int
) -> Tensor:
    if x.shape[0] == 0:
        return x.new_empty(0, rows)
    y: Tensor = F.linear(x, _compressed(values, pattern, rows, columns), bias)
    return y.contiguous()


def _compressed(values: Tensor, pattern: Tensor, rows: int, columns: int) -> Tensor:
    keeps = not values.is_inference() and not torch.cuda.is_current_stream_capturing()
    if keeps:
        version, of, weight = _kept.get(values, (None, None, None))
        if version == values._version and of is pattern:
            return weight
    dense = torch.ops.deqcore.masked_to_dense(values, pattern, rows, columns)
    made: Tensor = torch.sparse.to_sparse_semi_structured(dense)
    if keeps:
        _kept[values] = (values._version, pattern, made)
    return made


def _fake(
    x: Tensor, values: Tensor, pattern: Tensor, bias: Tensor | None, rows: int, columns: int
) -> Tensor:
    return x.new_empty(x.shape[0], rows)


def _setup(ctx: Any, inputs: Any, output: Tensor) -> None:
    x, values, pattern, _, rows, columns = inputs
    ctx.shape = (rows, columns)
    needs = ctx.needs_input_grad
    ctx.save_for_backward(x if needs[1] else None, values if needs[0] else None, pattern)


def _backward(ctx: Any, grad: Tensor) -> Any:
    """By dense products: the transpose is not 2:4, and half of an outer product is kept."""
    x, values, pattern = ctx.saved_tensors
    ops = torch.ops.deqcore
    grad_x = grad_values = grad_bias = None
    if ctx.needs_input_grad[0]:
        grad_x = grad @ ops.masked_to_dense(values, pattern, *ctx.shape)
    if ctx.needs_input_grad[1]:
        grad_values = ops.masked_from_dense(grad.t() @ x, pattern)
    if ctx.needs_input_grad[3]:
        grad_bias = grad.sum(0)
    return grad_x, grad_values, None, grad_bias, None, None


call = define_pure(
    "masked_two_four",
    "(Tensor x, Tensor values, Tensor pattern, Tensor? bias, SymInt rows, SymInt columns) "
    "-> Tensor",
    reference,
    _fake,
    _setup,
    _backward,
)
LIBRARY.impl("masked_two_four", _on_gpu, "CUDA")
