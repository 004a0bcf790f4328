"""Wrong arguments and wrong results of f: each has a message that says what to do."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import deqcore
from deqcore import Anderson, Broyden, Implicit, Phantom, Picard, Unrolled

ADJOINTS = [Implicit(), Phantom(), Unrolled(), Unrolled(checkpoint_every=2)]


@pytest.fixture(params=ADJOINTS, ids=["Implicit", "Phantom", "Unrolled", "Unrolled-checkpointed"])
def adjoint(request):
    return request.param


def halve(z):
    return 0.5 * z


@pytest.mark.parametrize(
    ("result", "error", "message"),
    [
        (lambda z: z[:, :2], ValueError, r"f\(z\): expected shape \(2, 3\).*got \(2, 2\)"),
        (lambda z: z[:1], ValueError, r"expected shape \(2, 3\).*got \(1, 3\)"),
        (lambda z: z.sum(), ValueError, r"expected shape \(2, 3\).*got \(\)"),
        (lambda z: z[None], ValueError, r"got \(1, 2, 3\)"),
        (lambda z: (z,), ValueError, "expected the structure of z0"),
        (lambda z: {"z": z}, ValueError, "expected the structure of z0"),
        (lambda z: None, (TypeError, ValueError), r"f\(z\): expected"),
        (lambda z: 3.0, TypeError, r"f\(z\): expected tensors, got float"),
        (lambda z: z.numpy(force=True), TypeError, r"f\(z\): expected tensors, got ndarray"),
        (lambda z: z.to("meta"), ValueError, "expected device cpu, got meta"),
    ],
)
def test_f_that_returns_another_kind_of_state_raises(adjoint, result, error, message):
    with pytest.raises(error, match=message):
        deqcore.fixed_point(result, torch.ones(2, 3), adjoint=adjoint)


@pytest.mark.parametrize(
    ("result", "error", "message"),
    [
        (
            lambda z: z.mean(1, keepdim=True),
            ValueError,
            r"\(2, 3\), that of z0, got \(2, 1\); g must",
        ),
        (lambda z: z[0], ValueError, r"g\(z\): expected shape \(2, 3\), that of z0, got \(3,\)"),
        (lambda z: {"z": z}, ValueError, r"g\(z\): expected the structure of z0"),
        (lambda z: 1.0, TypeError, r"g\(z\): expected tensors, got float"),
        (lambda z: z.to("meta"), ValueError, r"g\(z\): expected device cpu, got meta"),
    ],
)
def test_root_of_g_that_returns_another_kind_of_state_raises(adjoint, result, error, message):
    with pytest.raises(error, match=message):
        deqcore.root(result, torch.ones(2, 3), adjoint=adjoint)


def test_root_of_no_function_is_a_type_error():
    with pytest.raises(TypeError, match="g: expected a callable, got float"):
        deqcore.root(0.5, torch.ones(2, 3))


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.complex64])
def test_f_of_a_wrong_dtype_raises(adjoint, dtype):
    with pytest.raises(TypeError, match=f"floating-point.*{dtype}"):
        deqcore.fixed_point(lambda z: z.to(dtype), torch.ones(2, 3), adjoint=adjoint)


def test_f_that_returns_another_float_dtype_is_cast(adjoint):
    solution = deqcore.fixed_point(lambda z: 0.5 * z.double(), torch.ones(2, 3), adjoint=adjoint)
    assert solution.value.dtype == torch.float32


def test_f_that_drops_a_leaf_raises(adjoint):
    z0 = {"a": torch.ones(2, 3), "b": torch.ones(2)}
    with pytest.raises(ValueError, match="expected the structure of z0"):
        deqcore.fixed_point(lambda z: {"a": z["a"]}, z0, adjoint=adjoint)


def test_an_error_in_f_passes_through_unchanged(adjoint):
    class OwnError(Exception):
        pass

    def f(z):
        raise OwnError("from f")

    with pytest.raises(OwnError, match="from f"):
        deqcore.fixed_point(f, torch.ones(2, 3), adjoint=adjoint)


@pytest.mark.parametrize(
    ("z0", "error", "message"),
    [
        (3.0, TypeError, "z0: expected a tensor, got float"),
        (None, (TypeError, ValueError), "z0: expected"),
        ([], ValueError, "empty pytree"),
        ({}, ValueError, "empty pytree"),
        (torch.ones(2, 3, dtype=torch.int64), TypeError, r"got torch.int64; use z0.float\(\)"),
        (torch.ones(2, dtype=torch.complex64), TypeError, "complex64; use torch.view_as_real"),
        ([torch.ones(2), 1.0], TypeError, "z0: leaf 1: expected a tensor, got float"),
        ([torch.ones(2), torch.ones(3)], ValueError, "leaf 1: expected 2 rows .* got 3"),
        ([torch.ones(2), torch.tensor(1.0)], ValueError, "leaf 1: expected a batch dimension"),
        ([torch.ones(2), torch.ones(2, device="meta")], ValueError, "leaf 1: expected device cpu"),
        ([torch.ones(2), torch.ones(2).long()], TypeError, "leaf 1: expected a floating-point"),
        (
            torch.ones(2, 3).to(torch.float8_e5m2),
            TypeError,
            "float64, float32, bfloat16 or float16",
        ),
    ],
)
def test_bad_start_is_named(z0, error, message):
    with pytest.raises(error, match=message):
        deqcore.fixed_point(halve, z0)


def test_a_start_that_is_not_strided_is_named():
    with pytest.raises(TypeError, match=r"strided tensor, got .*sparse_coo.*to_dense"):
        deqcore.fixed_point(halve, torch.ones(2, 3).to_sparse())
    ragged = torch.nested.nested_tensor([torch.ones(2), torch.ones(3)], layout=torch.jagged)
    with pytest.raises(TypeError, match=r"strided tensor, got .*jagged"):
        deqcore.fixed_point(halve, ragged)


def test_a_start_on_the_meta_device_is_named(adjoint):
    with pytest.raises(ValueError, match=r"z0: expected data on a CPU or a GPU, got a meta tensor"):
        deqcore.fixed_point(halve, torch.ones(2, 3, device="meta"), adjoint=adjoint)


def test_wrong_kinds_of_arguments_are_type_errors():
    z0 = torch.ones(2, 3)
    with pytest.raises(TypeError, match="f: expected a callable, got Tensor"):
        deqcore.fixed_point(z0, halve)
    for solver in (Anderson, None, "anderson", Implicit()):
        with pytest.raises(TypeError, match=r"solver: expected e\.g\. deqcore\.Anderson\(\)"):
            deqcore.fixed_point(halve, z0, solver=solver)
    for adjoint in (Implicit, None, "jfb", Anderson()):
        with pytest.raises(TypeError, match=r"adjoint: expected e\.g\. deqcore\.Implicit\(\)"):
            deqcore.fixed_point(halve, z0, adjoint=adjoint)
    with pytest.raises(TypeError, match="tol"):
        deqcore.fixed_point(halve, z0, tol=1e-3)


def test_wrong_kinds_of_arguments_of_a_layer_are_type_errors():
    cell = nn.Linear(3, 3)
    with pytest.raises(TypeError, match="cell: expected a module"):
        deqcore.ImplicitLayer(3)
    with pytest.raises(TypeError, match="solver: expected"):
        deqcore.ImplicitLayer(cell, Implicit())
    with pytest.raises(TypeError, match="adjoint: expected"):
        deqcore.ImplicitLayer(cell, Anderson(), Anderson())


def test_layer_that_cannot_start_from_zeros_like_its_input_asks_for_z0():
    layer = deqcore.ImplicitLayer(nn.Linear(3, 3))
    mask = torch.ones(2, 3, dtype=torch.bool)
    with pytest.raises(TypeError, match=r"pass z0=.*floating-point tensor, got torch\.bool"):
        layer((torch.ones(2, 3), mask))


def test_reuse_of_the_forward_inverse_needs_broyden():
    with pytest.raises(ValueError, match=r"reuse_forward=True needs.*deqcore\.Broyden"):
        deqcore.fixed_point(halve, torch.ones(2, 3), adjoint=Implicit(reuse_forward=True))
    deqcore.fixed_point(
        halve, torch.ones(2, 3), solver=Broyden(), adjoint=Implicit(reuse_forward=True)
    ).raise_for_status()


@pytest.mark.parametrize("base", [*Picard.__mro__[1:4], Implicit.__mro__[1]])
def test_abstract_bases_cannot_be_made(base):
    assert base.__module__.startswith("deqcore")
    with pytest.raises(TypeError, match=f"abstract class {base.__name__}"):
        base()
