"""From measurements to words: what is wrong with f, which solver to take, and the call."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from deqcore._packing import Packing
from deqcore.diagnosis._probe import Facts
from deqcore.diagnosis._traces import Trace, written

ROOM = 2  # times the evaluations that were needed, in the max_steps that is advised
SIMPLER = 1.2  # a simpler solver is preferred while it takes no more than this times the calls
DAMPINGS = [d / 20 for d in range(1, 31)]  # that are tried on the eigenvalues
WORTH = 0.8  # damping is advised where it makes this of a rate's exponent, or better


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at.

    Attributes:
        name: in a word or two.
        ok: nothing to do about it.
        text: a sentence or two.
    """

    name: str
    ok: bool
    text: str


def rate(values: Tensor, damping: float = 1.0) -> float:
    """By what plain damped steps multiply the residual near the end point, in the slowest row.

    ``values`` are the eigenvalues of each row's Jacobian, complex [B, m].
    """
    return (1 - damping + damping * values).abs().amax().item()


def best_damping(values: Tensor) -> float | None:
    """Of plain iteration, for these eigenvalues; None where no damping changes much."""
    plain = rate(values)
    if not math.isfinite(plain):
        return None
    found = min(DAMPINGS, key=lambda damping: rate(values, damping))
    damped = rate(values, found)
    if damped > 0.999 or damped == 0 == plain:
        return None
    worth = plain >= 1 or math.log(plain) > WORTH * math.log(max(damped, 1e-16))
    return found if worth else None


def find(
    facts: Facts,
    packing: Packing,
    coupled: Sequence[int],
    asked_coupled: bool,
    values: Tensor | None,
    why_none: str,
    traces: Sequence[Trace],
) -> tuple[Finding, ...]:
    """All findings, in the order in which to mend them."""
    return (
        _writes(facts),
        _repeatable(facts),
        _rows(packing, coupled, asked_coupled),
        _finite(facts, packing),
        _gradient(facts, why_none),
        _contraction(values, traces),
        _dtype(facts, packing, traces),
        _solvers(traces),
    )


def _writes(facts: Facts) -> Finding:
    if not facts.writes:
        return Finding("in place", True, "f leaves its argument as it is.")
    return Finding("in place", False,
        "f changes its argument in place, which is the solver's own iterate; a solve raises. "
        "Return a new tensor (z * 0.5, not z.mul_(0.5)), or start f with z = z.clone(). All else "
        "here was measured with a copy.")  # fmt: skip


def _repeatable(facts: Facts) -> Finding:
    if not facts.change:
        return Finding("repeatable", True, "Two evaluations at the same z agree.")
    who = f" ({', '.join(facts.suspects)} in training mode)" if facts.suspects else ""
    what = "draws random numbers" if facts.draws else "keeps a state that changes in each call"
    dropout = any("Dropout" in name for name in facts.suspects)
    cure = "take deqcore.FixedDropout" if dropout else "draw once for a whole solve (FixedDropout)"
    return Finding("repeatable", False,
        f"Two evaluations at the same z differ by {facts.change:.0e} of f(z): f {what}{who}. No "
        f"solver settles further. Call eval(), or {cure}.")  # fmt: skip


def _rows(packing: Packing, coupled: Sequence[int], asked: bool) -> Finding:
    if asked:
        return Finding("rows", True, "Taken as one problem, as asked (batch='coupled').")
    if packing.batch < 2 and not coupled:
        return Finding("rows", True, "One row, which has no others to depend on.")
    if not coupled:
        return Finding("rows", True, "Each row of f(z) depends on its own row of z alone.")
    return Finding("rows", False,
        f"{_named(coupled)} of f(z) changed when other rows of z did (batch norm in training "
        "mode, graphs, attention over the batch): batch='coupled' solves the whole batch as one "
        "problem, as was done below.")  # fmt: skip


def _finite(facts: Facts, packing: Packing) -> Finding:
    if not facts.nonfinite:
        return Finding("finite", True, "f(z0) is finite.")
    return Finding("finite", False,
        f"f(z0) holds NaN or inf in {_named(facts.nonfinite).lower()}: check the inputs and "
        "parameters there, or start elsewhere.")  # fmt: skip


def _gradient(facts: Facts, why_none: str) -> Finding:
    if facts.detached:
        return Finding("gradient", False,
            "f(z) depends on z, but autograd does not know it (detach, no_grad, .data or NumPy in "
            "f): gradients of a solve would be those of one evaluation.")  # fmt: skip
    if why_none:
        return Finding("gradient", False, f"The gradient of f raises {why_none}")
    return Finding("gradient", True, "Autograd follows f from z.")


def _contraction(values: Tensor | None, traces: Sequence[Trace]) -> Finding:
    if values is None:
        return Finding("contraction", True, "Not measured: it takes the gradient of f.")
    radius = rate(values, 1.0)
    converged = any(trace.evaluations for trace in traces)
    where = "the solution" if converged else "the best point found, which is no solution"
    text = f"Spectral radius of df/dz at {where}: {radius:.3g}"
    if math.isnan(radius):
        return Finding("contraction", False, f"{text}; the Jacobian holds NaN or inf.")
    if radius < 1:
        digits = -math.log10(max(radius, 1e-16))
        pace = f"a digit in {math.ceil(1 / digits)} calls" if digits < 1 else "a digit a call"
        return Finding("contraction", True, f"{text}; plain steps gain {pace}.")
    damping = best_damping(values)
    cure = (
        "no damping changes that (an eigenvalue near or above 1)"
        if damping is None
        else f"damping={damping:g} makes that {rate(values, damping):.3g}"
    )
    return Finding("contraction", False, f"{text}: plain steps move away from it; {cure}.")


def _dtype(facts: Facts, packing: Packing, traces: Sequence[Trace]) -> Finding:
    floor, demand = facts.epsilon, min(trace.demand for trace in traces)
    coarse = max(facts.dtypes, key=lambda dtype: torch.finfo(dtype).eps)
    inside = "" if coarse in packing.dtypes else f", of a {_short(packing.dtype)} state"
    best = min(trace.best for trace in traces)
    text = (
        f"f computes in {_short(coarse)}{inside}: relative residuals below {floor:.1e} are "
        f"rounding; the smallest here is {best:.1e}, and the tolerance asks for {demand:.1e}."
    )
    ok = demand >= floor
    more = "" if ok else " Loosen rtol, or compute in a wider dtype."
    return Finding("dtype", ok, text + more)


def _solvers(traces: Sequence[Trace]) -> Finding:
    done = [trace.name for trace in traces if trace.evaluations]
    if done:
        return Finding("solvers", True, f"{len(done)} of {len(traces)} reach the tolerance.")
    calls = max(len(trace.worst) for trace in traces)
    return Finding("solvers", False, f"None reaches the tolerance in up to {calls} calls of f.")


def _named(rows: Sequence[int]) -> str:
    if len(rows) == 1:
        return f"Row {rows[0]}"
    return f"Rows {', '.join(map(str, rows[:8]))}{', ...' if len(rows) > 8 else ''}"


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def recommend(
    facts: Facts, traces: Sequence[Trace], values: Tensor | None, limits: dict[str, float]
) -> tuple[str, str, Trace]:
    """(advice in plain words, solver as it is to be written, its trace).

    ``limits`` are the tolerances that were asked for and are not defaults. Simpler solvers come
    first in ``traces``.
    """
    limits = dict(limits)
    done = [(trace.evaluations, trace) for trace in traces if trace.evaluations]
    if done:
        fewest = min(needed for needed, _ in done)
        needed, chosen = next(one for one in done if one[0] <= SIMPLER * fewest)
        advice = f"{chosen.name} reaches the tolerance in {needed} calls of f"
        plain = traces[0].evaluations
        if chosen is traces[0]:
            advice += "; acceleration would gain nothing to speak of."
        else:
            takes = f"takes {plain}" if plain else "does not reach it"
            advice += f", where plain iteration {takes}."
        return advice, written(chosen.solver, **limits | _room(chosen, needed)), chosen
    chosen = min(traces, key=lambda trace: trace.best)
    reach = f"{chosen.name} comes nearest, to {chosen.best:.1e}"
    if facts.nonfinite:
        advice = "Mend f(z0) first: no solver can start from NaN or inf."
    elif facts.change:
        advice = f"Make f repeatable first: {reach}, and that is noise."
    elif chosen.best <= 100 * facts.epsilon:
        reached = 2 * chosen.best * chosen.demand / chosen.tolerance
        limits["atol" if limits.get("rtol") == 0 else "rtol"] = _rounded_up(reached)
        advice = (
            f"The tolerance is below what the dtype allows: {reach}, in {len(chosen.worst)} calls. "
            "Ask for that, or compute in a wider dtype."
        )
        limits |= _room(chosen, int((chosen.worst <= 2 * chosen.best).nonzero()[0]) + 1)
    elif values is not None and rate(values) < 1 and chosen.worst[-1] < 0.5 * chosen.worst[0]:
        calls = _calls_missing(chosen)
        limits |= _room(chosen, len(chosen.worst) + calls)
        advice = f"It converges, but slowly: {reach}, and needs some {calls} calls more."
    else:
        advice = (
            f"No solver settles: {reach}. Bound f's Lipschitz constant (deqcore.normalization, "
            "deqcore.jacobian_penalty in training), or start nearer to the solution."
        )
        limits |= _room(chosen, len(chosen.worst))
    return advice, written(chosen.solver, **limits), chosen


def _room(trace: Trace, needed: int) -> dict[str, int]:
    """max_steps for as many calls, where the default is too small."""
    default = type(trace.solver)().max_steps
    steps = 10 * math.ceil(ROOM * needed / 10)
    return {"max_steps": steps} if needed and ROOM * needed > default else {}


def _calls_missing(trace: Trace) -> int:
    """Until the tolerance is met at the pace of the second half."""
    worst, half = trace.worst, len(trace.worst) // 2
    gained = math.log((worst[half] / worst[-1]).item()) / max(len(worst) - half, 1)
    missing = math.log(worst[-1].item() / trace.tolerance)
    return math.ceil(missing / gained) if gained > 0 else len(worst)


def _rounded_up(value: float) -> float:
    """To one digit."""
    unit = 10.0 ** math.floor(math.log10(value))
    return float(f"{math.ceil(value / unit) * unit:.0e}")
