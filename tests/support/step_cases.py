"""One step of a solver as a test case: arguments in any reachable state, and what may be compared.

``case.op(*case.args)`` and ``case.reference(*case.args)`` have the same signature and change their
arguments in place. Everything that a step must not read is NaN.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from deqcore.ops import anderson_step, broyden_step
from deqcore.ops._library import pack_numbers
from deqcore.ops._rows import (
    ACTIVE,
    BEST,
    BEST_STEP,
    COUNTERS,
    FALLBACK_STEP,
    FIRST,
    HISTORY,
    LAST_MIXED,
    LATEST,
    MIXED,
    REST,
    RETREAT_STEP,
    STEPS,
    Limits,
    Rows,
)
from tests.support.problems import generator

NAN = float("nan")
ROW_FIELDS = ("status", "counters", "residuals", "remaining")
OUTPUTS = ("x_next", "z_next")
ANDERSON = ("x", "f", "damping", "g_ring", "h_ring", "gram", "best", *ROW_FIELDS, *OUTPUTS)
BROYDEN = ("x", "f", "damping", "s_ring", "gram", "best", *ROW_FIELDS, *OUTPUTS)


@dataclasses.dataclass
class StepCase:
    """Arguments of a step op: tensors and numbers, by name."""

    op: Any  # torch.ops.deqcore.X, or another callable of the same arguments
    reference: Callable[..., None]
    used_gram: Callable[[dict[str, Tensor]], Tensor]
    tensors: dict[str, Tensor]
    numbers_of: Any  # the NamedTuple of the op's numbers
    options: dict[str, Any]

    @property
    def args(self) -> tuple[Any, ...]:
        return (*self.tensors.values(), self.numbers)

    @property
    def numbers(self) -> Tensor:
        limits = Limits(**{name: self.options[name] for name in Limits._fields})
        own = {name: value for name, value in self.options.items() if name not in Limits._fields}
        return pack_numbers(self.numbers_of(limits=limits, **own))

    def run(self, step: Callable[..., None]) -> dict[str, Tensor]:
        """Results of a step on copies of the tensors, by name."""
        tensors = {name: tensor.clone() for name, tensor in self.tensors.items()}
        with torch.no_grad():
            step(*tensors.values(), self.numbers)
        return tensors

    def in_float64(self) -> StepCase:
        """The same inputs, exactly, with a state in float64; f keeps its dtype, which rounds x."""
        keep = {"f", "z_next", *ROW_FIELDS} if self.tensors["z_next"].shape[1] else {*ROW_FIELDS}
        wide = {n: t if n in keep else t.double() for n, t in self.tensors.items()}
        return dataclasses.replace(self, tensors=wide)

    def with_tensors(self, **changed: Tensor) -> StepCase:
        return dataclasses.replace(self, tensors={**self.tensors, **changed})

    def with_columns(self, order: Tensor) -> StepCase:
        """The same problem with its D elements in another order: it changes roundings alone."""
        dim = len(order)
        wide = {"x", "f", "g_ring", "h_ring", "s_ring", "best", *OUTPUTS}
        moved = {
            n: t[..., order] if n in wide and t.shape[-1] == dim else t
            for n, t in self.tensors.items()
        }
        return dataclasses.replace(self, tensors=moved)

    def to(self, device: torch.device) -> StepCase:
        return dataclasses.replace(self, tensors={n: t.to(device) for n, t in self.tensors.items()})


def anderson_used(tensors: dict[str, Tensor]) -> Tensor:
    """[B, M, M]: the entries of the Gram matrix that may still be read."""
    counters, memory = tensors["counters"], tensors["gram"].shape[1]
    held = ring_steps(counters, memory)
    steps, history = counters[:, STEPS, None], counters[:, HISTORY, None]
    used = (held > steps - history) & (held > 0)
    return used[:, :, None] & used[:, None, :]


def broyden_used(tensors: dict[str, Tensor]) -> Tensor:
    """Entries of the Gram matrix of all stored steps but the newest, which has yet to enter."""
    known = torch.arange(tensors["gram"].shape[1]) < tensors["counters"][:, HISTORY, None] - 1
    return known[:, :, None] & known[:, None, :]


def rows_in_any_state(batch: int, memory: int, seed: int) -> Rows:
    """Active rows with 0 to 3 * memory steps behind them, and rows that have ended in each way."""
    g = generator(seed)

    def integers(low: Tensor | int, high: Tensor | int) -> Tensor:  # inclusive
        low, high = torch.as_tensor(low), torch.as_tensor(high)
        share = torch.rand(batch, generator=g, dtype=torch.float64)
        return (low + (share * (high - low + 1)).floor()).int()

    steps = integers(0, 3 * memory) * integers(0, 9).clamp_max(1)  # one in ten has not begun
    best_step = integers(1, steps.clamp_min(1)).where(steps > 0, 0)
    history = integers(0, steps.clamp_max(memory))
    fallback = best_step * integers(0, 2).clamp_max(1)
    counters = torch.zeros(batch, COUNTERS, dtype=torch.int32)
    counters[:, STEPS], counters[:, HISTORY], counters[:, BEST_STEP] = steps, history, best_step
    counters[:, FALLBACK_STEP], counters[:, MIXED] = fallback, integers(0, history)
    # One row in three has retreated, lately or long ago, and may still have to rest.
    counters[:, RETREAT_STEP] = integers(0, steps) * (integers(0, 2) == 0)
    counters[:, REST] = integers(1, 9) * (counters[:, RETREAT_STEP] > 0)
    counters[:, LAST_MIXED] = integers(counters[:, RETREAT_STEP], (steps - 1).clamp_min(0))
    counters[:, LAST_MIXED] *= integers(0, 2).clamp_max(1)
    size = torch.rand(batch, 3, generator=g, dtype=torch.float64) + 0.1
    residuals = size.cumsum(1)[:, [1, 0, 2]]  # best <= latest <= first
    residuals[steps == 0] = torch.inf
    status = torch.where(integers(0, 4) == 0, integers(0, 4), ACTIVE).to(torch.int8)
    counters[status != ACTIVE, MIXED] = 0
    assert (LATEST, BEST, FIRST) == (0, 1, 2)
    remaining = (status == ACTIVE).sum(dtype=torch.int32).reshape(1)
    return Rows(status, counters, residuals, remaining)


def evaluations(batch: int, dim: int, dtype: torch.dtype, seed: int) -> tuple[Tensor, Tensor]:
    """x and f(x): rows that go on, converge, diverge and meet NaN or inf."""
    g = generator(seed + 1)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    x = torch.randn(batch, dim, generator=g, dtype=torch.float64).to(wide)
    kind = torch.randint(0, 12, (batch,), generator=g)[:, None]
    size = torch.ones(batch, 1, dtype=torch.float64)
    for value, factor in {0: 0.0, 1: 1e-7, 2: 1e-2, 3: 10.0, 4: 3e4}.items():
        size = torch.where(kind == value, factor, size)
    noise = torch.randn(batch, dim, generator=g, dtype=torch.float64)
    f = (x.to(dtype).double() + size * noise).to(dtype)
    if dim:
        at = torch.randint(0, dim, (batch,), generator=g)
        for value, bad in {5: NAN, 6: torch.inf}.items():
            chosen = (kind[:, 0] == value).nonzero().flatten()
            f[chosen, at[chosen]] = bad
    return x, f


def outputs(x: Tensor, f: Tensor) -> dict[str, Tensor]:
    z_next = torch.empty_like(f) if f.dtype != x.dtype else x.new_empty(len(x), 0)
    return {"x_next": torch.full_like(x, NAN), "z_next": z_next.fill_(NAN)}


def damping_table(length: int, seed: int) -> Tensor:
    return 0.1 + 1.8 * torch.rand(length, generator=generator(seed + 2), dtype=torch.float64)


def ring_steps(counters: Tensor, memory: int) -> Tensor:
    """[B, M]: the step whose residual each ring slot holds; 0 or less where there is none."""
    steps = counters[:, STEPS, None].long()
    slots = torch.arange(memory)
    return steps - (steps - 1 - slots) % memory


def anderson_case(
    batch: int, dim: int, memory: int, dtype: torch.dtype, seed: int, **options: float
) -> StepCase:
    g = generator(seed + 3)
    rows = rows_in_any_state(batch, memory, seed)
    rows.counters[rows.status != ACTIVE, HISTORY] = 0
    x, f = evaluations(batch, dim, dtype, seed)
    held = ring_steps(rows.counters, memory)
    steps, history, best_step = (rows.counters[:, i, None] for i in (STEPS, HISTORY, BEST_STEP))
    used = (held > steps - history) & (held > 0)
    frozen = (rows.status != ACTIVE)[:, None]
    kept = (used | ((held == best_step) & (best_step > 0))) & ~frozen

    g_ring = torch.randn(batch, memory, dim, generator=g, dtype=torch.float64).to(x.dtype)
    h_ring = torch.randn(batch, memory, dim, generator=g, dtype=torch.float64).to(x.dtype)
    gram = g_ring.double() @ g_ring.double().mT
    g_ring[~kept] = h_ring[~kept] = NAN
    gram[~(used[:, :, None] & used[:, None, :])] = NAN
    best = torch.randn(batch, dim, generator=g, dtype=torch.float64).to(x.dtype)
    in_ring = (steps + 1 - best_step < memory) | (best_step == 0) | frozen
    best[in_ring[:, 0]] = NAN
    if in_ring.all() and seed % 2:
        best = best[:, :0]
    if seed % 3 == 0:  # nothing of a row that has ended may be read
        x[frozen[:, 0]] = NAN
    f[frozen[:, 0]] = NAN
    defaults = {
        "rtol": 1e-4, "atol": 1e-6, "patience": 25, "max_steps": 10_000, "ridge": 1e-8,
        "start": 0, "restart": 0, "safeguard": 2.0, "max_weight": 1e4,
    }  # fmt: skip
    tensors = (x, f, damping_table(1 + seed % 5, seed), g_ring, h_ring, gram, best, *rows)
    return StepCase(
        op=torch.ops.deqcore.anderson_step,
        reference=anderson_step.reference,
        used_gram=anderson_used,
        tensors=dict(zip(ANDERSON, (*tensors, *outputs(x, f).values()), strict=True)),
        numbers_of=anderson_step.AndersonNumbers,
        options={**defaults, **options},
    )


def broyden_case(
    batch: int,
    dim: int,
    memory: int,
    dtype: torch.dtype,
    seed: int,
    history_dtype: torch.dtype | None = None,
    **options: float,
) -> StepCase:
    g = generator(seed + 3)
    rows = rows_in_any_state(batch, memory, seed)
    x, f = evaluations(batch, dim, dtype, seed)
    count = rows.counters[:, HISTORY]
    frozen = rows.status != ACTIVE
    active_count = torch.where(frozen | (count >= memory), 0, count)
    least = min(memory, int(count.max()) if batch else 0)
    least = max(least, int(active_count.max()) + 1 if batch else 1)
    capacity = min(memory, least + seed % 3)

    # Steps that shrink, as those of a solve do: a row's inverse is then of moderate size.
    s_ring = torch.randn(batch, capacity, dim, generator=g, dtype=torch.float64)
    s_ring = (s_ring * 0.7 ** torch.arange(capacity)[:, None]).to(history_dtype or x.dtype)
    gram = s_ring.double() @ s_ring.double().mT
    known = torch.arange(capacity) < (count - 1)[:, None]  # the newest step has yet to enter
    gram[~(known[:, :, None] & known[:, None, :])] = NAN
    stored = (torch.arange(capacity) < count[:, None]) & ~frozen[:, None]
    s_ring[~stored] = NAN
    best = torch.randn(batch, dim, generator=g, dtype=torch.float64).to(x.dtype)
    best[rows.counters[:, BEST_STEP] == 0] = NAN
    if seed % 3 == 0:
        x[frozen] = NAN
    f[frozen] = NAN
    defaults = {"rtol": 1e-4, "atol": 1e-6, "patience": 25, "max_steps": 10_000}
    tensors = (x, f, damping_table(1 + seed % 5, seed), s_ring, gram, best, *rows)
    return StepCase(
        op=torch.ops.deqcore.broyden_step,
        reference=broyden_step.reference,
        used_gram=broyden_used,
        tensors=dict(zip(BROYDEN, (*tensors, *outputs(x, f).values()), strict=True)),
        numbers_of=broyden_step.BroydenNumbers,
        options={**defaults, **options, "memory": memory},
    )


def full_rows(case: StepCase, history: int) -> StepCase:
    """All rows active, with `history` slots in use, and none that ends or evicts its best."""
    tensors = {n: t.clone() for n, t in case.tensors.items()}
    tensors["status"].fill_(ACTIVE)
    tensors["remaining"].fill_(len(tensors["status"]))
    tensors["residuals"].fill_(100.0)
    tensors["residuals"][:, BEST] = 90.0
    counters = tensors["counters"].zero_()
    counters[:, STEPS] = counters[:, BEST_STEP] = 3 * 64  # the best is the newest
    counters[:, HISTORY], counters[:, MIXED] = history, 1
    x = torch.randn_like(tensors["x"])
    tensors["x"], tensors["f"] = x, (x + torch.randn_like(x)).to(tensors["f"].dtype)
    for ring in ("g_ring", "h_ring", "s_ring"):
        if ring in tensors:
            tensors[ring] = torch.randn_like(tensors[ring])
    steps = tensors["g_ring" if "g_ring" in tensors else "s_ring"].double()
    tensors["gram"] = steps @ steps.mT
    return case.with_tensors(**tensors)
