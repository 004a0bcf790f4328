"""What each op refuses: a call that it must not carry out, and all that it says."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from deqcore.ops._rows import ACTIVE, HISTORY, REST, RETREAT_STEP
from tests.support.masked_cases import arguments, make
from tests.support.step_cases import StepCase, anderson_case, broyden_case

Change = Callable[[Tensor], Any]


@dataclasses.dataclass(frozen=True)
class Refusal:
    """An op, arguments that it refuses, and the message."""

    op: str
    args: tuple[Any, ...]
    message: str

    def __str__(self) -> str:
        return f"{self.op}: {self.message}"

    def args_on(self, device: torch.device) -> list[Any]:
        """All but a step's numbers, the last one, are on the device."""
        moved = [_on(device, a) if isinstance(a, Tensor) else a for a in self.args]
        return [*moved[:-1], self.args[-1]] if self.op.endswith("_step") else moved

    @property
    def pattern(self) -> str:
        """Matches the whole message: one that ends at its first number is not it."""
        return f"^{re.escape(self.message)}$"


def _on(device: torch.device, t: Tensor) -> Tensor:
    """With the strides that it has: one that is not contiguous must not become so."""
    return torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device=device).copy_(t)


def _transposed(t: Tensor) -> Tensor:
    return t.t().contiguous().t()


# Of the steps of 3 rows of 5 elements, in float32: an argument, what is done to it, what is said.
_ROWS: list[tuple[str, Change, str]] = [
    ("x", lambda t: t[0], "x: expected (batch, dim), got (5)"),
    ("x", Tensor.double, "x: expected dtype float32, got float64"),
    ("x", _transposed, "x: expected a contiguous tensor"),
    ("f", Tensor.int, "f: expected float64, float32, bfloat16 or float16, got int32"),
    ("f", lambda t: t[:, :4].clone(), "f: expected shape (3, 5), got (3, 4)"),
    ("f", lambda t: t[0], "f: expected shape (3, 5), got (5)"),
    ("damping", lambda t: t[0], "damping: expected (steps), got ()"),
    ("damping", lambda t: t[:0], "damping: expected at least one entry"),
    ("damping", Tensor.float, "damping: expected dtype float64, got float32"),
    ("gram", Tensor.half, "gram: expected dtype float64, got float16"),
    ("status", Tensor.int, "status: expected dtype int8, got int32"),
    ("status", Tensor.byte, "status: expected dtype int8, got uint8"),
    ("status", lambda t: t[:2], "status: expected shape (3), got (2)"),
    ("counters", lambda t: t[:, :5].clone(), "counters: expected shape (3, 8), got (3, 5)"),
    ("counters", Tensor.long, "counters: expected dtype int32, got int64"),
    ("residuals", Tensor.bfloat16, "residuals: expected dtype float64, got bfloat16"),
    ("remaining", Tensor.bool, "remaining: expected dtype int32, got another one"),
    ("remaining", lambda t: t[0], "remaining: expected shape (1), got ()"),
    ("x_next", lambda t: t[:, :2].clone(), "x_next: expected shape (3, 5), got (3, 2)"),
    ("options", lambda t: t[1:], "options: expected shape ({n}), got ({less})"),
    ("options", Tensor.float, "options: expected dtype float64, got float32"),
]
_ANDERSON: list[tuple[str, Change, str]] = [
    ("g_ring", lambda t: t[0], "g_ring: expected (batch, memory, dim), got (4, 5)"),
    ("g_ring", lambda t: t[:, :0], "g_ring: expected a memory of 1 to 64, got 0"),
    ("g_ring", lambda t: t.new_zeros(3, 65, 5), "g_ring: expected a memory of 1 to 64, got 65"),
    ("h_ring", lambda t: t[:, :3].clone(), "h_ring: expected shape (3, 4, 5), got (3, 3, 5)"),
    ("gram", lambda t: t[:, :3].clone(), "gram: expected shape (3, 4, 4), got (3, 3, 4)"),
    ("best", lambda t: t.new_zeros(3, 2), "best: expected shape (3, 5), got (3, 2)"),
    ("best", lambda t: t.new_zeros(2, 0), "best: expected shape (3, 0), got (2, 0)"),
]
_BROYDEN: list[tuple[str, Change, str]] = [
    ("s_ring", lambda t: t[0], "s_ring: expected (batch, capacity, dim), got (4, 5)"),
    ("s_ring", lambda t: t[:, :0], "s_ring: expected a capacity of 1 to 4 steps, got 0"),
    (
        "s_ring",
        lambda t: t.new_zeros(3, 5, 5),
        "s_ring: expected a capacity of 1 to 4 steps, got 5",
    ),
    ("s_ring", Tensor.half, "s_ring: expected dtype float32, got float16"),
    ("options", lambda t: t + torch.eye(len(t))[-1] * 61, "memory: expected 1 to 64, got 65"),
    ("gram", lambda t: t[:, :3].clone(), "gram: expected shape (3, 4, 4), got (3, 3, 4)"),
    ("best", lambda t: t.new_zeros(3, 0), "best: expected shape (3, 5), got (3, 0)"),
]


def step_cases(dtype: torch.dtype = torch.float32) -> dict[str, StepCase]:
    return {
        "anderson_step": anderson_case(3, 5, 4, dtype, seed=1),
        "broyden_step": _with_capacity(broyden_case(3, 5, 4, dtype, seed=1), 4),
    }


def _with_capacity(case: StepCase, capacity: int) -> StepCase:
    ring, gram = case.tensors["s_ring"], case.tensors["gram"]
    return case.with_tensors(
        s_ring=ring.new_zeros(3, capacity, 5), gram=gram.new_zeros(3, capacity, capacity)
    )


def steps() -> list[Refusal]:
    """Of anderson_step and broyden_step."""
    found = []
    for op, own in (("anderson_step", _ANDERSON), ("broyden_step", _BROYDEN)):
        case = step_cases()[op]
        numbers = len(case.numbers)
        for name, change, message in [*_ROWS, *own]:
            named = {**case.tensors, "options": case.numbers}
            named[name] = change(named[name])
            text = message.format(n=numbers, less=numbers - 1)
            found.append(Refusal(op, tuple(named.values()), text))
        half = step_cases(torch.bfloat16)[op]
        z_next = half.tensors["z_next"].float()
        text = "z_next: expected dtype bfloat16, got float32"
        found.append(Refusal(op, half.with_tensors(z_next=z_next).args, text))
    wide = step_cases(torch.float64)["broyden_step"]
    narrow = wide.with_tensors(s_ring=wide.tensors["s_ring"].bfloat16())
    text = "s_ring: a bfloat16 history needs a float32 x"
    return [*found, Refusal("broyden_step", narrow.args, text)]


def products() -> list[Refusal]:
    """Of the masked products with a 16 x 32 weight that keeps 256 entries, for 5 tokens."""
    case = make(16, 32, 5, 0.5).to(torch.float32)
    x, values, bias, grad, indices = (
        case.x, case.values, case.bias, case.grad, case.pattern.indices,
    )  # fmt: skip
    found: list[tuple[str, int, Any, str]] = [  # of what, which argument, as what, the message
        ("forward", 0, x[:, :31], "x: expected (tokens, 32), got (5, 31)"),
        ("forward", 0, x[0], "x: expected (tokens, 32), got (32)"),
        ("forward", 0, x.double(), "x: expected dtype float32, got float64"),
        ("forward", 1, values.long(), f"values: expected {_FLOATS}, got int64"),
        ("forward", 1, values[None], "values: expected (kept), got (1, 256)"),
        ("forward", 1, values[1:], _pattern(255, got=818)),
        ("forward", 2, indices.long(), _pattern(256, got=818)),
        ("forward", 2, indices[None], _pattern(256, got=818)),
        ("forward", 2, indices.repeat_interleave(2)[::2], _pattern(256, got=818)),
        ("forward", 3, bias[:9], "bias: expected shape (16), got (9)"),
        ("forward", 3, bias.double(), "bias: expected dtype float32, got float64"),
        ("forward", 6, 24, "block: expected 1, 16, 32 or 64, got 24"),
        ("forward", 6, 64, "block: 64 does not divide a 16 x 32 weight"),
        ("input gradient", 0, x, "x: expected (tokens, 16), got (5, 32)"),
        ("values' gradient", 0, grad.long(), f"left: expected {_FLOATS}, got int64"),
        ("values' gradient", 0, x, "left: expected (tokens, 16), got (5, 32)"),
        ("values' gradient", 1, grad, "right: expected (tokens, 32), got (5, 16)"),
        ("values' gradient", 1, x[:4], "right: expected 5 tokens like left, got 4"),
        ("values' gradient", 1, x.half(), "right: expected dtype float32, got float16"),
        ("values' gradient", 2, indices[:-1], _pattern(255, got=817)),
        ("values' gradient", 5, 32, "block: 32 does not divide a 16 x 32 weight"),
    ]
    return [_refusal(*arguments(name, case), *change) for name, *change in found]


def dense_weights() -> list[Refusal]:
    """Of masked_to_dense and masked_from_dense of that weight."""
    case = make(16, 32, 5, 0.5).to(torch.float32)
    indices, values, weight = case.pattern.indices, case.values, case.weight
    to_dense = ("masked_to_dense", (values, indices, 16, 32))
    from_dense = ("masked_from_dense", (weight, indices))
    return [
        _refusal(*to_dense, 0, values.int(), f"values: expected {_FLOATS}, got int32"),
        _refusal(*to_dense, 0, values[None], "values: expected (kept), got (1, 256)"),
        _refusal(*to_dense, 0, values[1:], _pattern(255, got=818)),
        _refusal(*from_dense, 0, weight.int(), f"dense: expected {_FLOATS}, got int32"),
        _refusal(*from_dense, 0, weight[0], "dense: expected (rows, columns), got (32)"),
        _refusal(*from_dense, 1, indices[:-1], _pattern(255, got=817)),
    ]


def on_the_cpu_alone() -> list[Refusal]:
    """Of masked_expand, and of broyden_step what a GPU would have to be waited for."""
    case = make(16, 32, 5, 0.5).to(torch.float32)
    words = torch.zeros(64, dtype=torch.uint8)
    expand = ("masked_expand", (case.values, words, case.pattern.indices, 16, 32))
    text = "words: expected a contiguous uint8 tensor of 64 entries, got {}"
    full = _with_capacity(step_cases()["broyden_step"], 2)
    full.tensors["status"][:] = ACTIVE
    full.tensors["counters"][:, HISTORY] = 2
    full.tensors["counters"][:, [RETREAT_STEP, REST]] = 0
    room = "s_ring: a row has stored 2 steps and needs room for one more, got a capacity of 2"
    return [
        _refusal(*expand, 1, words[:-1], text.format(63)),
        _refusal(*expand, 1, words.int(), text.format(64)),
        Refusal("broyden_step", full.args, room),
    ]


_FLOATS = "float64, float32, bfloat16 or float16"


def _pattern(kept: int, got: int) -> str:
    return (
        f"pattern: expected a contiguous int32 tensor of {16 + 32 + 2 + 3 * kept} entries, for "
        f"{kept} values of a 16 x 32 weight; got {got}; use SparsityPattern"
    )


def _refusal(op: str, args: tuple[Any, ...], index: int, value: Any, message: str) -> Refusal:
    return Refusal(op, (*args[:index], value, *args[index + 1 :]), message)
