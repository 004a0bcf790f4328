"""What other libraries of this kind get wrong, measured: the same input, the right outcome.

The peers are torchdeq 0.1.0, jaxopt, locuslab/deq and xitorch; numbers in comments are theirs.
"""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn

import deqcore
from deqcore import Anderson, Broyden, Implicit, Phantom, Picard, Status, Unrolled
from tests.support.problems import Counted, affine, equal, rms

ADJOINTS = [Implicit(), Phantom(), Unrolled()]
KINDS = [Picard, Anderson, Broyden]


def solve_affine(dim, radius, solver, scale=1.0, dtype=torch.float64, seed=0):
    A, b = affine(dim, radius, seed, dtype)
    with torch.no_grad():
        return deqcore.fixed_point(
            lambda z: z @ A.T + scale * b, torch.zeros(1, dim, dtype=dtype), solver=solver
        )


# 1. An absolute ridge makes Anderson depend on the problem's scale.


@pytest.mark.parametrize("scale", [1e-4, 1e-2, 1.0, 1e2])
def test_anderson_takes_as_many_evaluations_at_every_scale_and_fewer_than_picard(scale):
    options = {"rtol": 1e-9, "atol": 0.0, "max_steps": 200}
    anderson = solve_affine(32, 0.5, Anderson(**options), scale)
    picard = solve_affine(32, 0.5, Picard(**options), scale)
    anderson.raise_for_status()
    assert anderson.evaluations == solve_affine(32, 0.5, Anderson(**options)).evaluations
    assert anderson.evaluations < picard.evaluations


def test_anderson_in_float32_reaches_a_residual_of_1e_7():
    solver = Anderson(rtol=0.0, atol=0.0, max_steps=80)
    solution = solve_affine(32, 0.5, solver, dtype=torch.float32)
    assert solution.residual.item() <= 2e-7 * rms(solution.value).item()


# 2. A limited-memory Broyden that overwrites its oldest pair diverges.


@pytest.mark.parametrize("memory", [30, 10, 5])
def test_broyden_of_little_memory_converges_where_overwriting_diverges(memory):
    solver = Broyden(memory=memory, rtol=1e-6, atol=0.0, max_steps=300, patience=200)
    solution = solve_affine(64, 0.9, solver)
    solution.raise_for_status()
    assert solution.evaluations <= 200


def test_broyden_of_little_memory_never_blows_up():
    solver = Broyden(memory=10, rtol=1e-9, atol=0.0, max_steps=100, patience=100)
    solution = solve_affine(64, 0.97, solver)
    start = solve_affine(64, 0.97, Picard(max_steps=1)).residual
    assert solution.residual.item() < start.item()  # torchdeq and jaxopt: 4e77
    assert solution.value.abs().max() < 1e4


# 3. An absolute tolerance of the backward solve makes gradients of small losses wrong.


@pytest.mark.parametrize("scale", [1e-7, 1.0, 1e7])
def test_gradient_of_a_scaled_loss_is_the_scaled_gradient(scale):
    A, b = affine(16, 0.9)
    b.requires_grad_()
    tight = Anderson(rtol=1e-8, atol=1e-9, max_steps=200, memory=17)
    value = deqcore.fixed_point(
        lambda z: z @ A.T + b, torch.zeros(1, 16, dtype=A.dtype), solver=tight
    ).value
    (scale * value.sum()).backward()
    exact = torch.linalg.solve((torch.eye(16, dtype=A.dtype) - A).T, torch.ones(16, dtype=A.dtype))
    error = (b.grad / scale - exact).norm() / exact.norm()
    assert error < 0.05  # torchdeq: 0.91 at 1e-7


# 4. A NaN row runs the whole batch to the last step and loses its best iterate.


@pytest.mark.parametrize("kind", KINDS)
def test_nan_row_costs_the_others_nothing_and_keeps_its_best(kind):
    shift = torch.linspace(0.5, 1.5, 4, dtype=torch.float64)[:, None].expand(4, 5).clone()
    calls = 0

    def f(z):
        nonlocal calls
        calls += 1
        out = 0.7 * torch.sin(z) + shift
        if calls >= 4:
            out[2] = float("nan")
        return out

    with torch.no_grad():
        clean = deqcore.fixed_point(
            lambda z: 0.7 * torch.sin(z) + shift, torch.zeros(4, 5).double(), solver=kind()
        )
        solution = deqcore.fixed_point(f, torch.zeros(4, 5).double(), solver=kind())
    assert solution.evaluations <= clean.evaluations < 50
    assert solution.status.tolist() == [0, 0, Status.NONFINITE, 0]
    best = solution.value[2]
    assert best.isfinite().all()
    measured = rms((0.7 * torch.sin(best) + shift[2] - best)[None])
    torch.testing.assert_close(measured, solution.residual[2:3])
    assert measured < rms(shift[2:3])  # better than the start


def test_broyden_with_a_zero_denominator_stays_finite():
    """f jumps so that the first secant has s . q = |s|^2: the update divides by zero."""
    one = torch.ones(1, 1, dtype=torch.float64)
    with torch.no_grad():
        solution = deqcore.fixed_point(
            lambda z: z + one, torch.zeros(1, 1, dtype=torch.float64), solver=Broyden(max_steps=20)
        )
    assert solution.value.isfinite().all()
    assert solution.status != Status.NONFINITE


# 5. Half precision: Anderson raises, and norms overflow.


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision_is_solved_and_differentiated(kind, dtype):
    w = torch.full((65_536,), 30.0, dtype=dtype, requires_grad=True)
    z0 = torch.zeros(1, 65_536, dtype=dtype)
    solution = deqcore.fixed_point(lambda z: 0.5 * z + w, z0, solver=kind())
    solution.raise_for_status()
    assert solution.residual.isfinite().all()
    (solution.value.float().mean()).backward()
    assert w.grad.isfinite().all()


# 6. Gradients by hooks: the same layer twice recurses, a forward without backward leaks.


class Cell(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.utils.parametrizations.weight_norm(nn.Linear(4, 4))

    def forward(self, z, x):
        return torch.tanh(0.4 * self.linear(z) + x)


def test_same_layer_twice_has_a_gradient():
    layer = deqcore.ImplicitLayer(Cell())
    layer(layer(torch.randn(3, 4))).sum().backward()
    assert all(p.grad.isfinite().all() for p in layer.parameters())


# 7. Few steps return z0 in silence; memory=1 raises.


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("max_steps", [1, 2])
def test_few_steps_return_a_measured_value_and_say_so(kind, max_steps):
    f = Counted(lambda z: 0.5 * z + 1)
    with torch.no_grad():
        solution = deqcore.fixed_point(
            f, torch.zeros(2, 3), solver=kind(max_steps=max_steps, rtol=0.0, atol=0.0)
        )
    assert f.calls == max_steps
    assert (solution.status == Status.MAX_STEPS).all()
    with pytest.raises(deqcore.ConvergenceError):
        solution.raise_for_status()
    assert equal(solution.residual, rms(0.5 * solution.value + 1 - solution.value).float())


@pytest.mark.parametrize("solver", [Anderson(memory=1), Broyden(memory=1)], ids=repr)
def test_memory_of_one_solves(solver):
    deqcore.fixed_point(lambda z: 0.5 * z + 1, torch.zeros(2, 3), solver=solver).raise_for_status()


# 8. A singular history aborts the batch.


@pytest.mark.parametrize("ridge", [0.0, 1e-8])
def test_singular_history_does_not_stop_the_batch(ridge):
    """Rows of rank one, a row at its solution, and a row whose residual never changes."""
    shift = torch.tensor([[1.0] * 8, [0.0] * 8, [1.0] + [0.0] * 7], dtype=torch.float64)
    factor = torch.tensor([[0.5], [0.5], [0.9]], dtype=torch.float64)
    solver = Anderson(memory=8, ridge=ridge, rtol=1e-10)
    solution = deqcore.fixed_point(
        lambda z: factor * z + shift, torch.zeros(3, 8, dtype=torch.float64), solver=solver
    )
    solution.raise_for_status()
    torch.testing.assert_close(solution.value, shift / (1 - factor), rtol=1e-6, atol=1e-6)
    with torch.no_grad():
        constant = deqcore.fixed_point(
            lambda z: z + 1, torch.zeros(2, 8), solver=Anderson(ridge=ridge, max_steps=30)
        )
    assert (constant.status != Status.CONVERGED).all()
    assert (constant.status != Status.NONFINITE).all()


# 10. eval() turns gradients off.


@pytest.mark.parametrize("adjoint", ADJOINTS, ids=lambda a: type(a).__name__)
def test_eval_mode_keeps_gradients(adjoint):
    backbone = nn.Linear(4, 4).requires_grad_(False)
    model = nn.Sequential(backbone, deqcore.ImplicitLayer(Cell(), adjoint=adjoint)).eval()
    model(torch.randn(3, 4)).sum().backward()
    assert all(p.grad is not None for p in model[1].parameters())


# 11. torch.compile breaks the graph 4 to 19 times. (Transforms: tests/adjoints/test_transforms.py.)


def test_a_compiled_model_breaks_its_graph_nowhere():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), deqcore.ImplicitLayer(Cell()), nn.Linear(4, 4))
    torch.compiler.reset()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    for batch in (3, 5, 8):
        x = torch.randn(batch, 4)
        expected = model(x)
        found = compiled(x)
        assert torch.equal(found, expected)
        for a, b in zip(*(torch.autograd.grad(y.sum(), [*model.parameters()])
                          for y in (found, expected)), strict=True):  # fmt: skip
            assert torch.equal(a, b)


def test_nothing_inside_of_a_solve_is_traced_but_what_the_caller_compiled():
    graphs = []

    def backend(graph, inputs):
        graphs.append([node.target for node in graph.graph.nodes if node.op == "call_function"])
        return graph.forward

    torch.compiler.reset()
    before = dict(torch._dynamo.utils.counters["frames"])

    @torch.compile(backend=backend)
    def plain(x):
        return deqcore.fixed_point(lambda z: 0.5 * torch.cos(z), x + 1).value * 2

    x = torch.randn(3, 4)
    plain(x)
    assert len(graphs) == 1  # that of x + 1
    assert torch.cos not in graphs[0]
    # The function up to the solve, and the rest of it: no frame of the solve's.
    assert torch._dynamo.utils.counters["frames"]["total"] - before.get("total", 0) == 2

    graphs.clear()
    f = torch.compile(lambda z: 0.5 * torch.cos(z), backend=backend)
    deqcore.fixed_point(f, x)
    assert [torch.cos in graph for graph in graphs] == [True, True]  # without and with gradients


# 12. Empty batches, 0-dim states, mutated options, typos, copies, stale residuals.


@pytest.mark.parametrize("kind", KINDS)
def test_empty_batch_and_scalar_state_are_states(kind):
    f = Counted(lambda z: 0.5 * z + 1)
    assert deqcore.fixed_point(f, torch.zeros(0, 3), solver=kind()).value.shape == (0, 3)
    assert deqcore.fixed_point(f, torch.tensor(0.0), solver=kind()).value.shape == ()


def test_options_are_not_changed_and_typos_do_not_pass():
    options = {"memory": 3, "max_steps": 9}
    before = dict(options)
    solver = Anderson(**options)
    deqcore.fixed_point(lambda z: 0.5 * z, torch.ones(2, 2), solver=solver)
    assert options == before
    assert solver == Anderson(**before)
    with pytest.raises(TypeError, match="memory"):
        Anderson(memery=4)


def test_layer_with_weight_norm_can_be_copied_and_used_after():
    layer = deqcore.ImplicitLayer(Cell())
    x = torch.randn(3, 4)
    layer(x).sum().backward()
    other = copy.deepcopy(layer)
    assert torch.equal(other(x), layer(x))
    with pytest.raises(RuntimeError, match="parametrized"):  # torch's own rule; state_dict works
        pickle.dumps(layer)
    fresh = deqcore.ImplicitLayer(Cell())
    fresh.load_state_dict(layer.state_dict())
    assert torch.equal(fresh(x), layer(x))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("max_steps", [1, 3, 6, 50])
def test_residual_reported_is_that_of_the_value(kind, max_steps):
    A, b = affine(12, 0.8)
    with torch.no_grad():
        solution = deqcore.fixed_point(
            lambda z: z @ A.T + b, torch.zeros(2, 12).double(), solver=kind(max_steps=max_steps)
        )
    measured = rms(solution.value @ A.T + b - solution.value)
    torch.testing.assert_close(solution.residual, measured, rtol=1e-9, atol=1e-12)


# 13. A pytree state takes twice the iterations of the same state as one tensor.


@pytest.mark.parametrize("kind", KINDS)
def test_pytree_takes_the_steps_of_one_tensor(kind):
    A, b = affine(12, 0.9)
    solver = kind(rtol=1e-9, max_steps=400, patience=400)
    z0 = torch.zeros(1, 12, dtype=torch.float64)
    with torch.no_grad():
        one = deqcore.fixed_point(lambda z: z @ A.T + b, z0, solver=solver)
        many = deqcore.fixed_point(
            lambda t: list((torch.cat(t, 1) @ A.T + b).split(4, 1)),
            list(z0.split(4, 1)),
            solver=solver,
        )
    assert many.evaluations == one.evaluations
    assert equal(torch.cat(many.value, 1), one.value)
