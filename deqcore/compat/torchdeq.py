"""``get_deq`` with torchdeq 0.1.0's option names, calls and results, on deqcore's solvers.

    from deqcore.compat.torchdeq import get_deq

    deq = get_deq(f_solver="anderson", f_tol=1e-3, ift=True)
    z_out, info = deq(f, z0)  # z_out[-1] is the solution

What differs:

| | torchdeq 0.1.0 | here |
| --- | --- | --- |
| gradients | in `train()` only | in grad mode, whether `training` or not |
| returned state | the best iterate or f of it, then f `grad` times in training | the iterate that was measured; the next of several states goes on from there |
| `abs` tolerance | norm(f(z) - z) of the worst row | each row stops by itself and is frozen |
| `rel` tolerance | norm(f(z) - z) < tol * norm(f(z)), of the worst row | the same, row by row |
| `b_tol`, `abs` | norm of the adjoint's residual | its rms, relative to the incoming gradient |
| non-finite rows | run on, and change others | end alone: `deq.report.status` |
| diverging rows | run on | end at 1e8 times the first residual |
| `anderson` | 6 residuals, ridge 1e-4, absolute | 6 residuals, ridge 1e-8, relative |
| `broyden` | f_max_iter + 1 calls of f | f_max_iter; restarts after 64 steps |
| `hook_ift` | backward hook | the same gradient without a hook |
| `b_solver` | simple_fixed_point_iter raises | it works |
| `ift` | f called again in backward | f called once more in forward |
| states of a list | one dtype, the promoted one | each keeps its dtype |
| `rel_lowest`, `rel_trace` | relative to norm(f(z)) at the step | relative to norm(z) of the solution |
| `abs_trace` | first entry 1e8, then padded | one entry a step until all rows have ended |
| `nstep` | step of the lowest residual | calls of f that the row used |
| `sradius` | power method, only in `eval()` | Arnoldi, in any mode; -1 when not asked for |
| the caller's dict | is changed | is not |
| dropout in cells | `reset` before each solve | `deqcore.FixedDropout` needs none |
| rows that depend on each other | one norm for all, in some solvers | `batch="coupled"`: one for all, with `info` of shape [1] |
| unknown options | are ignored | TypeError |

Not here: sampling states along one solve (``core="indexing"`` with several states), ``sup_gap``,
``sup_loc``, ``backward_writer``, line search, registered solvers; asking for one is a ValueError.
"""  # noqa: E501  (a table in Markdown)

from __future__ import annotations

import dataclasses
import difflib
import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from deqcore._packing import BATCHES, Packing
from deqcore._solution import Solution, SolveReport
from deqcore.adjoints import Adjoint, Implicit, Phantom
from deqcore.fixed_point import fixed_point
from deqcore.regularizers import spectral_radius
from deqcore.solvers import Anderson, Broyden, Picard, Solver
from deqcore.solvers._options import options, require_bool, require_int, require_number

_STATES = "use core='sliced' with n_states, or one deqcore.fixed_point(...) per state"
_NORM = "read by apply_norm, not by get_deq; use deqcore.normalization"
_LOSS = "read by the training loop, not by get_deq; use deqcore.jacobian_penalty"

# Options that torchdeq's argument parser always sets: fine while they ask for nothing.
_ELSEWHERE: dict[str, tuple[Any, str]] = {
    "sup_gap": (-1, _STATES),
    "sup_loc": ((), _STATES),
    "no_stat": (False, "the residual is always measured, at no extra pass over the state"),
    "norm_type": ("weight_norm", _NORM),
    "norm_no_scale": (False, _NORM),
    "norm_clip": (False, _NORM),
    "norm_clip_value": (1.0, _NORM),
    "norm_target_norm": (1.0, _NORM),
    "sn_n_power_iters": (1, _NORM),
    "gamma": (0.8, "read by the correction loss, not by get_deq; weight the states of z_out"),
    "jac_loss_weight": (0.0, _LOSS),
    "jac_loss_freq": (0.0, _LOSS),
    "jac_incremental": (0, _LOSS),
    "sradius_mode": (False, "pass it to the call, deq(f, z0, sradius_mode=True)"),
}
_SOLVER_ELSEWHERE: dict[str, tuple[Any, str]] = {
    "lam": (1e-4, "the ridge here is relative; use deqcore.fixed_point with Anderson(ridge=...)"),
    "ls": (False, "there is no line search; use tau below 1, or f_solver='anderson'"),
    "return_final": (False, "the best measured iterate is returned; set f_tol=0 to run all steps"),
}


# torchdeq's names of solvers, and of the options that a call may pass to each.
_METHODS: dict[str, tuple[Callable[..., Solver], dict[str, str]]] = {
    "fixed_point_iter": (Picard, {"tau": "damping"}),
    "simple_fixed_point_iter": (Picard, {"tau": "damping"}),
    "anderson": (Anderson, {"tau": "damping", "m": "memory"}),
    "broyden": (Broyden, {"LBFGS_thres": "memory"}),
}


@options
class Options:
    """torchdeq's options that are offered, with torchdeq's defaults; ``batch`` is ours."""

    core: str = "sliced"
    f_solver: str = "fixed_point_iter"
    b_solver: str = "fixed_point_iter"
    f_max_iter: int = 40
    b_max_iter: int = 40
    f_tol: float = 1e-3
    b_tol: float = 1e-6
    f_stop_mode: str = "abs"
    b_stop_mode: str = "abs"
    eval_factor: float = 1.0
    eval_f_max_iter: int = 0
    ift: bool = False
    hook_ift: bool = False
    grad: int | Sequence[int] = 1
    tau: float = 1.0
    n_states: int = 1
    indexing: Sequence[int] = ()
    batch: str = "rows"

    def __post_init__(self) -> None:
        for name in ("f_max_iter", "b_max_iter", "n_states"):
            require_int(self, name, 1)
        for name in ("f_tol", "b_tol"):
            require_number(self, name, 0.0)
        for name in ("ift", "hook_ift"):
            require_bool(self, name)
        require_number(self, "eval_factor", 0.0, above=True)
        require_int(self, "eval_f_max_iter", 0)
        _require_choice(self, "core", ("sliced", "indexing"))
        _require_choice(self, "batch", BATCHES)
        for which in ("f", "b"):
            _require_choice(self, f"{which}_solver", tuple(_METHODS))
            _require_choice(self, f"{which}_stop_mode", ("abs", "rel"))
        if not isinstance(self.indexing or (), Sequence):
            raise ValueError(f"get_deq: indexing must be a list of steps, got {self.indexing!r}")
        several = self.n_states > 1
        if several and self.indexing:
            raise ValueError("get_deq: n_states and indexing both choose states; pass one of them")
        if self.core == "indexing" and (several or self.indexing):
            raise ValueError(f"get_deq: core='indexing' returns one state here; {_STATES}")

    def slices(self, f_max_iter: int) -> list[int]:
        """Steps of the solves that follow each other, one for each state."""
        ends = [0, *(self.indexing or ()), f_max_iter]
        steps = [after - before for before, after in itertools.pairwise(ends)]
        if self.n_states > 1:
            steps = [f_max_iter // self.n_states] * self.n_states
        if min(steps) < 1:
            raise ValueError(
                f"get_deq: f_max_iter={f_max_iter} with n_states={self.n_states} and "
                f"indexing={self.indexing} leaves a state without a step"
            )
        return steps

    def adjoints(self) -> list[Adjoint]:
        """One for each state."""
        steps = list(self.grad) if isinstance(self.grad, Sequence) else [self.grad]
        states = len(self.slices(self.f_max_iter))
        if len(steps) not in (1, states):
            raise ValueError(f"get_deq: grad must hold 1 or {states} numbers, got {steps}")
        steps *= states // len(steps)
        implicit: list[Adjoint] = []
        if self.ift or self.hook_ift:  # of the last state, where grad and tau have no effect
            solver = self.solver("b", self.b_max_iter)
            # Without a tolerance there is none to miss.
            fixed_steps = solver.rtol == 0 and solver.atol == 0
            implicit = [Implicit(solver=solver, on_failure="ignore" if fixed_steps else "warn")]
            steps.pop()
        return [*(Phantom(steps=count, damping=self.tau) for count in steps), *implicit]

    def solver(
        self, which: str, max_steps: int, dim: int = 1, given: Mapping[str, Any] | None = None
    ) -> Solver:
        """``which`` is "f" or "b"; the norm of a row is sqrt(dim) times its rms."""
        name, tol = getattr(self, f"{which}_solver"), getattr(self, f"{which}_tol")
        method, allowed = _METHODS[name]
        own: dict[str, Any] = {"max_steps": max_steps, "patience": max(max_steps, 1)}
        if name == "simple_fixed_point_iter":  # looks at nothing on the way
            own |= {"atol": 0.0, "rtol": 0.0, "check_every": 0}
        elif getattr(self, f"{which}_stop_mode") == "rel":
            own |= {"atol": 0.0, "rtol": tol}
        else:
            own |= {"atol": tol / max(dim, 1) ** 0.5, "rtol": 0.0}
        if name == "anderson":
            own["memory"] = 6
        elif name == "broyden":
            own["memory"] = max(1, min(max_steps, 64))
        for key, value in (given or {}).items():
            if key not in allowed:
                raise ValueError(f"solver_kwargs: {name} has no {key}; it has {list(allowed)}")
            own[allowed[key]] = value
        return method(record_trace=which == "f", **own)


def get_deq(args: Any = None, **kwargs: Any) -> DEQ:
    """A module that is called like torchdeq's, ``z_out, info = deq(f, z0)``.

    Args:
        args: options, as a mapping, an ``argparse.Namespace`` or another object with attributes. It
            is not changed. What is no option of torchdeq is refused: of a namespace that holds more
            pass ``{k: v for k, v in vars(args).items() if k in KNOWN}``.
        **kwargs: options, see ``Options``; they override those in ``args``.

    Raises:
        TypeError: an unknown option; the message names the nearest known one.
        ValueError: a bad value, or a behaviour that is not offered, with what to use instead.
    """
    given = dict(args) if isinstance(args, Mapping) else {} if args is None else dict(vars(args))
    given.update(kwargs)
    return DEQ(Options(**_offered("get_deq", given, KNOWN, _ELSEWHERE)))


class DEQ(nn.Module):
    """Made by ``get_deq``.

    Attributes:
        report: the ``deqcore.SolveReport`` of the last solve; None before the first.
    """

    def __init__(self, options: Options) -> None:
        super().__init__()
        self.options = options
        self.adjoints = options.adjoints()
        self.eval_f_max_iter = options.eval_f_max_iter or int(
            options.f_max_iter * options.eval_factor
        )
        self.report: SolveReport | None = None
        for budget in (*options.slices(options.f_max_iter), self.eval_f_max_iter):
            options.solver("f", budget)  # raises here rather than in the first call

    def forward(
        self,
        func: Callable[..., Any],
        z_init: Any,
        solver_kwargs: Mapping[str, Any] | None = None,
        sradius_mode: bool = False,
        backward_writer: None = None,
    ) -> tuple[list[Any], dict[str, Tensor]]:
        """Solve z = func(z), or z = func(*z) for a list or tuple of states, from ``z_init``.

        Args:
            func: the cell, with its input bound.
            z_init: a tensor [B, ...], or a list or tuple of tensors that share dim 0.
            solver_kwargs: for this call: ``f_max_iter``, ``tau`` (damping), ``m`` (anderson's
                memory), ``LBFGS_thres`` (broyden's).
            sradius_mode: also estimate the spectral radius at the solution.
            backward_writer: not offered; ``deq.report.backward`` is there after backward.

        Returns:
            ``(z_out, info)``. ``z_out`` holds the solution, in training after the states that
            ``n_states`` or ``indexing`` ask for; each is a tensor, or a list where ``z_init`` is a
            list or tuple. ``info`` is about the last solve: ``abs_lowest``, ``rel_lowest``,
            ``nstep`` [B], ``abs_trace``, ``rel_trace`` [B, n], ``sradius`` [B].
        """
        if backward_writer is not None:
            raise ValueError("backward_writer: read deq.report.backward after backward instead")
        known = ("f_max_iter", "tau", "m", "LBFGS_thres", *_SOLVER_ELSEWHERE)
        given = _offered("solver_kwargs", solver_kwargs or {}, known, _SOLVER_ELSEWHERE)
        full = self.options.f_max_iter if self.training else self.eval_f_max_iter
        full = given.pop("f_max_iter", full)
        budgets = self.options.slices(full) if self.training else [full]
        adjoints = self.adjoints if self.training else self.adjoints[-1:]

        is_list = isinstance(z_init, (list, tuple))
        z = list(z_init) if is_list else z_init
        f = (lambda state: list(func(*state))) if is_list else func
        batch: Any = self.options.batch
        dim = Packing.of(z, batch).dim
        z_out = []
        for budget, adjoint in zip(budgets, adjoints, strict=True):
            solver = self.options.solver("f", budget, dim, given)
            solution = fixed_point(f, z, solver=solver, adjoint=adjoint, batch=batch)
            z_out.append(solution.value)
            z = pytree.tree_map(torch.detach, solution.value)
        self.report = solution.report()
        info = _info(solution, Packing.of(z, batch).pack(z))
        not_asked = info["nstep"].new_tensor([-1.0])
        info["sradius"] = spectral_radius(f, z, batch=batch) if sradius_mode else not_asked
        return z_out, info

    def extra_repr(self) -> str:
        return str(self.options)


def _info(solution: Solution, z: Tensor) -> dict[str, Tensor]:
    """torchdeq's statistics: norms where deqcore has rms."""
    lowest = solution.residual * z.shape[1] ** 0.5
    assert solution.trace is not None
    trace = solution.trace * z.shape[1] ** 0.5
    scale = z.to(lowest.dtype).norm(dim=1) + 1e-9
    return {
        "abs_lowest": lowest,
        "rel_lowest": lowest / scale,
        "abs_trace": trace,
        "rel_trace": trace / scale[:, None],
        "nstep": solution.steps.to(lowest.dtype),
    }


def _offered(
    where: str,
    given: Mapping[str, Any],
    known: Sequence[str],
    elsewhere: Mapping[str, tuple[Any, str]],
) -> dict[str, Any]:
    """The entries that have an effect; raises for a name or a behaviour that there is not."""
    for name, value in given.items():
        if name not in known:
            close = difflib.get_close_matches(str(name), known, n=1, cutoff=0.0)
            raise TypeError(f"{where}: unknown option {name!r}; the nearest known is {close[0]!r}")
        if name in elsewhere:
            neutral, instead = elsewhere[name]
            value = tuple(value) if isinstance(value, list) else value
            if value is not None and value != neutral:
                raise ValueError(f"{where}: {name}={value!r} has no effect here: {instead}")
    return {name: value for name, value in given.items() if name not in elsewhere}


def _require_choice(owner: object, name: str, known: Sequence[str]) -> None:
    value = getattr(owner, name)
    if value not in known:
        raise ValueError(f"get_deq: {name} must be one of {', '.join(known)}; got {value!r}")


KNOWN = (*(field.name for field in dataclasses.fields(Options)), *_ELSEWHERE)
