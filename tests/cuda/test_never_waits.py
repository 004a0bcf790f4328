"""A fixed-step solve asks nothing of the GPU: shown on tensors that have no data at all."""

from __future__ import annotations

import pytest
import torch
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

import deqcore

pytestmark = pytest.mark.skipif(
    torch.version.cuda is None, reason="this torch knows no CUDA device, not even without data"
)
SOLVERS = [
    deqcore.Picard(check_every=0, max_steps=7),
    deqcore.Anderson(check_every=0, max_steps=7, memory=3),
    deqcore.Broyden(check_every=0, max_steps=12),
]


class Copies(TorchDispatchMode):
    """Notes copies between devices that make the host wait.

    Reading a value from the device needs no note: a tensor without data raises by itself.
    """

    def __init__(self) -> None:
        super().__init__()
        self.waiting: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        tensors = [t for t in pytree.tree_leaves((args, out)) if isinstance(t, torch.Tensor)]
        if len({t.device.type for t in tensors}) > 1 and "copy" in str(func):
            asynchronous = kwargs.get("non_blocking") or (len(args) > 2 and args[2])
            if not asynchronous:
                self.waiting.append(str(func))
        return out


@pytest.mark.parametrize("solver", SOLVERS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_fixed_step_solve_reads_nothing_back_and_copies_nothing_in(solver, dtype):
    with FakeTensorMode(), Copies() as copies, torch.no_grad():
        shift = torch.empty(4, 33, device="cuda", dtype=dtype)
        z0 = torch.empty(4, 33, device="cuda", dtype=dtype)
        solution = deqcore.fixed_point(lambda z: 0.5 * z.cos() + shift, z0, solver=solver)
        assert solution.value.device.type == "cuda"
        assert solution.evaluations == solver.max_steps
    assert copies.waiting == []


def test_the_check_would_see_a_value_that_is_read_back():
    with FakeTensorMode(), pytest.raises(DataDependentOutputException):
        torch.empty(1, device="cuda").item()


def test_the_check_would_see_a_copy_that_waits():
    with FakeTensorMode(), Copies() as copies:
        torch.empty(3).to("cuda")
        torch.empty(3).to("cuda", non_blocking=True)
    assert len(copies.waiting) == 1
