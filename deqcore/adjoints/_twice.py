"""Double backward: the gradient u of a solution, with a graph of its own.

u solves u = g + J^T u, where J is taken at a solution z that is detached, and goes on through the
graph of f at that z. Both depend on z, which depends on what f depends on: autograd cannot know.
So zeros are added to what leaves the graph of f, whose gradient is that of what they are added to
with respect to z, and goes to a copy of the solution that has the implicit gradient once more.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._functorch.utils import enable_single_level_autograd_function
from torch.autograd.function import _SingleLevelFunction
from torch.autograd.graph import GradientEdge

Edge = tuple[Any, int]  # a node of autograd's graph, and which of its inputs


class FGraph:
    """The graph that f has made at the solution.

    Attributes:
        f, z: [B, D] f(z) with its graph, and the leaf that it starts from.
        exits: edges from its nodes to those that were there before, or to leaves other than z; each
            with the nodes that it starts from.
    """

    def __init__(self, f: Tensor, z: Tensor, first: int) -> None:
        """``first``: the sequence number of autograd's nodes before f was evaluated."""
        self.f, self.z = f, z
        self.exits: dict[Edge, list[tuple[Any, int]]] = {}
        nodes: list[Any] = [f.grad_fn]
        seen: set[Any] = set()
        while nodes:
            node = nodes.pop()
            if node in seen or not _is_newer(node, first):
                continue
            seen.add(node)
            for place, edge in enumerate(node.next_functions):
                following = edge[0]
                if following is None or getattr(following, "variable", None) is z:
                    continue
                nodes.append(following)
                if not _is_newer(following, first):
                    self.exits.setdefault(edge, []).append((node, place))

    def gradients(self, u: Tensor, create_graph: bool) -> tuple[Tensor | None, ...]:
        """u^T df, for z first and then for each exit."""
        inputs: Any = (self.z, *(GradientEdge(*edge) for edge in self.exits))
        gradients: tuple[Tensor | None, ...] = torch.autograd.grad(
            self.f, inputs, u,
            retain_graph=True, create_graph=create_graph, allow_unused=True,
        )  # fmt: skip
        return gradients

    def add_at_exits(self, zeros: tuple[Tensor | None, ...]) -> None:
        """Add ``zeros``, one for each exit, to the gradients of the backward pass under way."""
        this_pass = torch._C._current_graph_task_id()
        left = dict(zip(self.exits, zeros, strict=True))
        places: dict[Any, list[tuple[int, Edge]]] = {}
        for edge, starts in self.exits.items():
            for node, place in starts:
                places.setdefault(node, []).append((place, edge))

        def hook_of(here: list[tuple[int, Edge]]) -> Callable[..., Any]:
            def add(grads: tuple[Tensor | None, ...], _: Any) -> tuple[Tensor | None, ...] | None:
                if torch._C._current_graph_task_id() != this_pass:
                    return None
                sums = list(grads)
                for place, edge in here:
                    grad = sums[place]
                    if grad is not None and (zero := left.pop(edge, None)) is not None:
                        sums[place] = grad + zero
                return tuple(sums)

            return add

        handles = [node.register_hook(hook_of(here)) for node, here in places.items()]

        def end() -> None:
            for handle in handles:
                handle.remove()
            self.z.grad = None  # it has a graph, which has it

        torch.autograd.Variable._execution_engine.queue_callback(end)


def _is_newer(node: Any, first: int) -> bool:
    return not hasattr(node, "variable") and bool(node._sequence_nr() >= first)


class ThroughSolution(torch.autograd.Function):
    """Zeros beside u^T df, for z and for each exit; their gradient goes to the solution."""

    @staticmethod
    def forward(ctx: Any, solution: Tensor, graph: FGraph, u: Tensor) -> tuple[Tensor | None, ...]:
        ctx.graph, ctx.u = graph, u
        ctx.set_materialize_grads(False)
        return tuple(
            None if one is None else torch.zeros_like(one) for one in graph.gradients(u, False)
        )

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, None, None]:
        again = torch.is_grad_enabled()
        with torch.enable_grad():
            gradients = ctx.graph.gradients(ctx.u, True)
        pairs = [
            (gradient, grad) for gradient, grad in zip(gradients, grads, strict=True)
            if gradient is not None and gradient.requires_grad and grad is not None
        ]  # fmt: skip
        if not pairs:
            return None, None, None
        outputs, incoming = zip(*pairs, strict=True)
        (grad_z,) = torch.autograd.grad(
            outputs, ctx.graph.z, incoming, retain_graph=True, allow_unused=True
        )
        if again and grad_z is not None:
            grad_z = not_again(THIRD, grad_z.detach(), ctx.graph.f, *incoming)
        return grad_z, None, None


THIRD = (
    "deqcore.Implicit: a third derivative is not supported; solve with adjoint=deqcore.Unrolled() "
    "where you need it"
)


def not_again(message: str, u: Tensor, *sources: Tensor) -> Tensor:
    """u, a tensor without a graph of its own, of which no gradient can be had by way of sources."""
    with enable_single_level_autograd_function():
        once: Tensor = _NotAgain.apply(message, [u], *sources)  # type: ignore[attr-defined]
    return once


class _NotAgain(_SingleLevelFunction):
    """Identity whose backward raises, reached from whatever the first gradient depends on."""

    @staticmethod
    def forward(ctx: Any, message: str, u: list[Tensor], *sources: Tensor) -> Tensor:
        ctx.message = message
        return u[0]  # as it is: an operation here would be hidden from outer transforms

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        raise RuntimeError(ctx.message)
