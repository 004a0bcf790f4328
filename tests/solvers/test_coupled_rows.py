"""f that couples the rows of a batch: noticed where rows are taken alone, and solved as one."""

from __future__ import annotations

import warnings

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import deqcore
from deqcore import (
    Anderson,
    Broyden,
    ConvergenceError,
    ConvergenceWarning,
    Implicit,
    Phantom,
    Picard,
    Status,
    Unrolled,
)
from tests.support.problems import Counted, equal, generator, rms, solvers, wave, wave_batch

SEEDS = st.integers(0, 10_000)
TIGHT = {"rtol": 1e-10, "atol": 1e-12, "max_steps": 300, "patience": 300}
ADJOINTS = [Implicit(solver=Anderson(**TIGHT)), Unrolled()]


@pytest.fixture(params=[Picard, Anderson, Broyden], ids=lambda kind: kind.__name__)
def kind(request):
    return request.param


def swapped(z, w):
    return 0.5 * z.flip(0) + w


def late(z):
    """Row 1 creeps to 10; row 0 rests at 0 until row 1 has passed 3."""
    return torch.stack([0.1 * z[0] + torch.relu(z[1] - 3), 0.9 * z[1] + 1])


def coupled_affine(rows, dim, seed):
    """A on the whole batch with norm 0.7, b; and f(z) = reshape(A vec(z) + b)."""
    g = generator(seed)
    A = torch.randn(rows * dim, rows * dim, generator=g, dtype=torch.float64)
    A = 0.7 * A / torch.linalg.matrix_norm(A, 2)
    return A, torch.randn(rows, dim, generator=g, dtype=torch.float64)


def apply(A, z, b):
    return (A @ z.flatten()).view_as(z) + b


# What was silently wrong


def test_gradient_of_swapped_rows_is_right_when_coupled():
    w = torch.ones(2, 1, dtype=torch.float64, requires_grad=True)
    for adjoint in ADJOINTS:
        solution = deqcore.fixed_point(
            swapped, torch.zeros(2, 1).double(), w,
            solver=Picard(**TIGHT), adjoint=adjoint, batch="coupled",
        )  # fmt: skip
        solution.raise_for_status()
        (grad,) = torch.autograd.grad(solution.value[0].sum(), w)
        expected = torch.tensor([[4 / 3], [2 / 3]], dtype=torch.float64)
        torch.testing.assert_close(grad, expected, rtol=1e-8, atol=0)


def test_gradient_of_swapped_rows_says_that_it_is_wrong_by_rows():
    w = torch.ones(2, 1, requires_grad=True)
    solution = deqcore.fixed_point(swapped, torch.zeros(2, 1), w)
    with pytest.warns(ConvergenceWarning, match="batch='coupled'"):
        solution.value[0].sum().backward()
    assert solution.backward.status.tolist()[1] == Status.INCONSISTENT
    with pytest.raises(ConvergenceError, match="batch='coupled'"):
        solution.backward.raise_for_status()


@pytest.mark.parametrize("scale", [1.0, 37.0])
def test_gradient_of_swapped_rows_says_so_where_all_rows_have_one(scale):
    """No row is at rest: what then shows it is that rows are scaled, and signed, by themselves."""
    w = torch.ones(2, 3, dtype=torch.float64, requires_grad=True)
    solution = deqcore.fixed_point(swapped, torch.zeros(2, 3).double(), w)
    factor = torch.tensor([[1.0], [scale]], dtype=torch.float64)
    with pytest.warns(ConvergenceWarning):
        (solution.value * factor).sum().backward()
    assert not solution.backward.converged.all()


@pytest.mark.parametrize(
    ("coupling", "mix", "decades"),
    [
        (0.001, lambda z: z.mean(0).expand_as(z), 6),
        (0.003, lambda z: z.roll(1, 0), 6),
        (0.01, lambda z: z.flip(0), 0),
        (0.03, lambda z: z.mean(0).expand_as(z), 6),
    ],
    ids=["mean", "ring", "flip", "more_mean"],
)
def test_rows_of_many_elements_that_are_weakly_coupled_do_not_converge_in_backward(
    coupling, mix, decades
):
    """Their gradients, up to ``decades`` apart, are wrong by more than a hundredth."""
    g = generator(0)
    a = torch.rand(1100, generator=g) * 1.2 - 0.6
    grad = torch.randn(16, 1100, generator=g)
    grad *= 10.0 ** (decades * (torch.rand(16, 1, generator=g) - 0.5))
    w = torch.zeros(16, 1100, requires_grad=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        solution = deqcore.fixed_point(
            lambda z: a * z + coupling * mix(z) + w, torch.zeros(16, 1100)
        )
        (solution.value * grad).sum().backward()
    rows = torch.eye(16)
    system = torch.diag_embed(1 - a[:, None].expand(-1, 16)) - coupling * mix(rows).t()
    exact = torch.linalg.solve(system, grad.t()[:, :, None])[:, :, 0].t()
    error = (w.grad - exact).norm(dim=1) / exact.norm(dim=1)
    assert error.max() > 0.01
    assert not solution.backward.converged.all()


def test_row_that_others_move_after_it_has_converged_is_inconsistent(kind):
    with torch.no_grad(), pytest.warns(ConvergenceWarning, match="batch='coupled'"):
        solution = deqcore.fixed_point(late, torch.zeros(2, 1), solver=kind(max_steps=200))
    assert solution.status[0] == Status.INCONSISTENT
    measured = rms(late(solution.value) - solution.value)
    torch.testing.assert_close(solution.residual.double(), measured, rtol=1e-3, atol=1e-4)
    assert solution.residual[0] > 6


def test_late_rows_are_solved_when_coupled(kind):
    solution = deqcore.fixed_point(
        late, torch.zeros(2, 1, dtype=torch.float64), solver=kind(**TIGHT), batch="coupled"
    )
    solution.raise_for_status()
    expected = torch.tensor([[70 / 9], [10.0]], dtype=torch.float64)
    torch.testing.assert_close(solution.value, expected, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize(
    "adjoint", [Implicit(), Phantom(), Unrolled(), Unrolled(checkpoint_every=2)]
)
def test_every_adjoint_notices_rows_that_others_moved(adjoint):
    shift = torch.zeros(2, 1, requires_grad=True)
    with pytest.warns(ConvergenceWarning, match="batch='coupled'"):
        solution = deqcore.fixed_point(
            lambda z: late(z) + shift, torch.zeros(2, 1),
            solver=Picard(max_steps=200), adjoint=adjoint,
        )  # fmt: skip
    assert solution.status[0] == Status.INCONSISTENT


def test_f_that_changes_from_call_to_call_is_noticed():
    calls = 0

    def f(z):
        nonlocal calls
        calls += 1
        drift = torch.tensor([[0.0], [1.0]]) if calls < 6 else torch.tensor([[5.0], [1.0]])
        return torch.tensor([[0.1], [0.9]]) * z + drift

    with torch.no_grad(), pytest.warns(ConvergenceWarning, match="changes from call to call"):
        solution = deqcore.fixed_point(f, torch.zeros(2, 1), solver=Picard(max_steps=200))
    assert solution.status.tolist() == [Status.INCONSISTENT, Status.CONVERGED]


# What must not be taken for it


@given(
    st.sampled_from([2, 3, 16, 33]),
    st.sampled_from([1, 7, 64, 130]),
    SEEDS,
    st.sampled_from([torch.float64, torch.float32, torch.bfloat16]),
    solvers(max_steps=30),
    st.floats(-8, 0),
)
def test_rows_of_matrix_products_are_not_taken_for_coupled(batch, dim, seed, dtype, solver, scale):
    g = generator(seed)
    weight = torch.randn(dim, dim, generator=g) / dim**0.5
    x = torch.randn(batch, dim, generator=g) * 10 ** (scale * torch.rand(batch, 1, generator=g))
    weight, x = weight.to(dtype), x.to(dtype).requires_grad_()
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "deqcore: f gave a row", ConvergenceWarning)
        adjoint = Implicit(on_failure="ignore")
        solution = deqcore.fixed_point(
            lambda z, x: torch.tanh(z @ weight * 0.7) + x,
            torch.zeros_like(x), x, solver=solver, adjoint=adjoint,
        )  # fmt: skip
        (solution.value[::2] * x.detach()[::2]).sum().backward()
    assert (solution.status != Status.INCONSISTENT).all()
    assert (solution.backward.status != Status.INCONSISTENT).all()


@given(st.integers(2, 5), st.integers(1, 9), SEEDS)
def test_signs_that_betray_coupled_rows_change_no_bit_of_others(batch, dim, seed):
    z0, shift, strength = wave_batch(batch, dim, seed)
    shift.requires_grad_()

    def gradient(rows):
        args = shift.detach()[rows].requires_grad_(), strength[rows]
        value = deqcore.fixed_point(wave, z0[rows], *args).value
        return torch.autograd.grad((value * (1 + z0[rows])).sum(), args[0])[0]

    together = gradient(slice(None))
    for i in range(batch):
        assert equal(together[i : i + 1], gradient(slice(i, i + 1)))


# The coupled mode


@given(st.integers(1, 4), st.integers(1, 5), SEEDS, solvers(**TIGHT))
def test_coupled_solution_and_gradient_are_those_of_linear_algebra(rows, dim, seed, solver):
    A, b = coupled_affine(rows, dim, seed)
    A.requires_grad_()
    b.requires_grad_()
    loss = torch.randn(rows, dim, generator=generator(seed + 1), dtype=torch.float64)
    loss[0] = 0  # rows with and without a gradient
    eye = torch.eye(rows * dim, dtype=torch.float64)
    exact = torch.linalg.solve(eye - A, b.flatten()).view_as(b)
    expected = torch.autograd.grad((exact * loss).sum(), (A, b))
    solution = deqcore.fixed_point(
        lambda z: apply(A, z, b), torch.zeros_like(b), solver=solver,
        adjoint=Implicit(solver=Anderson(**TIGHT)), batch="coupled",
    )  # fmt: skip
    solution.raise_for_status()
    assert solution.status.shape == solution.residual.shape == solution.steps.shape == (1,)
    got = torch.autograd.grad((solution.value * loss).sum(), (A, b))
    torch.testing.assert_close(solution.value, exact, rtol=1e-7, atol=1e-7)
    torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-6)


@given(
    st.integers(1, 5), st.integers(1, 6), SEEDS, solvers(**TIGHT), st.randoms(use_true_random=False)
)
def test_permuting_coupled_rows_permutes_the_answer(batch, dim, seed, solver, random):
    order = torch.tensor(random.sample(range(batch), batch))
    z0, shift, strength = wave_batch(batch, dim, seed)

    def solve(rows):
        s = shift[rows].requires_grad_()
        solution = deqcore.fixed_point(
            lambda z: wave(z, s, 0.5 * strength[rows]) + 0.2 * z.mean(0), z0[rows], solver=solver,
            adjoint=Implicit(solver=Anderson(**TIGHT)), batch="coupled",
        )  # fmt: skip
        solution.raise_for_status()
        (grad,) = torch.autograd.grad((solution.value * z0[rows]).sum(), s)
        return solution.value.detach(), grad

    for plain, permuted in zip(solve(torch.arange(batch)), solve(order), strict=True):
        torch.testing.assert_close(permuted, plain[order], rtol=1e-7, atol=1e-7)


@given(st.integers(1, 40), SEEDS, solvers(max_steps=25))
def test_a_coupled_batch_of_one_is_that_row(dim, seed, solver):
    z0, shift, strength = wave_batch(1, dim, seed)

    def solve(batch):
        s = shift.clone().requires_grad_()
        solution = deqcore.fixed_point(wave, z0, s, strength, solver=solver, batch=batch)
        (grad,) = torch.autograd.grad(solution.value.sum(), s)
        return solution, grad

    (row, row_grad), (whole, whole_grad) = solve("rows"), solve("coupled")
    for name in ("value", "status", "residual", "steps"):
        assert equal(getattr(row, name), getattr(whole, name)), name
    assert equal(row_grad, whole_grad)


@given(st.integers(1, 4), st.integers(1, 9), SEEDS, solvers(max_steps=25))
def test_a_coupled_batch_is_its_flattened_row(batch, dim, seed, solver):
    z0, shift, strength = wave_batch(batch, dim, seed)
    whole = deqcore.fixed_point(wave, z0, shift, strength, solver=solver, batch="coupled")
    flat = deqcore.fixed_point(
        lambda z: wave(z.view(batch, dim), shift, strength).reshape(1, -1),
        z0.reshape(1, -1), solver=solver,
    )  # fmt: skip
    assert equal(whole.value.reshape(1, -1), flat.value)
    for name in ("status", "residual", "steps"):
        assert equal(getattr(whole, name), getattr(flat, name)), name


def test_leaves_of_a_coupled_state_need_not_share_rows():
    """A graph: nodes and edges, with what each takes from the other."""
    ends = torch.tensor([[0, 1, 2, 0], [1, 2, 3, 3]])
    force = torch.randn(4, 2, dtype=torch.float64)

    def f(state):
        nodes, edges = state["nodes"], state["edges"]
        inflow = torch.zeros_like(nodes).index_add(0, ends[1], edges)
        return {"nodes": 0.4 * torch.tanh(inflow) + force,
                "edges": 0.5 * (nodes[ends[0]] - nodes[ends[1]])}  # fmt: skip

    z0 = {"nodes": torch.zeros(4, 2).double(), "edges": torch.zeros(4, 2).double()}
    z0["edges"] = torch.zeros(4, 2).double()
    solution = deqcore.fixed_point(f, z0, solver=Anderson(**TIGHT), batch="coupled")
    solution.raise_for_status()
    again = f(solution.value)
    for name, leaf in solution.value.items():
        torch.testing.assert_close(again[name], leaf, rtol=1e-8, atol=1e-8)
    with pytest.raises(ValueError, match="batch='coupled'"):
        deqcore.fixed_point(f, {"nodes": torch.zeros(4, 2), "edges": torch.zeros(3, 2)})


def test_root_and_layer_take_coupled_batches():
    w = torch.ones(2, 1, dtype=torch.float64)
    exact = torch.full((2, 1), 2.0, dtype=torch.float64)
    found = deqcore.root(
        lambda z: swapped(z, w) - z, torch.zeros_like(w), solver=Anderson(**TIGHT), batch="coupled"
    )
    found.raise_for_status()
    torch.testing.assert_close(found.value, exact)
    layer = deqcore.ImplicitLayer(swapped, solver=Anderson(**TIGHT), batch="coupled")
    torch.testing.assert_close(layer(w), exact)
    assert layer.report.status.tolist() == [Status.CONVERGED]
    assert "coupled" in repr(layer)


def test_a_batch_of_another_kind_is_refused_by_name():
    with pytest.raises(ValueError, match=r"batch: expected 'rows'.* or 'coupled'.*got 'couple'"):
        deqcore.fixed_point(swapped, torch.zeros(2, 1), torch.ones(2, 1), batch="couple")
    with pytest.raises(ValueError, match="batch: expected"):
        deqcore.ImplicitLayer(swapped, batch="couple")


# Batch norm


class Normed(torch.nn.Module):
    def __init__(self, dim=6):
        super().__init__()
        self.linear = torch.nn.Linear(dim, dim)
        self.norm = torch.nn.BatchNorm1d(dim)
        torch.nn.init.orthogonal_(self.linear.weight, gain=0.4)
        self.double()

    def forward(self, z, x):
        return 0.5 * torch.tanh(self.norm(self.linear(z) + x)) + 0.3 * x


def statistics(module):
    return [b.clone() for b in module.buffers()]


@pytest.mark.parametrize("adjoint", [*ADJOINTS, Phantom(), Phantom(steps=3),
                                     Unrolled(checkpoint_every=2)], ids=str)  # fmt: skip
@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("how", ["module", "closure", "layer"])
def test_running_statistics_are_updated_once_a_solve(adjoint, grad, how):
    x = torch.randn(8, 6, dtype=torch.float64)
    cell, once = Normed(), Normed()
    once.load_state_dict(cell.state_dict())
    before = statistics(cell)
    options = {"solver": Anderson(rtol=1e-9, max_steps=60), "adjoint": adjoint, "batch": "coupled"}
    with torch.set_grad_enabled(grad):
        if how == "layer":
            value = deqcore.ImplicitLayer(cell, **options)(x)
        else:
            f = cell if how == "module" else (lambda z, x: cell(z, x))
            value = deqcore.fixed_point(f, torch.zeros_like(x), x, **options).value
        if grad:
            value.square().sum().backward()
    once(value.detach(), x)
    for got, expected, old in zip(cell.buffers(), once.buffers(), before, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-8)
        assert not torch.equal(got, old)


def test_gradients_through_batch_norm_are_those_of_the_whole_batch():
    x = torch.randn(5, 6, dtype=torch.float64, requires_grad=True)
    cell = Normed()
    target = torch.randn(5, 6, dtype=torch.float64)

    def gradients(adjoint):
        solution = deqcore.fixed_point(
            cell, torch.zeros_like(x), x, solver=Anderson(**TIGHT), adjoint=adjoint,
            batch="coupled",
        )  # fmt: skip
        solution.raise_for_status()
        loss = ((solution.value - target) ** 2)[1:3].sum()
        return torch.autograd.grad(loss, [x, *cell.parameters()])

    implicit = gradients(Implicit(solver=Anderson(**TIGHT)))
    z = torch.zeros_like(x)
    for _ in range(100):  # by autograd alone
        z = cell(z, x)
    plain = torch.autograd.grad(((z - target) ** 2)[1:3].sum(), [x, *cell.parameters()])
    torch.testing.assert_close(implicit, plain, rtol=1e-7, atol=1e-9)


def test_batch_norm_in_training_is_noticed_by_rows():
    x = torch.randn(8, 6, dtype=torch.float64)
    x[0] *= 100
    cell = Normed()
    solution = deqcore.fixed_point(cell, torch.zeros_like(x), x, solver=Picard(max_steps=100))
    with pytest.warns(ConvergenceWarning, match="batch='coupled'"):
        (solution.value * torch.tensor([[1.0]] * 4 + [[0.0]] * 4).double()).sum().backward()
    assert (solution.backward.status == Status.INCONSISTENT).any()


def test_a_buffer_that_f_replaces_is_updated_once():
    class Counting(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("seen", torch.zeros(()))
            self.register_buffer("table", torch.ones(1))

        def forward(self, z):
            self.seen = self.seen + 1
            return 0.5 * z + self.table

    cell = Counting()
    solution = deqcore.fixed_point(cell, torch.zeros(2, 1), batch="coupled")
    assert solution.evaluations > 3
    assert cell.seen == 1
    cell.eval()
    with torch.no_grad():
        deqcore.fixed_point(cell, torch.zeros(2, 1), batch="coupled")
    assert cell.seen > 3  # in eval mode f's buffers are its own business


def test_buffers_are_put_back_when_f_raises():
    cell = Normed()
    before = statistics(cell)
    calls = 0

    def f(z, x):
        nonlocal calls
        calls += 1
        out = cell(z, x)
        if calls == 3:
            raise KeyError("on purpose")
        return out

    x = torch.randn(8, 6, dtype=torch.float64)
    with pytest.raises(KeyError):
        deqcore.fixed_point(f, torch.zeros_like(x), x, batch="coupled")
    assert all(torch.equal(a, b) for a, b in zip(cell.buffers(), before, strict=True))


def test_coupled_solve_calls_f_no_more_often_than_by_rows():
    z0, *args = wave_batch(1, 5, seed=1)
    rows, coupled = Counted(wave), Counted(wave)
    deqcore.fixed_point(rows, z0, *args)
    deqcore.fixed_point(coupled, z0, *args, batch="coupled")
    assert rows.calls == coupled.calls


def test_iterates_that_grow_are_warned_of():
    """There is no fixed point: rms(f(z) - z) is 2 at the start, and 3 for ever after."""
    with pytest.warns(ConvergenceWarning, match="residual above its first"):
        solution = deqcore.fixed_point(
            lambda z: z + 2 + torch.tanh(z), torch.zeros(1, 1),
            solver=Picard(rtol=1e-2, max_steps=300, patience=300),
        )  # fmt: skip
    assert solution.residual[0] > 2.9
