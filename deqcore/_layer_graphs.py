"""When an ``ImplicitLayer`` replays its solve as a CUDA graph instead of making it."""

from __future__ import annotations

import contextlib
import logging
import threading
from collections import OrderedDict
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from deqcore import _kernels
from deqcore._cell import Cell, Snapshot
from deqcore._graphs import CudaGraphs
from deqcore._random_numbers import RandomNumbers
from deqcore._solution import Solution
from deqcore.adjoints import Implicit, Phantom
from deqcore.capture import CapturedSolver, _capture
from deqcore.ops._library import is_transformed

CALLS_BEFORE = 3  # eager calls of a signature, with capture="auto": many are made once only
LARGEST = 1 << 21  # elements of a state, with capture="auto": beyond, launches cost little
MOST_BYTES = 1 << 28  # of histories that one recording holds, with capture="auto"
GRAPHS = 8  # of a layer
GRAPHS_ALIVE = 4  # of one signature, whose backward passes are yet to come
SIGNATURES = 64  # of a layer, to be counted
TIMES_REPLACED = 3  # in a row, each before WORTH replays: then a cell is no more recorded
WORTH = 32
LATER = 8

_log = logging.getLogger("deqcore")
_plain = (bool, int, float, str, type(None), torch.dtype, torch.device, torch.Size)


class _Local(threading.local):
    recording = False


_local = _Local()
_recordings = threading.RLock()  # torch captures one graph at a time


class UnfitError(Exception):
    """Why a call is not captured, in words that follow the cell's name."""


class _Signature:
    def __init__(self) -> None:
        self.calls = self.replays = 0  # since it was recorded last
        self.wanted = CALLS_BEFORE  # eager calls before it is recorded
        self.solvers: list[CapturedSolver] = []
        self.why_not: str | None = None

    def give_way(self) -> None:
        """Lose the recordings; those that have served too few calls are not made again so soon."""
        if self.replays < WORTH:
            self.wanted *= LATER
        self.calls = self.replays = 0
        self.solvers.clear()


class LayerGraphs:
    """The recordings of one layer, by what its calls look like; the least recently used goes first.

    A recording serves one call until its backward pass is over: where others come before, they get
    recordings of their own, up to GRAPHS_ALIVE, and are solved eagerly beyond.
    """

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._signatures: OrderedDict[Any, _Signature] = OrderedDict()
        self._cell: Cell | None = None
        self._snapshot: Snapshot | None = None
        self._options: tuple[Any, ...] = ()
        self._replaced = self._replays = 0
        self._said: set[str] = set()

    def solve(self, layer: Any, z0: Any, args: tuple[Any, ...]) -> Solution | None:
        """The solution from ``z0`` (None: zeros like the first of ``args``); None: go eager."""
        first = _first_tensor(args[0] if z0 is None else z0)
        if first is None or not _is_usable(first) or _is_observed():
            return None
        with self._lock:
            try:
                captured, leaves = self._find(layer, z0, args, first)
            except UnfitError as reason:
                self._say(layer, str(reason))
                return None
            if captured is None:
                return None
            self._replays += 1
            return captured.replay(z0, leaves)

    def _find(
        self, layer: Any, z0: Any, args: tuple[Any, ...], first: Tensor
    ) -> tuple[CapturedSolver | None, list[Any]]:
        grad = torch.is_grad_enabled()
        cell = self._current_cell(layer)
        if cell.is_hooked:
            raise UnfitError("it has hooks")
        leaves, spec = _flatten(args)
        key = _signature(z0, leaves, spec, grad), cell.mode(grad), _state(first.device, grad)
        found = self._signatures.get(key)
        if found is None:
            found = self._signatures[key] = _Signature()
        self._signatures.move_to_end(key)
        if found.why_not is not None:
            return None, leaves
        for captured in found.solvers:
            if not captured.awaits_backward:
                found.replays += 1
                return captured, leaves
        if len(found.solvers) >= GRAPHS_ALIVE or not self._is_due(layer, found, z0, args):
            return None, leaves
        self._make_room(found)
        try:
            captured = _record(layer, cell, z0, args, grad)
        except UnfitError as reason:
            found.why_not = str(reason)
            raise
        found.solvers.append(captured)
        self._snapshot = self._snapshot or Snapshot(cell)
        return captured, leaves

    def _current_cell(self, layer: Any) -> Cell:
        """The cell, after having forgotten what was recorded of another one."""
        options = layer.solver, layer.adjoint, layer.batch
        if any(a is not b for a, b in zip(options, self._options or (None,) * 3, strict=True)):
            self._signatures.clear()
            self._options = options
        if self._cell is None or not self._cell.is_still(layer.cell):
            if not isinstance(layer.cell, nn.Module):
                raise UnfitError("it is no module, so that nobody knows what it reads")
            if self._cell is not None:
                self._forget()
            self._cell = Cell(layer.cell)
        if self._snapshot is not None and not self._snapshot.holds():
            self._forget()
        if self._replaced > TIMES_REPLACED:
            raise UnfitError("its parameters or attributes are replaced between calls")
        return self._cell

    def _forget(self) -> None:
        self._signatures.clear()
        self._snapshot = None
        self._replaced = self._replaced + 1 if self._replays < WORTH else 0
        self._replays = 0

    def _is_due(self, layer: Any, found: _Signature, z0: Any, args: tuple[Any, ...]) -> bool:
        if layer.capture != "auto":
            return True
        found.calls += 1
        if found.calls <= found.wanted:
            return False
        state = pytree.tree_leaves(args[0] if z0 is None else z0)
        return sum(leaf.numel() for leaf in state) <= LARGEST

    def _make_room(self, keep: _Signature) -> None:
        while len(self._signatures) > SIGNATURES:
            self._signatures.popitem(last=False)
        oldest = [one for one in self._signatures.values() if one.solvers and one is not keep]
        while sum(len(one.solvers) for one in self._signatures.values()) >= GRAPHS and oldest:
            oldest.pop(0).give_way()

    def _say(self, layer: Any, reason: str) -> None:
        """One line for each reason."""
        if reason in self._said:
            return
        self._said.add(reason)
        name = getattr(layer.cell, "__name__", type(layer.cell).__name__)
        level = logging.INFO if layer.capture == "auto" else logging.WARNING
        _log.log(level, "deqcore: ImplicitLayer(%s) runs without a CUDA graph: %s", name, reason)


def _record(layer: Any, cell: Cell, z0: Any, args: tuple[Any, ...], grad: bool) -> CapturedSolver:
    why_not = cell.why_not() or _why_not(layer, grad)
    if why_not is not None:
        raise UnfitError(why_not)
    before, numbers = Snapshot(cell), RandomNumbers(_first_tensor(args if z0 is None else z0))

    def check() -> None:
        if numbers.have_been_drawn():
            raise UnfitError("it draws random numbers, which a graph would repeat")

    try:
        with (
            _recordings,
            _unobserved(cell),
            torch.inference_mode(False),
            torch.set_grad_enabled(grad),
        ):
            f, stand_ins = cell.on_stand_ins()
            captured = _capture(
                f, _start(z0, args), args, layer.solver, layer.adjoint, _recorder(), layer.batch,
                stand_ins, check,
            )  # fmt: skip
        if not before.holds():
            raise UnfitError("a call changes attributes of it, which a replay would not")
        if layer.capture == "auto" and not captured.exits_early:
            raise UnfitError("this CUDA cannot end a graph's loop early")
        if layer.capture == "auto" and captured.history_bytes > MOST_BYTES:
            raise UnfitError("its solver's history is large; capture=True would hold on to it")
    except Exception as error:
        numbers.put_back()
        before.put_back()
        if isinstance(error, UnfitError):
            raise
        first = str(error).partition("\n")[0]
        raise UnfitError(f"{type(error).__name__}: {first}") from error
    return captured


def _why_not(layer: Any, grad: bool) -> str | None:
    if layer.solver.record_trace:
        return "record_trace=True keeps what a graph has no room for"
    adjoint = layer.adjoint
    if not grad:
        return None if type(adjoint) in (Implicit, Phantom) else f"{adjoint} makes its own steps"
    if type(adjoint) is not Implicit or adjoint.reuse_forward or adjoint.on_failure == "fallback":
        return f"with gradients, {adjoint} needs solves that are not captured"
    return None


@contextlib.contextmanager
def _unobserved(cell: Cell) -> Iterator[None]:
    """Without recordings inside, and with the buffers put back, which evaluations may change."""
    buffers = [b for m in cell.modules for b in m._buffers.values() if b is not None]
    values = [b.detach().clone() for b in buffers]
    _local.recording = True
    try:
        yield
    finally:
        _local.recording = False
        with torch.no_grad():
            for buffer, value in zip(buffers, values, strict=True):
                if not torch.equal(buffer, value):
                    buffer.copy_(value)


def _flatten(args: tuple[Any, ...]) -> tuple[list[Any], Any]:
    if all(isinstance(arg, Tensor) for arg in args):
        return list(args), len(args)
    return pytree.tree_flatten(args)


def _signature(z0: Any, leaves: list[Any], spec: Any, grad: bool) -> tuple[Any, ...]:
    """Of a call, so that one recording serves all that have it."""
    more: tuple[Any, ...] = ()
    if z0 is not None:
        starts, start_spec = pytree.tree_flatten(z0)
        more = start_spec, *[_of_leaf(leaf, False) for leaf in starts]
    return spec, *[_of_leaf(leaf, grad) for leaf in leaves], *more


def _of_leaf(leaf: Any, grad: bool) -> tuple[Any, ...]:
    if type(leaf) is Tensor or type(leaf) is nn.Parameter:
        kind = leaf.shape, leaf.stride(), leaf.dtype, leaf.device
        return *kind, grad and leaf.requires_grad
    if not isinstance(leaf, _plain):
        raise UnfitError(f"an argument is a {type(leaf).__name__}, which may change unseen")
    return type(leaf), leaf


def _state(device: torch.device, grad: bool) -> tuple[Any, ...]:
    """What else decides which kernels a call runs, and where."""
    kind = device.type
    return (
        grad,
        torch.is_autocast_enabled(kind) and torch.get_autocast_dtype(kind),
        torch.backends.cuda.matmul.fp32_precision,
        torch.backends.cudnn.conv.fp32_precision,  # type: ignore[attr-defined]  # made at run time
        torch.are_deterministic_algorithms_enabled(),
        _stream(device),
    )


def _stream(device: torch.device) -> int:
    return torch._C._cuda_getCurrentRawStream(device.index)


def _is_usable(tensor: Tensor) -> bool:
    return tensor.is_cuda and _kernels.CUDA_KERNELS and not torch.cuda.is_current_stream_capturing()


def _is_observed() -> bool:
    """Whether someone else follows what is computed, so that it must be."""
    hooks: Any = torch._C._autograd._top_saved_tensors_default_hooks
    return bool(
        _local.recording
        or is_transformed()
        or torch._C._len_torch_dispatch_stack()
        or torch._C._get_tracing_state() is not None
        or torch.is_anomaly_enabled()
        or (torch.is_grad_enabled() and hooks(False) is not None)
    )


def _recorder() -> Any:
    return CudaGraphs()


def zeros_like(x: Any) -> Any:
    """A state of zeros shaped like a tensor, or like each tensor of a pytree."""
    return pytree.tree_map(_zeros, x)


def _zeros(x: Any) -> Any:
    if not isinstance(x, Tensor):
        return x
    return torch.zeros_like(x, memory_format=torch.contiguous_format, requires_grad=False)


def _first_tensor(tree: Any) -> Tensor | None:
    if isinstance(tree, Tensor):
        return tree
    return next((leaf for leaf in pytree.tree_leaves(tree) if isinstance(leaf, Tensor)), None)


def _start(z0: Any, args: tuple[Any, ...]) -> Any:
    if z0 is not None:
        return z0
    return zeros_like(args[0])
