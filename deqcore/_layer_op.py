"""A whole solve of an ``ImplicitLayer`` as one op, and its gradient as another: torch.compile.

What the ops run is what eager mode runs, of the layer itself, so that numbers, statuses and
warnings are the same. Nothing stays between forward and backward but the tensors that autograd
saves: backward evaluates the cell at the solution again.
"""

from __future__ import annotations

import contextlib
import itertools
import weakref
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from deqcore._compile import never_traced
from deqcore._layer_call import (
    Call,
    Filling,
    Parts,
    attribute_names,
    autocast_of,
    held_tensors,
    is_plain,
    refilled,
)
from deqcore._layer_graphs import zeros_like
from deqcore._loop import Problem, Solved
from deqcore._packing import Packing
from deqcore._solution import BackwardRecord
from deqcore.adjoints import Implicit
from deqcore.adjoints._linear import graph_leaves
from deqcore.dropout import FixedDropout, solve_of
from deqcore.ops._library import LIBRARY, is_transformed
from deqcore.ops._rows import Rows
from deqcore.solvers import Solver

_layers: weakref.WeakValueDictionary[int, nn.Module] = weakref.WeakValueDictionary()
_numbers = itertools.count(1)
# Of solves, by the memory of their solution: a layer may be used several times in a program.
_records: weakref.WeakValueDictionary[int, BackwardRecord] = weakref.WeakValueDictionary()


def numbered(layer: nn.Module) -> Tensor:
    """The number by which the ops find ``layer`` as long as it lives.

    A tensor, so that a compiled program takes it as an input: one program serves all layers of one
    make, and may be kept for another process.
    """
    number = next(_numbers)
    _layers[number] = layer
    return torch.tensor(number, dtype=torch.int64, device="cpu")


def has_an_op(layer: Any, z0: Any, args: tuple[Any, ...]) -> bool:
    """Whether this call is one op; any other breaks the graph."""
    return isinstance(layer.cell, nn.Module) and not layer.has_aux and is_plain((z0, args))


def call_op(layer: Any, z0: Any, args: tuple[Any, ...]) -> Any:
    """``layer(*args, z0=z0)`` by the op; traced by torch.compile."""
    parts = Parts()
    start = parts.text_of(z0)
    state = len(parts.tensors)
    x = parts.text_of(args[0])
    if z0 is None:
        state = len(parts.tensors)
    more = parts.text_of(args[1:])
    held = held_tensors(layer.cell, layer._attribute_names())
    updated = tuple([i for i, one in enumerate(held) if one.may_change])
    device = parts.tensors[0].device
    draws = any(isinstance(module, FixedDropout) for module in layer.cell.modules())
    if draws:  # no program takes two of these for one, and the calls with them
        parts.tensors.append(torch.empty(0, device="cpu"))
    about = (state, torch.is_grad_enabled(), autocast_of(device), updated, draws)
    results = torch.ops.deqcore.implicit_layer.default(
        parts.tensors, [one.tensor for one in held], layer._number, parts.integers, parts.numbers,
        f"(({start},{x},{more}),{about!r})",
    )  # fmt: skip
    with torch.no_grad():
        for index, new in zip(updated, results[state:-1], strict=True):
            held[index].tensor.copy_(new)
    return refilled(args[0] if z0 is None else z0, list(results[:state]))


class _Run:
    """One run of an op: its layer, and its arguments as the layer takes them."""

    def __init__(
        self, tensors: Sequence[Tensor], held: Sequence[Tensor], layer: Tensor,
        integers: Sequence[int], numbers: Sequence[float], call: str,
    ) -> None:  # fmt: skip
        found: Any = _layers.get(int(layer))
        if found is None:
            raise RuntimeError(
                "a compiled program calls a deqcore.ImplicitLayer that is gone, or was in another "
                "process: keep the model that was compiled, or compile the one that is here"
            )
        self.layer = found
        self.own = held_tensors(found.cell, attribute_names(found.cell))
        if len(self.own) != len(held):
            raise RuntimeError(
                "a compiled program calls a deqcore.ImplicitLayer whose cell has changed: it had "
                f"{len(held)} tensors and has {len(self.own)}; compile the model again"
            )
        self.call = Call.read(call)
        self.tensors = [tensor.detach() for tensor in tensors]
        # Copies of what the cell may change: an op changes none of its inputs.
        self.held = [
            given.detach().clone() if index in self.call.updated else given
            for index, given in enumerate(held)
        ]
        self._numbers = integers, numbers

    def arguments(self) -> tuple[Any, tuple[Any, ...]]:
        """z0 (None: zeros like the first of the others), and the others."""
        z0, x, more = Filling(self.tensors, *self._numbers).fill(self.call.arguments)
        return z0, (x, *more)

    def leaves(self, wanted: Sequence[int]) -> list[Tensor]:
        """Leaves of a graph that is about to be made, in place of the tensors of these numbers."""
        found = []
        for index in wanted:
            place = index - len(self.tensors)
            if place < 0:
                leaf = self.tensors[index].requires_grad_()
            elif self._is_own(place) and self.own[place].tensor.requires_grad:
                leaf = self.own[place].tensor
            else:
                leaf = self.held[place] = self.held[place].detach().requires_grad_()
            found.append(leaf)
        return found

    @contextlib.contextmanager
    def cell(self) -> Iterator[bool]:
        """The cell with the given tensors in place of its own; whether that needs any change."""
        changed = [i for i in range(len(self.own)) if not self._is_own(i)]
        try:
            for i in changed:
                self.own[i].place[self.own[i].name] = self.held[i]
            yield bool(changed)
        finally:
            for i in changed:
                self.own[i].place[self.own[i].name] = self.own[i].tensor

    def _is_own(self, index: int) -> bool:
        """Whether what was given is the cell's, or the same memory in another tensor.

        The cell's is better: graphs that are recorded, and norms of weights, know it.
        """
        own, given = self.own[index].tensor, self.held[index]
        if type(own) not in (Tensor, nn.Parameter) or not own.is_leaf:
            return own is given and own.is_leaf
        return own is given or (
            own.data_ptr() == given.data_ptr()
            and own.numel() > 0
            and (own.shape, own.stride(), own.dtype) == (given.shape, given.stride(), given.dtype)
            and own.device == given.device
        )

    def now(self) -> list[Tensor]:
        """What the cell may have changed, within ``cell``."""
        return [self.own[i].place[self.own[i].name].detach() for i in self.call.updated]

    @contextlib.contextmanager
    def autocast(self) -> Iterator[None]:
        """As it was where the call was traced; a compiled program runs without."""
        if self.call.autocast is None:
            yield
            return
        kind, dtype = self.call.autocast
        # What others have cast already has a graph of theirs, or none.
        with torch.autocast(kind, dtype=getattr(torch, dtype), cache_enabled=False):
            yield

    def generator(self) -> Tensor:
        """The state of the generator that masks are drawn from; empty if none are."""
        if not self.call.draws:
            return torch.empty(0, dtype=torch.uint8)
        device = self.tensors[0].device
        return torch.cuda.get_rng_state(device) if device.type == "cuda" else torch.get_rng_state()

    @contextlib.contextmanager
    def masks_of(self, generator: Tensor) -> Iterator[None]:
        """A solve that draws the masks of the one before which ``generator`` was called."""
        device = self.tensors[0].device
        with contextlib.ExitStack() as stack:
            stack.enter_context(solve_of({}))
            if self.call.draws:
                on_gpu = device.type == "cuda"
                stack.enter_context(torch.random.fork_rng([device] if on_gpu else []))
                if on_gpu:
                    torch.cuda.set_rng_state(generator, device)
                else:
                    torch.set_rng_state(generator)
            yield


@never_traced(reason="it is the inside of an op")
def _solve(
    tensors: list[Tensor], held: list[Tensor], layer: Tensor, integers: Sequence[int],
    numbers: Sequence[float], call: str,
) -> list[Tensor]:  # fmt: skip
    """[*solution, *what the cell may have changed, state of the generator]."""
    run = _Run(tensors, held, layer, integers, numbers, call)
    generator = run.generator()
    with run.cell() as is_changed:
        with run.autocast(), torch.set_grad_enabled(run.call.grad):
            value, _ = run.layer._solve(*run.arguments(), replay=not is_changed)
        changed = run.now()
    solution = [leaf.detach() for leaf in _tensors_of(value)]
    _records[solution[0].data_ptr()] = run.layer.report.record
    return [*solution, *changed, generator]


def _solve_fake(
    tensors: list[Tensor], held: list[Tensor], layer: Tensor, integers: Sequence[int],
    numbers: Sequence[float], call: str,
) -> list[Tensor]:  # fmt: skip
    about = Call.read(call)
    bytes_of_generator = 0
    if about.draws:
        on_gpu = tensors[0].device.type == "cuda"
        bytes_of_generator = 16 if on_gpu else torch.default_generator.get_state().numel()
    return [
        *[tensor.new_empty(tensor.shape) for tensor in tensors[: about.state]],
        *[torch.empty_like(held[i]) for i in about.updated],
        torch.empty(bytes_of_generator, dtype=torch.uint8, device="cpu"),
    ]


def _tensors_of(tree: Any) -> list[Tensor]:
    parts = Parts()
    parts.text_of(tree)
    return parts.tensors


class _Resumed(Problem):
    """f of a solve that is over: its solution is known, and is not sought again."""

    def __init__(self, run: _Run, solution: list[Tensor]) -> None:
        z0, args = run.arguments()
        start = zeros_like(args[0]) if z0 is None else z0
        super().__init__(run.layer.cell, args, Packing.of(start, run.layer.batch))
        self.start = self.packing.pack(start, "z0")
        self.points: list[Tensor] = []  # at which f was evaluated
        self._adjoint = run.layer.adjoint
        self._state = run.call.arguments[1 if z0 is None else 0]
        self._solution = self.packed([leaf.detach() for leaf in solution])

    def packed(self, tensors: list[Tensor]) -> Tensor:
        """[B, D] of the tensors of a state."""
        return self.packing.pack(Filling(tensors).fill(self._state))

    def evaluate(self, z: Tensor) -> Tensor:
        self.points.append(z)
        return super().evaluate(z)

    def solve(
        self, z0: Tensor, solver: Solver, frozen: Tensor | None = None, *, check: bool = True
    ) -> Solved:
        if isinstance(self._adjoint, Implicit) and self._adjoint.reuse_forward:
            return super().solve(z0, solver, frozen, check=check)  # its history is wanted
        ended = torch.ones(len(z0), dtype=torch.bool, device=z0.device)
        rows = Rows.start(len(z0), z0.device, ended)
        return Solved(self._solution.clone(), rows, None, None)


@never_traced(reason="it is the inside of an op")
def _differentiate(
    grads: list[Tensor], solution: list[Tensor], generator: Tensor, tensors: list[Tensor],
    held: list[Tensor], layer: Tensor, integers: Sequence[int], numbers: Sequence[float],
    call: str, wanted: Sequence[int],
) -> list[Tensor]:  # fmt: skip
    """The gradients of those of ``[*tensors, *held]`` that are ``wanted``."""
    run = _Run(tensors, held, layer, integers, numbers, call)
    leaves = run.leaves(wanted)
    record = _records.get(solution[0].data_ptr(), BackwardRecord())
    with run.cell(), torch.enable_grad():
        with run.autocast(), run.masks_of(generator):
            problem = _Resumed(run, solution)
            value, _ = run.layer.adjoint.solve(problem, problem.start, run.layer.solver, record)
        if not value.requires_grad:
            return [
                torch.zeros(leaf.shape, dtype=leaf.dtype, device=leaf.device) for leaf in leaves
            ]
        _refuse_other_sources(value, [*leaves, *problem.points])
        found = torch.autograd.grad(
            value, leaves, problem.packed(grads), allow_unused=True, materialize_grads=True
        )
    # Of no one else's memory, as the results of an op are.
    return [grad.clone(memory_format=torch.contiguous_format) for grad in found]


def _refuse_other_sources(value: Tensor, known: list[Tensor]) -> None:
    for leaf in graph_leaves(value):
        if leaf.requires_grad and not any(leaf is one for one in known):
            raise RuntimeError(
                "deqcore: in a compiled program gradients reach an ImplicitLayer's arguments and "
                "what its cell's modules have as parameters, buffers and attributes, and the cell "
                f"reads another tensor that wants one, of shape {tuple(leaf.shape)}: pass it as an "
                "argument, or make it a parameter"
            )


def _differentiate_fake(
    grads: list[Tensor], solution: list[Tensor], generator: Tensor, tensors: list[Tensor],
    held: list[Tensor], layer: Tensor, integers: Sequence[int], numbers: Sequence[float],
    call: str, wanted: Sequence[int],
) -> list[Tensor]:  # fmt: skip
    given = [*tensors, *held]
    return [given[i].new_empty(given[i].shape) for i in wanted]


class _Solution(torch.autograd.Function):
    """The op with a graph; ``tensors`` are its first two arguments, one after the other."""

    @staticmethod
    def forward(
        ctx: Any, keyset: Any, split: int, layer: Tensor, integers: Any, numbers: Any, call: str,
        *tensors: Tensor,
    ) -> tuple[Tensor, ...]:  # fmt: skip
        given, held = list(tensors[:split]), list(tensors[split:])
        results = _forward.redispatch(
            keyset & torch._C._after_autograd_keyset, given, held, layer, integers, numbers, call
        )
        about = Call.read(call)
        for index, new in zip(about.updated, results[about.state : -1], strict=True):
            held[index] = new
        ctx.mark_non_differentiable(*results[about.state :])
        ctx.save_for_backward(*results[: about.state], results[-1], layer, *given, *held)
        ctx.about = about.state, split, integers, numbers, call
        return tuple(results)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        state, split, integers, numbers, call = ctx.about
        saved = list(ctx.saved_tensors)
        solution, generator, layer = saved[:state], saved[state], saved[state + 1]
        given = saved[state + 2 :]
        wanted = [i for i, wants in enumerate(ctx.needs_input_grad[6:]) if wants]
        found = _backward(
            list(grads[:state]), solution, generator, given[:split], given[split:], layer,
            integers, numbers, call, wanted,
        )  # fmt: skip
        results: list[Tensor | None] = [None] * len(given)
        for index, grad in zip(wanted, found, strict=True):
            results[index] = grad
        return None, None, None, None, None, None, *results


class _Once(torch.autograd.Function):
    """The gradients, of which there are none in turn."""

    @staticmethod
    def forward(ctx: Any, keyset: Any, arguments: tuple[Any, ...], *tensors: Tensor) -> Any:
        return tuple(_backward.redispatch(keyset & torch._C._after_autograd_keyset, *arguments))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        raise RuntimeError(
            "deqcore: the gradient of a gradient, in a program of torch.compile: take second "
            "derivatives of the model as it is, not compiled"
        )


_TRANSFORMED = (
    "deqcore: torch.func, or forward mode, of an ImplicitLayer inside of a compiled program: "
    "transform the model as it is, not compiled"
)


def _autograd(keyset: Any, tensors: list[Tensor], held: list[Tensor], *others: Any) -> Any:
    if is_transformed():
        raise RuntimeError(_TRANSFORMED)
    if _wants_gradient([*tensors, *held]):
        return list(_Solution.apply(keyset, len(tensors), *others, *tensors, *held))
    after = keyset & torch._C._after_autograd_keyset
    return _forward.redispatch(after, tensors, held, *others)


def _autograd_of_backward(keyset: Any, *arguments: Any) -> Any:
    grads, solution, _, tensors, held, *_ = arguments
    sources = [*grads, *solution, *tensors, *held]
    if _wants_gradient(sources):
        return list(_Once.apply(keyset, arguments, *sources))
    return _backward.redispatch(keyset & torch._C._after_autograd_keyset, *arguments)


def _wants_gradient(tensors: list[Tensor]) -> bool:
    return torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)


def _refuse_vmap(*arguments: Any) -> Any:
    raise RuntimeError(_TRANSFORMED)


_ARGUMENTS = "Tensor[] tensors, Tensor[] held, Tensor layer, SymInt[] integers, float[] numbers"
for _name, _schema, _kernel, _fake, _with_graph in (
    ("implicit_layer", f"({_ARGUMENTS}, str call) -> Tensor[]", _solve, _solve_fake, _autograd),
    (
        "implicit_layer_backward",
        "(Tensor[] grads, Tensor[] solution, Tensor generator, "
        f"{_ARGUMENTS}, str call, int[] wanted) -> Tensor[]",
        _differentiate,
        _differentiate_fake,
        _autograd_of_backward,
    ),
):
    # Not merged with an equal call, since masks may be drawn; not a part of someone's CUDA graph.
    _tags = (torch.Tag.nondeterministic_seeded, torch.Tag.cudagraph_unsafe)
    LIBRARY.define(_name + _schema, tags=_tags)
    LIBRARY.impl(_name, _kernel, "CompositeExplicitAutograd")
    LIBRARY.impl(_name, _with_graph, "Autograd", with_keyset=True)
    LIBRARY.impl(_name, _refuse_vmap, "FuncTorchBatched")
    torch.library.register_fake(f"deqcore::{_name}", _fake, lib=LIBRARY)
_forward = torch.ops.deqcore.implicit_layer.default
_backward = torch.ops.deqcore.implicit_layer_backward.default
