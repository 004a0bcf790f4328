"""``diagnose``: measure f and every solver on it, and say what to write."""

from __future__ import annotations

import os
import textwrap
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from deqcore._module_buffers import ModuleBuffers
from deqcore._packing import Packing
from deqcore._random_numbers import RandomNumbers
from deqcore.diagnosis._findings import Finding, best_damping, find, recommend
from deqcore.diagnosis._probe import Facts, Probe
from deqcore.diagnosis._traces import Trace, traced
from deqcore.dropout import masks_of_solve, solve_of
from deqcore.regularizers import ritz_values
from deqcore.solvers import Anderson, Broyden, NewtonKrylov, Picard, Solver

WIDTH = 96  # of the report


@dataclass(frozen=True, eq=False)
class Diagnosis:
    """What ``diagnose`` found; ``print`` it, or ``save`` it as a picture.

    Attributes:
        rows, dim: of the state as it was given: B problems of D elements.
        dtype, device: of the state.
        facts: what single evaluations show.
        coupled_rows: rows of f(z) that depend on other rows of z; empty if none was seen.
        traces: one a solver, simplest first; coupled ones have one row.
        eigenvalues: of df/dz at the best point found, complex [B, m] on the CPU, those of large
            modulus first to settle; None where f has no gradient.
        findings: one for each thing that was looked at, in the order in which to mend them.
        advice: what to do, in plain words.
        solver: the one that is recommended.
        call: how to write it, with f, z0 and args by these names.
    """

    rows: int
    dim: int
    dtype: torch.dtype
    device: torch.device
    facts: Facts
    coupled_rows: tuple[int, ...]
    traces: tuple[Trace, ...]
    eigenvalues: Tensor | None
    findings: tuple[Finding, ...]
    advice: str
    solver: Solver
    call: str

    @property
    def radius(self) -> Tensor | None:
        """[B], the spectral radius of df/dz at the best point found; None without a gradient."""
        return None if self.eigenvalues is None else self.eigenvalues.abs().amax(1)

    @property
    def floor(self) -> float:
        """The smallest relative residual that the coarsest dtype in f allows."""
        return self.facts.epsilon

    @property
    def ok(self) -> bool:
        """Whether there is nothing to mend."""
        return all(finding.ok for finding in self.findings)

    def __getitem__(self, name: str) -> Finding:
        """The finding of that name."""
        found = {finding.name: finding for finding in self.findings}
        if name not in found:
            raise KeyError(f"no finding {name!r}; there are {', '.join(found)}")
        return found[name]

    @property
    def title(self) -> str:
        """What was diagnosed, in a line."""
        dtype = str(self.dtype).removeprefix("torch.")
        rows = "1 row" if self.rows == 1 else f"{self.rows} rows"
        return f"{rows} of {self.dim}, {dtype} on {self.device}"

    def __str__(self) -> str:
        lines = [f"deqcore.diagnose: {self.title}", ""]
        width = max(len(trace.name) for trace in self.traces)
        lines.append(f"  {'solver':{width}}  {'rows':>9}  {'calls of f':>10}  {'residual':>8}")
        for trace in self.traces:
            rows = f"{trace.converged} of {len(trace.residual)}"
            calls = trace.evaluations or "-"
            lines.append(f"  {trace.name:{width}}  {rows:>9}  {calls:>10}  {trace.best:8.1e}")
        lines.append("")
        for finding in self.findings:
            head = f"  {'ok' if finding.ok else '!!'}  {finding.name:12} "
            lines += textwrap.wrap(
                finding.text, WIDTH, initial_indent=head, subsequent_indent=" " * len(head)
            )
        lines += ["", *textwrap.wrap(self.advice, WIDTH), f"    {self.call}"]
        return "\n".join(lines)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Draw the traces, the tolerance, the findings and the advice into a PNG.

        Raises:
            ImportError: without matplotlib, which is not a requirement of deqcore.
        """
        try:
            from deqcore.diagnosis._picture import draw
        except ImportError as error:
            raise ImportError(
                f"Diagnosis.save needs matplotlib ({error}): pip install 'deqcore[plot]', or print "
                "the diagnosis, which needs nothing"
            ) from error
        draw(self, path)


def diagnose(
    f: Callable[..., Any],
    z0: Any,
    *args: Any,
    rtol: float | None = None,
    atol: float = 1e-6,
    max_steps: int = 100,
    krylov: int = 20,
    batch: Literal["rows", "coupled"] = "rows",
) -> Diagnosis:
    """Try every solver on z = f(z, *args), look for what is wrong with f, and say what to write.

    Nothing is changed: random numbers go on from where they were, buffers of f's modules are put
    back, parameters get no gradients. What f itself keeps elsewhere is its own.

    Looked for: writes into z; randomness, or a state that changes in each call; rows that depend on
    each other; NaN at the start; a graph that autograd loses; the spectral radius of df/dz at the
    best point found, and the damping that suits its eigenvalues; the dtypes that f computes in,
    which bound what any tolerance can ask for.

    Args:
        f, z0, *args: as for ``deqcore.fixed_point``; at least one row and one element.
        rtol, atol: the tolerance that is wanted; defaults as for ``deqcore.Solver``. Not both
            may be 0.
        max_steps: calls of f for each solver. Each goes on below the tolerance, until it makes no
            more progress.
        krylov: vector-Jacobian products for the eigenvalues, at most D are used.
        batch: ``"rows"`` looks for rows that depend on each other, and takes the batch as one
            problem if there are any; ``"coupled"`` does so without looking.

    Returns:
        A ``Diagnosis``: text by ``print``, a PNG by its ``save``.

    Raises:
        TypeError, ValueError: as ``deqcore.fixed_point`` does, and for options out of range.

    All costs some 5 * max_steps + krylov + 4 * log2(B) calls of f.
    """
    if not callable(f):
        raise TypeError(f"f: expected a callable, got {type(f).__name__}")
    packing = Packing.of(z0, batch)
    if not packing.batch * packing.dim:
        raise ValueError("z0: expected at least one row of one element, got an empty state")
    wanted = Picard(rtol=rtol, atol=atol, max_steps=max_steps)  # or an error naming the option
    if not atol and rtol == 0:
        raise ValueError("rtol, atol: expected one of them above 0, got 0 for both")
    numbers = RandomNumbers(pytree.tree_leaves(z0)[0])
    try:
        with torch.inference_mode(False), solve_of(masks_of_solve()):  # one f for all solvers
            z0, args = pytree.tree_map(_usable, (z0, args))
            return _Session(f, args, packing, numbers, wanted).run(z0, max_steps, krylov)
    finally:
        numbers.put_back()


def _usable(leaf: Any) -> Any:
    if not isinstance(leaf, Tensor):
        return leaf
    return leaf.clone() if leaf.is_inference() else leaf.detach()


class _Session:
    """The measurements of one diagnosis."""

    def __init__(
        self,
        f: Callable[..., Any],
        args: tuple[Any, ...],
        packing: Packing,
        numbers: RandomNumbers,
        wanted: Solver,
    ) -> None:
        self.f, self.args, self.given, self.numbers = f, args, packing, numbers
        self.packing, self.wanted = packing, wanted
        self.written = {} if wanted.rtol is None else {"rtol": wanted.rtol}
        if wanted.atol != Picard().atol:
            self.written["atol"] = wanted.atol

    def run(self, z0: Any, max_steps: int, krylov: int) -> Diagnosis:
        start = self.given.pack(z0, "z0")
        probe = Probe(self.f, self.args, self.given, self.numbers)
        facts = probe.facts(start)
        if facts.writes:
            f = self.f
            self.f = lambda z, *args: f(pytree.tree_map(torch.clone, z), *args)
        solvers = _solvers(max_steps)
        coupled = probe.coupled_rows(start, facts.epsilon)
        traces = None if coupled else self._traces(z0, solvers)
        if traces is not None:
            coupled = probe.coupled_rows(_best(traces).value, facts.epsilon)
        if coupled or traces is None:
            self.packing = Packing.of(z0, "coupled")
            traces = self._traces(z0, solvers)
        values, why_none = self._eigenvalues(_best(traces).value, krylov, facts)
        damping = None if values is None else best_damping(values)
        if damping is not None:
            damped = Picard(damping=damping, rtol=0.0, atol=0.0, max_steps=max_steps)
            traces[1:1] = self._traces(z0, [damped])
        asked = self.given.coupled
        findings = find(facts, self.given, coupled, asked, values, why_none, traces)
        advice, solver, chosen = recommend(facts, traces, values, self.written)
        batch = ", batch='coupled'" if self.packing.coupled else ""
        more = ", *args" if self.args else ""
        return Diagnosis(
            rows=self.given.batch,
            dim=self.given.dim,
            dtype=self.given.dtype,
            device=self.given.device,
            facts=facts,
            coupled_rows=coupled,
            traces=tuple(traces),
            eigenvalues=values,
            findings=findings,
            advice=advice,
            solver=chosen.solver,
            call=f"deqcore.fixed_point(f, z0{more}, solver=deqcore.{solver}{batch})",
        )

    def _traces(self, z0: Any, solvers: list[Solver]) -> list[Trace]:
        one = (self.f, self.packing.pack(z0, "z0"), self.args, self.packing)
        return [traced(*one, solver, self.wanted) for solver in solvers]

    def _eigenvalues(self, z: Tensor, krylov: int, facts: Facts) -> tuple[Tensor | None, str]:
        """(eigenvalues, "") or (None, why the gradient raises)."""
        if facts.detached:
            return None, ""
        self.numbers.put_back()
        batch: Literal["rows", "coupled"] = "coupled" if self.packing.coupled else "rows"
        state = self.packing.unpack(z)
        generator = torch.Generator().manual_seed(0)
        try:
            with ModuleBuffers().unchanged():
                values = ritz_values(self.f, state, self.args, krylov, generator, batch)
        except RuntimeError as error:
            return None, textwrap.shorten(f"{type(error).__name__}: {error}", 150)
        return values.cpu(), ""


def _solvers(max_steps: int) -> list[Solver]:
    """Simplest first, with tolerances that end nothing."""
    limits: dict[str, Any] = {"rtol": 0.0, "atol": 0.0, "max_steps": max_steps}
    krylov = NewtonKrylov(**limits, patience=max_steps)
    return [Picard(**limits), Anderson(**limits), Broyden(**limits), krylov]


def _best(traces: list[Trace]) -> Trace:
    return min(traces, key=lambda trace: trace.best)
