"""torch.compile(fullgraph=True) of models with implicit layers: one op a solve, eager's numbers."""

from __future__ import annotations

import copy
import gc
import pickle
import warnings

import pytest
import torch
from torch import nn
from torch._dynamo.utils import counters

import deqcore
from deqcore import (
    Anderson,
    Broyden,
    FixedDropout,
    Implicit,
    ImplicitLayer,
    Phantom,
    Unrolled,
    normalization,
)

D = 4


class Cell(nn.Module):
    def __init__(self, gain=0.5):
        super().__init__()
        self.linear = nn.Linear(D, D)
        nn.init.orthogonal_(self.linear.weight, gain=gain)

    def forward(self, z, x):
        return torch.tanh(self.linear(z) + x)


class Model(nn.Module):
    def __init__(self, cell=None, **options):
        super().__init__()
        self.inject = nn.Linear(D, D)
        self.layer = ImplicitLayer(Cell() if cell is None else cell, **options)

    def forward(self, x):
        return self.layer(self.inject(x)).square()


@pytest.fixture(autouse=True)
def nothing_compiled_before():
    torch.manual_seed(0)
    torch.compiler.reset()
    counters.clear()


def compiled(model, backend="aot_eager"):
    return torch.compile(model, backend=backend, fullgraph=True)


def twins(make):
    """Two models of the same weights; normalised weights do not survive a deepcopy unchanged."""
    made = []
    for _ in range(2):
        torch.manual_seed(0)
        made.append(make())
    return made


def gradients(model, x):
    y = model(x)
    return y.detach(), torch.autograd.grad(y.sum(), list(model.parameters()), allow_unused=True)


def assert_same(model, twin, x, program):
    """Bit for bit: values, gradients, buffers, and what the layers report."""
    value, grads = gradients(program, x)
    expected, expected_grads = gradients(twin, x)
    assert torch.equal(value, expected)
    for mine, other in zip(grads, expected_grads, strict=True):
        assert torch.equal(mine, torch.zeros_like(mine) if other is None else other)
    for mine, other in zip(model.buffers(), twin.buffers(), strict=True):
        assert torch.equal(mine, other)
    assert_same_reports(model.layer.report, twin.layer.report)


def assert_same_reports(mine, other):
    for name in ("status", "residual", "steps"):
        assert torch.equal(getattr(mine, name), getattr(other, name))
    assert mine.evaluations == other.evaluations
    assert (mine.backward is None) == (other.backward is None)
    if mine.backward is not None:
        assert_same_reports(mine.backward, other.backward)


class Normed(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear, self.norm = nn.Linear(D, D), nn.BatchNorm1d(D)

    def forward(self, z, x):
        return torch.tanh(0.5 * self.norm(self.linear(z)) + x)


class Dropped(Cell):
    def __init__(self):
        super().__init__()
        self.dropout = FixedDropout(0.5)

    def forward(self, z, x):
        return self.dropout(super().forward(z, x))


def test_a_compiled_model_has_one_graph_and_the_numbers_of_eager_mode():
    model, twin = twins(Model)
    program = compiled(model)
    for rows in (3, 5, 2):
        assert_same(model, twin, torch.randn(rows, D), program)
    assert not counters["graph_break"]
    assert counters["stats"]["unique_graphs"] == 2  # of the first batch, and of any size


@pytest.mark.parametrize(
    "make",
    [
        lambda: Model(solver=Broyden(), adjoint=Implicit(reuse_forward=True)),
        lambda: Model(adjoint=Phantom(steps=3, damping=0.8)),
        lambda: Model(adjoint=Unrolled(checkpoint_every=2), solver=Anderson(max_steps=4)),
        lambda: Model(Normed(), batch="coupled"),
        lambda: Model(Normed(), batch="coupled").eval(),
        lambda: Model(normalization.spectral_normalize(Cell(gain=2.0), 0.9)),
        lambda: Model(normalization.weight_normalize(Cell())),
    ],
    ids=["shine", "phantom", "unrolled", "batch_norm", "eval", "spectral", "weight_norm"],
)
def test_adjoints_and_cells_of_all_kinds_have_the_numbers_of_eager_mode(make):
    model, twin = twins(make)
    program = torch.compile(model, backend="aot_eager", fullgraph=True, dynamic=True)
    for rows in (3, 5):
        assert_same(model, twin, torch.randn(rows, D), program)
    assert counters["stats"]["unique_graphs"] == 1


def test_a_program_without_gradients():
    model = Model()
    program = compiled(model)
    with torch.no_grad():
        x = torch.randn(3, D)
        assert torch.equal(program(x), model(x))


def test_inductor_compiles_it():
    model = nn.Sequential(ImplicitLayer(Cell()))
    x = torch.randn(3, D, requires_grad=True)
    grads = [
        torch.autograd.grad(m(x).sum(), [x, *model.parameters()])
        for m in (model, compiled(model, "inductor"))
    ]
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


def test_running_statistics_change_once_a_solve():
    model = Model(Normed(), batch="coupled")
    program = compiled(model)
    for count in (1, 2):
        program(torch.randn(6, D)).sum().backward()
        assert model.layer.cell.norm.num_batches_tracked == count


def test_masks_of_backward_are_those_of_forward():
    model = Model(Dropped())
    program = compiled(model)
    for _ in range(2):
        x = torch.randn(3, D)
        grads = []
        for m in (program, model):
            torch.manual_seed(3)
            y = m(x)
            torch.rand(7)  # others draw, too
            grads.append((y.detach(), *torch.autograd.grad(y.sum(), list(model.parameters()))))
        assert grads[0][0].any()
        assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


def test_masks_are_drawn_for_each_call():
    layer = ImplicitLayer(Dropped())
    program = compiled(lambda x: (layer(x), layer(x)))
    one, other = program(torch.ones(8, D))
    assert not torch.equal(one, other)


@pytest.mark.parametrize("grad", [True, False])
def test_autocast_is_that_of_the_call(grad):
    model = Model()
    program = compiled(model)
    x = torch.randn(3, D)
    with torch.set_grad_enabled(grad), torch.autocast("cpu", dtype=torch.bfloat16):
        found, expected = program(x), model(x)
    assert torch.equal(found, expected)
    assert not torch.equal(found, model(x))
    if grad:
        grads = [torch.autograd.grad(y.sum(), list(model.parameters())) for y in (found, expected)]
        assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


class Mixed(nn.Module):
    """A state of two leaves, and arguments of all kinds."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(2, 2).double(), nn.Linear(3, 3)

    def forward(self, z, x, power, scale, options):
        u = torch.tanh(0.5 * self.a(z["u"]) + x["u"] ** power)
        v = torch.tanh(scale * self.b(z["v"]) + x["v"][0] * options["k"][1])
        return {"v": v, "u": u} if options["name"] == "swapped" else {"u": u, "v": v}


def test_states_and_arguments_are_trees_of_tensors_and_numbers():
    layer = ImplicitLayer(Mixed())
    program = compiled(layer)
    x = {"u": torch.rand(3, 2, requires_grad=True), "v": (torch.rand(3, 3),)}
    z0 = {"u": torch.zeros(3, 2, dtype=torch.float64), "v": torch.zeros(3, 3)}
    for power in (2, 3, 4):
        args = x, power, 0.5, {"k": [None, torch.tensor(2.0)], "name": "swapped", "on": True}
        found, expected = (m(*args, z0=z0) for m in (program, layer))
        assert list(found) == list(expected)
        assert all(torch.equal(found[k], expected[k]) for k in found)
        assert found["u"].dtype == torch.float64
        grads = [torch.autograd.grad(y["u"].sum(), x["u"]) for y in (found, expected)]
        assert torch.equal(grads[0][0], grads[1][0])
    assert counters["stats"]["unique_graphs"] == 2  # integers are no part of a graph


def test_a_layer_that_is_used_twice_reports_its_last_solve_and_that_one_s_backward():
    def make():
        torch.manual_seed(1)
        model = Model()
        model.forward = lambda x: model.layer(model.layer(model.inject(x)) - 3.0)
        return model

    model, eager = make(), make()
    program = compiled(lambda x: model.layer(model.layer(model.inject(x)) - 3.0))
    x = torch.randn(3, D)
    program(x).sum().backward()
    eager(x).sum().backward()
    assert_same_reports(model.layer.report, eager.layer.report)


class Several(nn.Module):
    def __init__(self, layers):
        super().__init__()
        self.layers = nn.ModuleList(ImplicitLayer(Cell()) for _ in range(layers))


def test_layers_that_are_compiled_one_by_one_share_a_graph():
    models = Several(10).layers
    x = torch.randn(3, D)
    for layer in models:
        layer.compile(backend="aot_eager", fullgraph=True)
        y = layer(x)
        assert torch.equal(y, layer._solve(None, (x,))[0])
    assert counters["stats"]["unique_graphs"] == 1


def test_copies_and_pickles_solve_with_their_own_cells():
    layer = ImplicitLayer(Cell())
    x = torch.randn(3, D)
    program = compiled(layer)
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), copy.copy(layer)):
        with torch.no_grad():
            other.cell.linear.bias.add_(1.0)
        assert torch.equal(compiled(other)(x), other(x))
        assert other.report is not layer.report
    assert torch.equal(program(x), layer(x))


def test_parameters_that_a_program_changes_are_those_of_its_solve():
    layer = ImplicitLayer(Cell())

    @torch.compile(backend="aot_eager", fullgraph=True)
    def program(x):
        with torch.no_grad():
            layer.cell.linear.bias.add_(0.5)
        return layer(x)

    x = torch.randn(3, D)
    y = program(x)
    assert torch.equal(y, layer(x))


class Scaled(nn.Module):
    def __init__(self):
        super().__init__()
        self.scale = torch.ones(D)

    def forward(self, z, x):
        return self.scale * torch.tanh(0.5 * z + x)


class Hyper(nn.Module):
    """A network that computes what the cell has as an attribute."""

    def __init__(self):
        super().__init__()
        self.hyper, self.layer = nn.Linear(D, D), ImplicitLayer(Scaled())

    def forward(self, x):
        self.layer.cell.scale = self.hyper(x).mean(0)
        return self.layer(x)


def test_attributes_that_are_computed_get_gradients():
    model, twin = twins(Hyper)
    assert_same(model, twin, torch.randn(3, D), compiled(model))
    assert gradients(model, torch.ones(3, D))[1][0].any()


hidden = nn.Parameter(torch.ones(D))


class Hidden(nn.Module):
    def forward(self, z, x):
        return torch.tanh(0.5 * z + x) * hidden


def test_a_tensor_that_wants_a_gradient_and_cannot_have_one_is_an_error():
    layer = ImplicitLayer(Hidden())
    y = compiled(layer)(torch.randn(3, D, requires_grad=True))
    with pytest.raises(RuntimeError, match=r"shape \(4,\): pass it as an argument"):
        y.sum().backward()


class Counting(Cell):
    def __init__(self):
        super().__init__()
        self.calls = 0

    def forward(self, z, x):
        self.calls += 1
        return super().forward(z, x)


def test_a_cell_that_counts_its_calls_is_not_compiled_again():
    model = Model(Counting())
    program = compiled(model)
    for _ in range(4):
        program(torch.randn(3, D)).sum().backward()
    assert counters["stats"]["unique_graphs"] == 1
    assert model.layer.cell.calls > 20


def test_a_compiled_cell_in_a_compiled_model():
    cell = Cell()
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    model = Model(torch.compile(cell, backend=backend))
    x = torch.randn(3, D)
    y = compiled(model)(x)
    y.sum().backward()
    assert graphs
    assert cell.linear.weight.grad is not None
    assert torch.equal(y, model(x))


@pytest.mark.parametrize("policy", ["warn", "raise", "fallback"])
def test_failures_are_told_as_in_eager_mode(policy):
    class Steep(nn.Module):
        def forward(self, z, x):
            return x - 1.5 * torch.sin(z)

    adjoint = Implicit(solver=Anderson(memory=1, max_steps=2), on_failure=policy)
    layer = ImplicitLayer(Steep(), adjoint=adjoint)
    program = compiled(layer)
    x = torch.randn(3, D, requires_grad=True)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        y = program(x)
        if policy == "raise":
            with pytest.raises(deqcore.ConvergenceError, match="backward"):
                y.sum().backward()
            return
        y.sum().backward()
    assert any("in backward" in str(w.message) for w in told) == (policy == "warn")
    assert bool(layer.report.backward.converged.all()) == (policy == "fallback")
    layer(x2 := x.detach().requires_grad_()).sum().backward()
    assert torch.equal(x.grad, x2.grad)


def test_a_backward_after_parameters_were_changed_in_place_is_an_error():
    model = Model()
    y = compiled(model)(torch.randn(3, D))
    with torch.no_grad():
        model.layer.cell.linear.weight.add_(1.0)
    with pytest.raises(RuntimeError, match=r"in-?place"):
        y.sum().backward()


def test_activation_checkpointing_inside_of_a_program():
    model = Model()
    x = torch.randn(3, D)
    program = compiled(lambda x: torch.utils.checkpoint.checkpoint(model, x, use_reentrant=False))
    grads = [torch.autograd.grad(m(x).sum(), list(model.parameters())) for m in (program, model)]
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_second_derivatives_of_a_program_are_an_error(backend):
    layer = ImplicitLayer(Cell())
    x = torch.randn(3, D, requires_grad=True)
    (grad,) = torch.autograd.grad(compiled(layer, backend)(x).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match=r"double backward|gradient of a gradient"):
        grad.sum().backward()


@pytest.mark.parametrize(
    "transform",
    [
        lambda layer, x: torch.func.grad(lambda x: layer(x).sum())(x),
        lambda layer, x: torch.func.jvp(layer, (x,), (x,))[1],
        lambda layer, x: torch.func.vmap(layer)(x[None]),
    ],
    ids=["grad", "jvp", "vmap"],
)
def test_transforms_inside_of_a_program_are_an_error(transform):
    layer = ImplicitLayer(Cell())
    with pytest.raises(Exception, match="transform the model as it is, not compiled"):
        compiled(lambda x: transform(layer, x), "eager")(torch.randn(3, D))


def test_what_is_no_op_breaks_the_graph_and_says_why():
    x = torch.randn(3, D)

    class Aux(Cell):
        def forward(self, z, x):
            return super().forward(z, x), z.sum()

    layer = ImplicitLayer(Aux(), has_aux=True)
    with pytest.raises(torch._dynamo.exc.Unsupported, match="has_aux is False"):
        compiled(layer)(x)
    found, expected = (m(x) for m in (torch.compile(layer, backend="eager"), layer))
    assert torch.equal(found[0], expected[0])
    assert torch.equal(found[1], expected[1])


def test_a_closure_in_a_whole_graph_is_an_error_that_names_implicit_layer():
    weight = torch.eye(D)

    def solve(x):
        return deqcore.fixed_point(lambda z: 0.5 * z @ weight + x, torch.zeros_like(x)).value

    with pytest.raises(torch._dynamo.exc.Unsupported, match=r"cell of a deqcore\.ImplicitLayer"):
        compiled(solve)(torch.ones(2, D))
    torch.testing.assert_close(
        torch.compile(solve, backend="eager")(torch.ones(2, D)), 2 * torch.ones(2, D)
    )


def test_a_program_whose_layer_is_gone_says_so():
    layer = ImplicitLayer(Cell())
    number = layer._number
    arguments = [torch.randn(3, D)], list(layer.parameters()), number, [], []
    call = "((None,...,()),(1,False,None,(),False))"
    with torch.no_grad():
        torch.ops.deqcore.implicit_layer(*arguments, call)
    del layer
    gc.collect()
    with pytest.raises(RuntimeError, match="is gone, or was in another process"):
        torch.ops.deqcore.implicit_layer(*arguments, call)


@pytest.mark.parametrize("grad", [True, False])
def test_the_op_keeps_the_rules_of_ops(grad):
    layer = ImplicitLayer(Normed(), batch="coupled")
    held = [one.tensor for one in deqcore._layer_call.held_tensors(layer.cell, ())]
    updated = tuple(i for i, t in enumerate(held) if any(t is b for b in layer.buffers()))
    call = f"((None,...,()),(1,{grad},None,{updated},False))"
    x = torch.randn(3, D, requires_grad=grad)
    with torch.set_grad_enabled(grad):
        torch.library.opcheck(
            torch.ops.deqcore.implicit_layer.default,
            ([x], held, layer._number, [], [], call),
        )
