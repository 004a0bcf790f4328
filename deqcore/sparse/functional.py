"""``masked_linear``: a product with a weight of which only the kept entries exist."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from deqcore.ops import masked_linear as masked_linear_op
from deqcore.ops import masked_two_four
from deqcore.ops._library import DTYPES
from deqcore.sparse import choice
from deqcore.sparse.dense_weights import dense_weight, note_served, served
from deqcore.sparse.pattern import SparsityPattern

Backend = Literal["auto", "sparse", "dense"]
_CAST = DTYPES[1:]  # by autocast, which leaves float64 as it is


def masked_linear(
    x: Tensor,
    values: Tensor,
    pattern: SparsityPattern,
    bias: Tensor | None = None,
    *,
    backend: Backend = "auto",
) -> Tensor:
    """F.linear(x, weight, bias) for a weight that is zero outside a pattern, from its kept values.

    Gradients reach x, values and bias, and nothing is computed for the entries that are not kept.
    With ``backend="sparse"`` a token's result does not depend, bit for bit, on the other tokens,
    but that a GPU adds up a few tokens (1 to 8) in another order than many.
    Forward-mode differentiation (jvp) and ``torch.func.grad`` fill a dense weight, whatever the
    backend.

    Args:
        x: [..., columns] of the pattern, any leading dimensions; float64, float32, bfloat16 or
            float16. The last two are summed in float32.
        values: [kept] entries in row order, in x's dtype. Autocast casts x, values and bias alike,
            but as for F.linear leaves float64 as it is: there all or none are float64.
        pattern: where they are, on x's device.
        bias: [rows], or None.
        backend: ``"sparse"`` runs the kernels for kept entries, ``"dense"`` fills a dense weight
            and multiplies by that, ``"auto"`` takes the faster by a table measured on this kind of
            processor (``python -m deqcore.tune`` measures yours; a GPU that has no table gets that
            of the nearest one of its generation, or else dense products but where sparse ones
            should be at least twice as fast; an exported or compiled program with dynamic shapes,
            but where they are faster at any number of tokens). Without a gradient to the values, in
            a solve or in inference, the dense weight is kept as long as they are not changed in
            place; writes through ``values.data``, which no version counter counts, are not seen
            then. On a GPU, ``"sparse"`` multiplies blocks in bfloat16 and float16 on tensor cores,
            never in TF32, and 2:4 patterns of those dtypes by PyTorch's semi-structured support
            where shapes allow it (multiples of 32 rows and 64 columns).

    Returns:
        [..., rows], in x's dtype.

    Raises:
        TypeError: pattern is not a SparsityPattern.
        ValueError: shapes, dtypes or devices that do not fit together, or an unknown backend.
    """
    plain = not torch.compiler.is_compiling() and torch._C._get_tracing_state() is None
    if plain:
        again = _call_again(x, values, pattern, bias, backend)
        if again is not None:
            return again
    device = x.device.type
    dtype = values.dtype
    if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
        to = torch.get_autocast_dtype(device)
        x, dtype = _cast(x, to), to if dtype in _CAST else dtype
        bias = None if bias is None else _cast(bias, to)
    _check(x, values, dtype, pattern, bias)
    dense_outer = False
    if backend == "auto":
        sparse, dense_outer = _choose(x, pattern)
    elif backend == "sparse" or backend == "dense":
        sparse = backend == "sparse"
    else:
        raise ValueError(f"backend: expected 'auto', 'sparse' or 'dense', got {backend!r}")
    if not sparse:
        y = F.linear(x, dense_weight(values, pattern, dtype), bias)
        if plain:
            note_served(values, x.shape, backend)
        return y
    values = values.to(dtype)
    rows, columns = pattern.shape
    if pattern.structure == "2:4" and masked_two_four.fits(x, rows, columns):
        y = masked_two_four.call(_flat(x, columns), values, pattern.indices, bias, rows, columns)
        return y.view(*x.shape[:-1], rows)
    y = _multiply_kept(x, values, pattern, bias, dense_outer)
    if plain:
        choice.note_sparse(pattern, x, backend, dense_outer)
    return y


def _call_again(
    x: Tensor, values: Tensor, pattern: SparsityPattern, bias: Tensor | None, backend: str
) -> Tensor | None:
    """The product, of a call like one before, whose checks need not be made again; or None.

    What does not fit raises in the product itself: then None as well, so that the checks tell.
    """
    weight = served(values, pattern, x.shape, backend)
    try:
        if weight is not None and (bias is None or bias.shape == weight.shape[:1]):
            return F.linear(x, weight, bias)
        dense_outer = choice.was_sparse(pattern, x, backend)
        if (
            dense_outer is not None
            and values.device == x.device
            and (bias is None or (bias.device == x.device and bias.shape == pattern.shape[:1]))
            and not torch._C._is_any_autocast_enabled()
        ):
            return _multiply_kept(x, values, pattern, bias, dense_outer)
    except RuntimeError:
        pass
    return None


def _multiply_kept(
    x: Tensor, values: Tensor, pattern: SparsityPattern, bias: Tensor | None, dense_outer: bool
) -> Tensor:
    rows, columns = pattern.shape
    y = masked_linear_op.call(
        _flat(x, columns), values, pattern.indices, bias, rows, columns, pattern.block, False,
        dense_outer,
    )  # fmt: skip
    return y if x.dim() == 2 else y.view(*x.shape[:-1], rows)


def _flat(x: Tensor, columns: int) -> Tensor:
    if x.dim() == 2:
        return x
    return x.reshape(-1, columns) if columns else x.reshape(x.shape[:-1].numel(), 0)


def _choose(x: Tensor, pattern: SparsityPattern) -> tuple[bool, bool]:
    """Whether the product is sparse, and then whether the values' gradient is dense."""
    tokens: Any = x.numel() // max(pattern.shape[1], 1)
    if isinstance(tokens, torch.SymInt) or torch.compiler.is_compiling():
        known = _known(tokens)
        sparse = choice.prefers_sparse("linear", known, pattern, x)
        return sparse, sparse and not choice.prefers_sparse("outer", known, pattern, x)
    sparse, sparse_outer = choice.choose(int(tokens), pattern, x)
    return sparse, sparse and not sparse_outer


def _known(tokens: Any) -> int | None:
    """How many rows are multiplied; None for any number, in a program with dynamic shapes.

    Such a program must not branch on the number. It gets sparse kernels only where they win at
    every number: then no size is slower than with a dense product.
    """
    # Dynamo calls its symbolic integers int. Not at the top: this module imports SymPy.
    from torch.fx.experimental.symbolic_shapes import has_static_value

    return tokens if has_static_value(tokens) else None


def _cast(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    return tensor.to(dtype) if tensor.dtype in _CAST else tensor


def _check(
    x: Tensor,
    values: Tensor,
    dtype: torch.dtype,  # of the values, as they will be multiplied
    pattern: SparsityPattern,
    bias: Tensor | None,
) -> None:
    if not isinstance(pattern, SparsityPattern):
        raise TypeError(
            f"pattern: expected a SparsityPattern, got {type(pattern).__name__}; build one with "
            "SparsityPattern.from_mask(mask)"
        )
    rows, columns = pattern.shape
    if values.dim() != 1 or values.shape[0] != pattern.kept:
        raise ValueError(
            f"values: expected shape ({pattern.kept},), one for each entry that the pattern keeps, "
            f"got {tuple(values.shape)}; pattern.from_dense(weight) takes them from a weight"
        )
    if x.dim() == 0 or x.shape[-1] != columns:
        raise ValueError(
            f"x: expected a last dimension of {columns}, the columns of the pattern, got shape "
            f"{tuple(x.shape)}"
        )
    if bias is not None and bias.shape != (rows,):
        raise ValueError(f"bias: expected shape ({rows},), got {tuple(bias.shape)}")
    if x.dtype not in DTYPES:
        raise ValueError(
            f"x: expected float64, float32, bfloat16 or float16, got {x.dtype}; convert it with "
            "x.to(torch.float32)"
        )
    _check_like(x, "values", values, dtype)
    if bias is not None:
        _check_like(x, "bias", bias, bias.dtype)
    if pattern.device != x.device:
        raise ValueError(
            f"pattern: expected x's device {x.device}, got {pattern.device}; use "
            f"pattern.to({str(x.device)!r})"
        )


def _check_like(x: Tensor, name: str, tensor: Tensor, dtype: torch.dtype) -> None:
    if dtype is not x.dtype:
        hint = "or use torch.autocast"
        if torch.float64 in (x.dtype, dtype):
            hint = "as torch.autocast leaves float64 as it is"
        raise ValueError(
            f"{name}: expected x's dtype {x.dtype}, got {dtype}; convert one of them, {hint}"
        )
    if tensor.device != x.device:
        raise ValueError(
            f"{name}: expected x's device {x.device}, got {tensor.device}; move one with .to()"
        )
