"""Options that all solvers share, validated when a solver is made."""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import functools
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor
from typing_extensions import dataclass_transform

Damping = float | Callable[[int], float]
MOST_STEPS = 2**31 - 1  # what an op counts up to; a larger option means the same as this one
T = TypeVar("T")


@dataclass_transform(frozen_default=True, kw_only_default=True)
def options(cls: type[T]) -> type[T]:
    """A frozen, keyword-only dataclass whose constructor names the option a typo was meant for."""
    decorated = dataclass(frozen=True, kw_only=True)(cls)
    fields = [field.name for field in dataclasses.fields(decorated)]  # type: ignore[arg-type]
    generated = decorated.__init__

    def checked(self: Any, *args: Any, **kwargs: Any) -> None:
        if args:
            raise TypeError(
                f"{cls.__name__}: options are keywords, as in {cls.__name__}({fields[0]}=...)"
            )
        for name in kwargs:
            if name not in fields:
                close = difflib.get_close_matches(name, fields, n=1)
                hint = f"did you mean {close[0]!r}? " if close else ""
                raise TypeError(
                    f"{cls.__name__}: unknown option {name!r}; {hint}Options: {', '.join(fields)}"
                )
        generated(self, **kwargs)

    decorated.__init__ = functools.wraps(generated)(checked)  # type: ignore[method-assign]
    return decorated


def require_int(owner: object, name: str, low: int, high: int | None = None) -> None:
    value = getattr(owner, name)
    if isinstance(value, bool) or not isinstance(value, int):
        raise ValueError(_message(owner, name, "an integer", value))
    if value < low or (high is not None and value > high):
        bound = f"at least {low}" if high is None else f"between {low} and {high}"
        raise ValueError(_message(owner, name, f"an integer {bound}", value))


def require_number(
    owner: object, name: str, low: float, high: float = math.inf, *, above: bool = False
) -> None:
    """``low`` is allowed unless ``above``; ``high`` is allowed; NaN never."""
    value = getattr(owner, name)
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise ValueError(_message(owner, name, "a number", value))
    if not (low < value if above else low <= value) or not value <= high:
        bound = f"above {low:g}" if above else f"of at least {low:g}"
        bound += f" and at most {high:g}" if high < math.inf else ""
        raise ValueError(_message(owner, name, f"a number {bound}", value))


def require_bool(owner: object, name: str) -> None:
    value = getattr(owner, name)
    if not isinstance(value, bool):
        raise ValueError(_message(owner, name, "True or False", value))


def require_damping(owner: object) -> None:
    if not callable(getattr(owner, "damping")):  # noqa: B009  (not every options class has it)
        require_number(owner, "damping", 0.0, 2.0, above=True)


def require_history_dtype(owner: object) -> None:
    value = getattr(owner, "history_dtype")  # noqa: B009  (not every options class has it)
    if value not in (None, torch.bfloat16):
        expected = "None (the iterate's own) or torch.bfloat16, which has float32's range"
        raise ValueError(_message(owner, "history_dtype", expected, value))


def storage_dtype(owner: object, x: Tensor) -> torch.dtype:
    """In which the solver ``owner`` keeps its history of iterates like ``x``."""
    dtype: torch.dtype | None = getattr(owner, "history_dtype")  # noqa: B009  (likewise)
    if dtype is not None and x.dtype != torch.float32:
        raise ValueError(
            f"{type(owner).__name__}: history_dtype={dtype} needs a float32, bfloat16 or float16 "
            f"state, got one that is solved in {x.dtype}; leave history_dtype at None"
        )
    return x.dtype if dtype is None else dtype


def _message(owner: object, name: str, expected: str, value: object) -> str:
    return f"{type(owner).__name__}: {name} must be {expected}, got {value!r}"


class StepContext(NamedTuple):
    """What all steps of a solve share, made once f has been called for the first time.

    Attributes:
        damping: float64 [T] on the state's device; the last entry holds for all later steps.
        numbers: tolerances, limits and the solver's own options, in the order of its op.
        options: the same as the op takes them, float64 on the CPU.
        dtype: of the state as f sees it.
        nothing: an empty tensor, for an op's output that is not wanted.
    """

    damping: Tensor
    numbers: tuple[Any, ...]
    options: Tensor
    dtype: torch.dtype
    nothing: Tensor


@options
class SolverOptions:
    """Options of every solver.

    Norms are roots of sums of squares in float64. Of a float64 state they are meant for values
    between about 1e-150 and 1e150: a row whose sum of squares exceeds 1.8e308 ends as NONFINITE,
    and a residual below 1e-162 counts as 0, which meets any tolerance. Scale such a problem. States
    in other dtypes cannot get there.

    Args:
        rtol: relative tolerance; a row has converged when
            ``rms(f(z) - z) <= atol + rtol * rms(f(z))``. None: 1e-4, or the machine epsilon of the
            state's dtype, of what f returns or of autocast where that is larger: no bfloat16 state
            reaches 1e-4. Where f leaves autocast for float32, pass what it can reach.
        atol: absolute tolerance, in the units of the state.
        max_steps: the most calls of f.
        patience: a row has stalled when its best residual is this many steps old.
        check_every: steps between two looks at whether all rows have ended; on a GPU the answer is
            awaited one look late. 0: never look, run ``max_steps``.
        record_trace: keep the residual after every step in ``Solution.trace``.
    """

    rtol: float | None = None
    atol: float = 1e-6
    max_steps: int = 50
    patience: int = 25
    check_every: int = 1
    record_trace: bool = False

    def __post_init__(self) -> None:
        if self.rtol is not None:
            require_number(self, "rtol", 0.0)
        require_number(self, "atol", 0.0)
        require_int(self, "max_steps", 1)
        require_int(self, "patience", 1)
        require_int(self, "check_every", 0)
        require_bool(self, "record_trace")

    def relative_tolerance(self, *dtypes: torch.dtype) -> float:
        """``rtol``, or its default for a state and an f of these dtypes."""
        if self.rtol is not None:
            return self.rtol
        return max([1e-4, *(torch.finfo(dtype).eps for dtype in dtypes)])

    def damping_table(self, device: torch.device) -> Tensor:
        """float64 [T]: one entry for a constant, ``max_steps`` for a function of the step."""
        damping: Damping = getattr(self, "damping", 1.0)
        if not callable(damping):
            # Filled there: a copy from the host would wait for a GPU.
            return torch.full((1,), damping, dtype=torch.float64, device=device)
        values = [float(damping(step)) for step in range(1, self.max_steps + 1)]
        for step, value in enumerate(values, start=1):
            if not 0 < value <= 2:
                raise ValueError(
                    f"{type(self).__name__}: damping({step}) must be above 0 and at most 2, "
                    f"got {value!r}"
                )
        table = torch.tensor(values, dtype=torch.float64)
        if device.type == "cuda":
            table = table.pin_memory()
        return table.to(device, non_blocking=True)

    def context(
        self, x: Tensor, dtype: torch.dtype, f_dtypes: Iterable[torch.dtype]
    ) -> StepContext:
        """For iterates like ``x``, which f sees as ``dtype`` and computes in ``f_dtypes``."""
        rtol = self.relative_tolerance(dtype, *f_dtypes)
        limits = (rtol, self.atol, self.patience, self.max_steps)
        given = (*limits, *self.own_options())
        numbers = tuple(min(n, MOST_STEPS) if isinstance(n, int) else n for n in given)
        options = torch.tensor(numbers, dtype=torch.float64, device="cpu")
        return StepContext(self.damping_table(x.device), numbers, options, dtype, x.new_empty(0))

    # What a solver implements; `state` is a NamedTuple of tensors with a field `rows`.

    def own_options(self) -> tuple[Any, ...]:
        """The op's numbers beyond tolerances and limits."""
        raise _not_a_solver(self)

    def init(self, x: Tensor, rows: Any) -> Any:
        """State for iterates like ``x`` [B, D]."""
        raise _not_a_solver(self)

    def step(
        self, state: Any, x: Tensor, f: Tensor, step: int, context: StepContext
    ) -> tuple[Any, Tensor, Tensor]:
        """(state, next iterate, next iterate in f's dtype); ``state`` is changed in place.

        ``step`` is 1 for the first evaluation.
        """
        raise _not_a_solver(self)

    def with_all_room(self, state: Any) -> Any:
        """``state`` with all the memory that ``max_steps`` steps could need."""
        raise _not_a_solver(self)

    def advance(
        self, state: Any, x: Tensor, f: Tensor, context: StepContext, x_next: Tensor, z_next: Tensor
    ) -> None:
        """A step whose state has room, into the caller's buffers; ``x_next`` may be ``x``."""
        raise _not_a_solver(self)

    def differentiable_step(
        self, state: Any, x: Tensor, f: Tensor, step: int, context: StepContext
    ) -> tuple[Any, Tensor]:
        """(new state, next iterate) without mutation, by differentiable PyTorch operations."""
        raise _not_a_solver(self)


def _not_a_solver(value: object) -> TypeError:
    return TypeError(f"{type(value).__name__} is not a solver: use Picard, Anderson or Broyden")


def step_outputs(x: Tensor, context: StepContext) -> tuple[Tensor, Tensor]:
    """Buffers for the next iterate, and for it as f sees it (empty where that is the same).

    The next iterate takes the place of ``x`` unless f, or whoever called the solver, still holds on
    to its memory: an iterate that someone kept never changes.
    """
    ours = _is_ours_alone(x)
    if ours and context.dtype == x.dtype:
        return x, context.nothing
    with counting_changes():
        x_next = x if ours else torch.empty_like(x)
        if context.dtype == x.dtype:
            return x_next, context.nothing
        return x_next, torch.empty_like(x, dtype=context.dtype)


def counting_changes() -> contextlib.AbstractContextManager[Any]:
    """Where new tensors count their changes: a solve knows by that whether f works in place.

    Tensors made in ``torch.inference_mode()`` do not.
    """
    if not torch.is_inference_mode_enabled():
        return contextlib.nullcontext()
    stack = contextlib.ExitStack()
    stack.enter_context(torch.inference_mode(False))
    stack.enter_context(torch.no_grad())  # the former turns gradients on
    return stack


def _is_ours_alone(x: Tensor) -> bool:
    try:
        storage = x.untyped_storage()
        # One reference is x's, one that of `storage`. A view, a detached alias, a graph and a NumPy
        # array each hold another.
        return bool(torch._C._storage_Use_Count(storage._cdata) == 2)
    except (AttributeError, RuntimeError, NotImplementedError):  # a tensor without storage (vmap)
        return False
