"""The torch.library namespace ``deqcore``: schemas here, C++ kernels in ``csrc``."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar, get_type_hints

import torch
from torch import Tensor
from torch.autograd import forward_ad

# Of the states and the products that the kernels and their references take.
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)

LIBRARY = torch.library.Library("deqcore", "DEF")
T = TypeVar("T")


def call_step(op: Callable[..., None], *args: object) -> None:
    """Call a step op; past autograd unless it has to refuse: its Python kernel doubles the cost."""
    if torch.is_grad_enabled() and any(isinstance(a, Tensor) and a.requires_grad for a in args):
        op(*args)
        return
    with torch._C._AutoDispatchBelowAutograd():
        op(*args)


def define_step(name: str, schema: str, reference: Callable[..., None]) -> None:
    """Register an op that advances solver state in place.

    ``reference`` runs wherever no compiled kernel is registered for the tensors' device. Such an op
    is never differentiated: with a tensor that requires grad, in grad mode, it raises.
    """
    LIBRARY.define(f"{name}{schema}")
    LIBRARY.impl(name, reference, "CompositeExplicitAutograd")
    op = getattr(torch.ops.deqcore, name).default

    def forbid_autograd(keyset: torch._C.DispatchKeySet, *args: object) -> None:
        tensors = [arg for arg in args if isinstance(arg, Tensor)]
        if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors):
            raise RuntimeError(
                f"deqcore::{name} changes solver state in place and has no derivative; call it "
                "under torch.no_grad(), or differentiate the solve with an adjoint "
                "(deqcore.Implicit, Phantom or Unrolled)"
            )
        op.redispatch(keyset & torch._C._after_autograd_keyset, *args)

    LIBRARY.impl(name, forbid_autograd, "Autograd", with_keyset=True)
    torch.library.register_fake(f"deqcore::{name}", lambda *args: None, lib=LIBRARY)


def pack_numbers(numbers: Any) -> Tensor:
    """A step op's numbers, a NamedTuple of numbers and of NamedTuples of them, as its one tensor.

    float64 on the CPU whatever the device: crossing the dispatcher to a kernel of the stable ABI
    costs 0.2 us for a number and 0.13 us for a tensor. Never to be written to; see ``constant``.
    """
    flat: list[float] = []
    for number in numbers:
        if isinstance(number, tuple):
            flat += number
        else:
            flat.append(number)
    return constant(tuple(flat))


def constant(values: tuple[float, ...]) -> Tensor:
    """``values`` as float64 on the CPU, in memory that all who ask for the same share."""
    if torch._C._len_torch_dispatch_stack():  # a mode may make another kind of tensor (FakeTensor)
        return torch.tensor(values, dtype=torch.float64, device="cpu")
    return _constant(values)


@functools.lru_cache(maxsize=1024)
def _constant(values: tuple[float, ...]) -> Tensor:
    with torch.inference_mode(False):  # whose tensors autograd does not take
        return torch.tensor(values, dtype=torch.float64, device="cpu")


def unpack_numbers(kind: type[T], options: Tensor) -> T:
    """What ``pack_numbers`` was given, of the type ``kind``."""
    return _read(kind, iter(options.tolist()))


def number_names(kind: type) -> list[str]:
    """The names of the numbers in the order of the tensor: csrc has the same."""
    return [
        name
        for field, of in get_type_hints(kind).items()
        for name in (number_names(of) if issubclass(of, tuple) else [field])
    ]


def _read(kind: Any, values: Iterator[float]) -> Any:
    if not issubclass(kind, tuple):
        return kind(next(values))
    return kind(*[_read(of, values) for of in _types(kind)])


@functools.cache
def _types(kind: type) -> tuple[type, ...]:
    return tuple(get_type_hints(kind).values())


def define_pure(
    name: str,
    schema: str,
    reference: Callable[..., Tensor],
    fake: Callable[..., Tensor],
    setup: Callable[[Any, Any, Tensor], None],
    backward: Callable[[Any, Tensor], Any],
) -> Callable[..., Tensor]:
    """Register an op without side effects, with its derivative (``setup`` and ``backward``).

    ``reference`` runs wherever no compiled kernel is registered for the tensors' device, and under
    forward-mode differentiation and ``torch.func``'s transforms: PyTorch differentiates its
    operations in every way, and ``backward`` is reverse mode alone.

    Returns:
        The op as an eager caller wants it: without a second way through the dispatcher.
    """
    LIBRARY.define(f"{name}{schema}")
    LIBRARY.impl(name, reference, "CompositeExplicitAutograd")
    torch.library.register_fake(f"deqcore::{name}", fake, lib=LIBRARY)
    op = getattr(torch.ops.deqcore, name).default

    tensors = [i for i, a in enumerate(op._schema.arguments) if "Tensor" in str(a.type)]

    def below_autograd(keyset: torch._C.DispatchKeySet | None, args: Sequence[object]) -> Tensor:
        with torch._C._AutoDispatchBelowAutograd():
            if keyset is None:
                return op(*args)
            result: Tensor = op.redispatch(keyset & torch._C._after_autograd_keyset, *args)
        return result

    # Not torch.library.register_autograd: its kernel loses tangents without a word.
    class Derivative(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *args: Any) -> Tensor:  # the op's arguments, then the keyset
            output = below_autograd(args[-1], args[:-1])
            setup(ctx, args[:-1], output)
            return output

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> Any:
            return *backward(ctx, grad), None

    def differentiate(keyset: torch._C.DispatchKeySet | None, *args: Any) -> Tensor:
        if is_transformed():
            return reference(*args)
        if torch.is_grad_enabled():
            for i in tensors:
                if args[i] is not None and args[i].requires_grad:
                    result: Tensor = Derivative.apply(*args, keyset)
                    return result
        return below_autograd(keyset, args)

    def call(*args: Any) -> Tensor:
        if torch.compiler.is_compiling() or is_transformed():
            return op(*args)
        return differentiate(None, *args)

    Derivative.__name__ = Derivative.__qualname__ = f"{name}_derivative"
    LIBRARY.impl(name, differentiate, "Autograd", with_keyset=True)
    return call


def is_transformed() -> bool:
    """Whether tensors may have tangents, or wrappers of torch.func."""
    return forward_ad._current_level >= 0 or torch._C._are_functorch_transforms_active()
