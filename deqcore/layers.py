"""Implicit layers as modules."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn

from deqcore._compile import constant_when_traced, never_traced
from deqcore._layer_call import attribute_names
from deqcore._layer_graphs import LayerGraphs, zeros_like
from deqcore._layer_op import call_op, has_an_op, numbered
from deqcore._packing import Packing, is_coupled
from deqcore._sharded import refuse_sharded
from deqcore._solution import Solution, SolveReport
from deqcore._transforms import values_are_unknown
from deqcore.adjoints import Adjoint, Implicit
from deqcore.fixed_point import fixed_point
from deqcore.solvers import Anderson, Solver


class ImplicitLayer(nn.Module):
    """z* with z* = cell(z*, x, *args), as a module.

    Grad mode decides whether gradients flow, not ``training``: the layer trains in ``eval()`` mode
    and inside a frozen model, may be used several times in one model, be copied and be pickled.

    Args:
        cell: module called as ``cell(z, x, *args)``; returns a state like z.
        solver: ``Picard``, ``Anderson`` or ``Broyden``.
        adjoint: ``Implicit``, ``Phantom`` or ``Unrolled``.
        batch: ``"rows"``, or ``"coupled"`` where the cell lets rows depend on each other, as batch
            norm in training mode does: see ``deqcore.fixed_point``.
        capture: whether solves on a GPU, and their backward passes, are recorded as CUDA graphs and
            replayed, which takes a small solve's time on the host away and changes no bit of it
            where the cell's kernels are the same under capture. ``"auto"``: from the fourth call of
            one signature on (shapes, strides, dtypes, grad mode, autocast, training modes), for
            states of up to 2 million elements and histories of up to 256 MiB; True: from the first,
            of any size; False: never.
        has_aux: the cell returns ``(state, aux)``, and the layer ``(solution, aux)``: that of the
            evaluation at the solution, without a graph. Such solves are never recorded.

    What a recording has read of the cell is noticed when it changes: with parameters, buffers,
    modules or attributes that are replaced it is recorded anew, unless that happens time and again;
    parameters may change in place. What it reads elsewhere, as a global variable, is what it was.
    Solved eagerly, for each reason with one line of log (``logging.getLogger("deqcore")``, INFO, or
    WARNING with ``capture=True``), are a cell that waits for the GPU, draws random numbers, changes
    its attributes, has hooks, is compiled or no module; gradients by another adjoint than
    ``Implicit``, or with its ``on_failure="fallback"``; and without a line, calls inside of another
    capture, a transform or a trace, and under hooks of saved tensors. A layer keeps 8 recordings,
    each with memory for all that its solves need; of several calls before their backward passes, up
    to 4 have one each.

    ``torch.export.export(layer, ...)`` takes the steps of a solver with ``check_every=0``, all of
    them: see ``deqcore.fixed_point``.

    Raises:
        RuntimeError: in forward, the cell or a part of it is sharded by FSDP; shard the layer.

    Attributes:
        report: outcome of the last forward solve (status, residual, steps, evaluations, trace),
            with ``report.backward`` for its backward solve; None before the first, and after
            one under ``torch.func.vmap``. It holds no graph.
    """

    def __init__(
        self,
        cell: nn.Module,
        solver: Solver = Anderson(),
        adjoint: Adjoint = Implicit(),
        batch: Literal["rows", "coupled"] = "rows",
        capture: Literal["auto"] | bool = "auto",
        has_aux: bool = False,
    ) -> None:
        super().__init__()
        if not callable(cell):
            raise TypeError(f"cell: expected a module or callable, got {type(cell).__name__}")
        if not isinstance(solver, Solver):
            raise TypeError(f"solver: expected e.g. deqcore.Anderson(), got {solver!r}")
        if not isinstance(adjoint, Adjoint):
            raise TypeError(f"adjoint: expected e.g. deqcore.Implicit(), got {adjoint!r}")
        is_coupled(batch)  # or an error
        if capture not in ("auto", True, False):
            raise ValueError(f"capture: expected 'auto', True or False, got {capture!r}")
        self.cell = cell
        self.solver = solver
        self.adjoint = adjoint
        self.batch = batch
        self.capture = capture
        self.has_aux = has_aux
        self.report: SolveReport | None = None
        self._graphs = LayerGraphs()
        self._number = numbered(self)

    def forward(self, x: Any, *args: Any, z0: Any = None) -> Any:
        """The solution, shaped like ``z0``; from zeros shaped like ``x`` unless ``z0`` is given."""
        if (
            torch.compiler.is_dynamo_compiling()
            and not torch.compiler.is_exporting()
            and has_an_op(self, z0, (x, *args))
        ):
            return call_op(self, z0, (x, *args))
        value, aux = self._solve(z0, (x, *args))
        return (value, aux) if self.has_aux else value

    @never_traced(
        reason="a solve takes as many steps as values need. An ImplicitLayer is compiled as one op "
        "where its cell is a module, its arguments are made of tensors, numbers, strings, None, "
        "lists, tuples and dictionaries, and has_aux is False; for torch.export pass strict=False "
        "and a solver with check_every=0"
    )
    def _solve(self, z0: Any, args: tuple[Any, ...], replay: bool = True) -> tuple[Any, Any]:
        """(value, aux) of ``self(*args, z0=z0)``, never traced; recordings only with ``replay``."""
        refuse_sharded(self.cell)
        solution: Solution | None = None
        is_replica = "_is_replica" in vars(self)  # of nn.DataParallel
        if replay and self.capture and not self.has_aux and not is_replica:
            solution = self._graphs.solve(self, z0, args)
        if solution is None:
            solution = fixed_point(
                self.cell,
                _zeros_like(args[0]) if z0 is None else z0,
                *args,
                solver=self.solver,
                adjoint=self.adjoint,
                batch=self.batch,
                has_aux=self.has_aux,
            )
        status = solution.status
        unknown = values_are_unknown(status) or torch._C._functorch.is_batchedtensor(status)
        self.report = None if unknown else solution.report()
        return solution.value, solution.aux

    @constant_when_traced
    def _attribute_names(self) -> tuple[tuple[int, str], ...]:
        return attribute_names(self.cell)

    def extra_repr(self) -> str:
        return (
            f"solver={self.solver}, adjoint={self.adjoint}, batch={self.batch!r}, "
            f"capture={self.capture!r}{', has_aux=True' if self.has_aux else ''}"
        )

    def __getstate__(self) -> dict[str, Any]:
        """All but the recordings and the number, which copies get for themselves."""
        own = ("_graphs", "_number")
        return {name: value for name, value in vars(self).items() if name not in own}

    def __setstate__(self, state: dict[str, Any]) -> None:
        # Versions before 0.2 had none of these.
        super().__setstate__({"capture": "auto", "has_aux": False} | state)
        self._graphs = LayerGraphs()
        self._number = numbered(self)


def _zeros_like(x: Any) -> Any:
    z0 = zeros_like(x)
    if isinstance(x, Tensor) and x.is_floating_point():
        return z0
    try:
        Packing.of(z0)
    except (TypeError, ValueError) as error:
        raise type(error)(
            "x: no state can be shaped like it; pass z0= to say where to start. Of zeros like x: "
            f"{error}"
        ) from None
    return z0
