"""Shapes, strides, dtypes and structures of the state."""

from __future__ import annotations

import collections

import pytest
import torch

import deqcore
from deqcore import Anderson, Broyden, Implicit, Phantom, Picard, Status, Unrolled
from examples.own_solver import Aitken
from tests.support.problems import equal, rms

KINDS = [Picard, Anderson, Broyden, Aitken]
ADJOINTS = [Implicit(), Phantom(), Unrolled(), Unrolled(checkpoint_every=2)]


@pytest.fixture(params=KINDS, ids=lambda kind: kind.__name__)
def kind(request):
    return request.param


@pytest.fixture(params=ADJOINTS, ids=["Implicit", "Phantom", "Unrolled", "Unrolled-checkpointed"])
def adjoint(request):
    return request.param


def half_plus_one(z):
    return 0.5 * z + 1


@pytest.mark.parametrize("shape", [(0, 3), (0,), (0, 2, 4)])
@pytest.mark.parametrize("grad", [False, True])
def test_empty_batch_is_solved_and_has_gradients(kind, adjoint, shape, grad):
    z0 = torch.ones(shape)
    weight = torch.tensor(0.5, requires_grad=True)
    with torch.set_grad_enabled(grad):
        solver = kind(record_trace=True)
        solution = deqcore.fixed_point(lambda z: weight * z + 1, z0, solver=solver, adjoint=adjoint)
        assert solution.value.shape == shape
        assert solution.status.shape == solution.steps.shape == solution.residual.shape == (0,)
        assert solution.trace.shape[0] == 0
        solution.raise_for_status()
    if grad:
        solution.value.sum().backward()
        assert weight.grad == 0


@pytest.mark.parametrize("shape", [(2, 0), (1, 0, 5)])
def test_state_without_elements_converges_in_one_step(kind, adjoint, shape):
    solution = deqcore.fixed_point(half_plus_one, torch.ones(shape), solver=kind(), adjoint=adjoint)
    assert solution.value.shape == shape
    assert (solution.steps == 1).all()
    assert (solution.residual == 0).all()
    solution.raise_for_status()


@pytest.mark.parametrize("shape", [(1,), (5,), (1, 1), (5, 1), (1, 7), (2, 3, 4, 5)])
def test_any_shape_keeps_its_shape(kind, adjoint, shape):
    z0 = torch.randn(shape, dtype=torch.float64)
    solution = deqcore.fixed_point(half_plus_one, z0, solver=kind(), adjoint=adjoint)
    solution.raise_for_status()
    torch.testing.assert_close(solution.value, torch.full_like(z0, 2.0), rtol=1e-3, atol=1e-3)
    assert solution.status.shape == shape[:1]
    assert solution.status.dtype == torch.int8
    assert solution.steps.dtype == torch.int32


def test_scalar_start_is_one_row_and_stays_scalar(kind, adjoint):
    offset = torch.tensor(1.0, requires_grad=True)
    solution = deqcore.fixed_point(
        lambda z: 0.5 * z + offset, torch.tensor(0.0), solver=kind(), adjoint=adjoint
    )
    assert solution.value.shape == ()
    assert solution.status.shape == (1,)
    torch.testing.assert_close(solution.value.item(), 2.0, rtol=1e-3, atol=1e-3)
    solution.value.backward()
    assert offset.grad > 0


STRIDED_STARTS = {
    "transposed": lambda: torch.randn(5, 4).T,
    "expanded rows": lambda: torch.randn(1, 5).expand(4, 5),
    "expanded elements": lambda: torch.randn(4, 1).expand(4, 5),
    "sliced": lambda: torch.randn(9, 12)[1::2, ::3],
    "flipped": lambda: torch.randn(4, 5).flip(1),
    "with an offset": lambda: torch.randn(30)[3:23].view(4, 5),
    "channels last": lambda: torch.randn(4, 3, 6, 6).to(memory_format=torch.channels_last),
    "permuted": lambda: torch.randn(4, 3, 6, 6).permute(2, 0, 3, 1),
    "parameter": lambda: torch.nn.Parameter(torch.randn(4, 5)),
    "view with a graph": lambda: torch.nn.Parameter(torch.randn(4, 5)) * 2,
}


@pytest.mark.parametrize("name", STRIDED_STARTS)
def test_strides_of_the_start_do_not_matter(kind, adjoint, name):
    z0 = STRIDED_STARTS[name]()
    copy = z0.detach().clone(memory_format=torch.contiguous_format)

    def f(z):
        return 0.4 * z.flip(1) - 0.3 * z + 0.5 * z / (1 + z * z)

    before = z0.detach().clone()
    a = deqcore.fixed_point(f, z0, solver=kind(max_steps=9), adjoint=adjoint)
    b = deqcore.fixed_point(f, copy, solver=kind(max_steps=9), adjoint=adjoint)
    assert equal(a.value.detach(), b.value.detach())
    assert torch.equal(a.steps, b.steps)
    assert equal(z0.detach(), before)


def test_f_may_return_any_strides(kind, adjoint):
    z0 = torch.randn(4, 4)

    def f(z):
        return (0.4 * z.roll(1, 1) + 1) / (1 + z * z)

    straight = deqcore.fixed_point(f, z0, solver=kind(max_steps=9), adjoint=adjoint)
    turned = deqcore.fixed_point(
        lambda z: f(z).T.contiguous().T, z0, solver=kind(max_steps=9), adjoint=adjoint
    )
    assert equal(straight.value.detach(), turned.value.detach())


Pair = collections.namedtuple("Pair", "left right")


def test_value_has_the_structure_shapes_and_dtypes_of_the_start(kind, adjoint):
    z0 = {
        "pair": Pair(torch.randn(3, 2), torch.randn(3, dtype=torch.float64)),
        "list": [torch.randn(3, 2, 2).bfloat16(), (torch.randn(3, 0),)],
    }

    def f(z):
        left, right = z["pair"]
        matrix, (empty,) = z["list"]
        assert isinstance(z["pair"], Pair)
        assert (left.dtype, right.dtype) == (torch.float32, torch.float64)
        assert matrix.dtype == torch.bfloat16
        return {
            "pair": Pair(0.5 * left + right[:, None].float(), 0.25 * right + 1),
            "list": [0.25 * matrix + left[:, :, None].bfloat16(), (empty,)],
        }

    solution = deqcore.fixed_point(f, z0, solver=kind(max_steps=100), adjoint=adjoint)
    solution.raise_for_status()
    value = solution.value
    flat, spec = torch.utils._pytree.tree_flatten(z0)
    got, got_spec = torch.utils._pytree.tree_flatten(value)
    assert spec == got_spec
    assert [(v.shape, v.dtype) for v in got] == [(z.shape, z.dtype) for z in flat]
    torch.testing.assert_close(
        value["pair"].right, torch.full((3,), 4 / 3, dtype=torch.float64), rtol=1e-2, atol=1e-2
    )


def test_leaves_of_a_value_share_no_memory(kind, adjoint):
    h, c = torch.zeros(3, 2, requires_grad=True), torch.zeros(3, 100)
    value = deqcore.fixed_point(
        lambda state: (0.5 * state[0] + 1, 0.5 * state[1] + 1), (h, c), solver=kind(),
        adjoint=adjoint,
    ).value  # fmt: skip
    assert all(leaf.is_contiguous() for leaf in value)
    assert value[0].untyped_storage().nbytes() == value[0].nbytes
    with torch.no_grad():
        before = value[1].clone()
        value[0].add_(1)
    assert equal(value[1], before)


def test_rows_of_a_pytree_end_by_the_whole_state(kind):
    """One criterion for all leaves: a row's residual is the rms over all of its elements."""
    z0 = {"a": torch.zeros(3, 2, dtype=torch.float64), "b": torch.zeros(3, 5, dtype=torch.float64)}

    def f(z):
        return {"a": 0.5 * z["a"] + 1, "b": 0.25 * z["b"] - 1}

    solution = deqcore.fixed_point(f, z0, solver=kind(max_steps=3))
    image = f(solution.value)
    difference = [image[name] - solution.value[name] for name in "ab"]
    torch.testing.assert_close(
        solution.residual, rms(torch.cat(difference, dim=1)), rtol=1e-9, atol=1e-12
    )


@pytest.mark.parametrize("max_steps", [2, 5, 50])
def test_residual_of_leaves_of_different_dtypes_is_measured_at_the_rounded_value(kind, max_steps):
    z0 = {"wide": torch.zeros(3, 4), "half": torch.zeros(3, 5).bfloat16()}
    shift = torch.linspace(0.1, 1, 5).bfloat16()

    def f(z):
        return {"wide": 0.5 * z["wide"] + 1, "half": 0.7 * z["half"].flip(1) + shift}

    with torch.no_grad():
        solution = deqcore.fixed_point(f, z0, solver=kind(damping=0.9, max_steps=max_steps))
    image = f(solution.value)
    gap = [image[name].double() - solution.value[name].double() for name in z0]
    torch.testing.assert_close(
        solution.residual.double(), rms(torch.cat(gap, dim=1)), rtol=1e-5, atol=1e-7
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("size", [1.0, 100.0])
def test_half_precision_converges_on_long_rows_without_overflow(kind, dtype, size):
    """Sums of 65536 squares of 100 are 6.5e8, and float16 ends at 65504."""
    z0 = torch.zeros(1, 65_536, dtype=dtype)
    shift = size * torch.linspace(-1, 1, 65_536).to(dtype)

    def f(z):
        return 0.5 * z.flip(1) + shift

    solution = deqcore.fixed_point(f, z0, solver=kind())
    solution.raise_for_status()
    assert solution.value.dtype == dtype
    assert solution.residual.dtype == torch.float32
    value = solution.value.double()
    bound = 1e-6 + torch.finfo(dtype).eps * rms(f(solution.value))
    assert (rms(f(solution.value).double() - value) <= 1.001 * bound).all()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_default_tolerance_can_be_reached_in_every_dtype(kind, dtype):
    z0 = torch.randn(3, 50, dtype=torch.float64).to(dtype)
    solution = deqcore.fixed_point(lambda z: 0.6 * torch.tanh(z).roll(1, 1) + 1, z0, solver=kind())
    solution.raise_for_status()
    eps = max(1e-4, torch.finfo(dtype).eps)
    assert (solution.residual <= 1e-6 + eps * 1.001 * rms(solution.value) * 1.1).all()


def test_float32_reaches_a_residual_near_its_rounding(kind):
    z0 = torch.zeros(2, 64)
    A = torch.randn(64, 64) / 20
    solver = kind(rtol=3e-7, atol=0.0, max_steps=100)
    solution = deqcore.fixed_point(lambda z: z @ A.T + 1, z0, solver=solver)
    assert (solution.residual <= 3e-7 * rms(solution.value) * 1.01).all()
    assert (solution.status == Status.CONVERGED).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_keeps_the_dtype_of_the_start(kind, adjoint, dtype):
    layer = torch.nn.Linear(8, 8)
    torch.nn.init.orthogonal_(layer.weight, gain=0.5)
    z0 = torch.zeros(3, 8)
    with torch.autocast("cpu", dtype=dtype):
        solution = deqcore.fixed_point(
            lambda z: layer(z), z0, solver=kind(max_steps=30), adjoint=adjoint
        )
        assert layer(z0).dtype == dtype
    assert solution.value.dtype == torch.float32
    # f's own rounding bounds what can be asked for, so the default tolerance follows its dtype.
    solution.raise_for_status()
    solution.value.sum().backward()
    assert layer.weight.grad.dtype == torch.float32
    assert layer.weight.grad.isfinite().all()
