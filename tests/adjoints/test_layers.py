"""ImplicitLayer in the life of a model: modes, copies, pickles, training."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from torch import nn

from deqcore import Anderson, Broyden, Implicit, ImplicitLayer, Phantom, Picard, Unrolled

ADJOINTS = [Implicit(), Implicit(solver=Broyden()), Phantom(), Unrolled()]


class Cell(nn.Module):
    """At module level, so that it can be pickled."""

    def __init__(self, dim: int = 6) -> None:
        super().__init__()
        self.linear = nn.Linear(dim, dim)
        nn.init.orthogonal_(self.linear.weight, gain=0.6)

    def forward(self, z, x, scale=1.0):
        return torch.tanh(self.linear(z) + scale * x)


@pytest.fixture(params=ADJOINTS, ids=["Implicit", "Implicit-Broyden", "Phantom", "Unrolled"])
def layer(request):
    return ImplicitLayer(Cell(), solver=Anderson(rtol=1e-5), adjoint=request.param)


def gradient(model, x):
    model.zero_grad()
    model(x).square().sum().backward()
    return [p.grad.clone() for p in model.parameters() if p.requires_grad]


def assert_equal_all(a, b):
    assert len(a) == len(b) > 0
    assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def test_layer_solves_its_cell_and_reports(layer):
    x = torch.randn(4, 6)
    assert layer.report is None
    value = layer(x)
    assert value.shape == x.shape
    torch.testing.assert_close(layer.cell(value, x), value, rtol=1e-3, atol=1e-3)
    layer.report.raise_for_status()
    assert layer.report.backward is None
    value.sum().backward()
    if isinstance(layer.adjoint, Implicit):
        assert layer.report.backward.converged.all()


def test_eval_mode_trains_like_train_mode(layer):
    x = torch.randn(4, 6)
    trained = gradient(layer.train(), x)
    assert_equal_all(gradient(layer.eval(), x), trained)


def test_layer_trains_inside_a_frozen_model(layer):
    model = nn.Sequential(nn.Linear(6, 6), layer, nn.Linear(6, 2)).eval()
    for frozen in (model[0], model[2]):
        frozen.requires_grad_(False)
    grads = gradient(model, torch.randn(4, 6))
    assert all(g.abs().sum() > 0 for g in grads)
    assert all(p.grad is None for frozen in (model[0], model[2]) for p in frozen.parameters())


def test_frozen_layer_passes_gradients_through(layer):
    layer.requires_grad_(False)
    x = torch.randn(4, 6, requires_grad=True)
    layer(x).sum().backward()
    assert x.grad.abs().sum() > 0
    assert all(p.grad is None for p in layer.parameters())


def test_same_layer_twice_in_one_model_adds_its_gradients(layer):
    x = torch.randn(4, 6)
    other = copy.deepcopy(layer)
    twice = gradient(nn.Sequential(layer, nn.ReLU(inplace=True), layer), x)
    model = nn.Sequential(other, nn.ReLU(), copy.deepcopy(other))
    apart = gradient(model, x)
    half = len(apart) // 2
    for got, a, b in zip(twice, apart[:half], apart[half:], strict=True):
        torch.testing.assert_close(got, a + b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("used", ["never", "forward", "backward"])
def test_layer_can_be_copied_and_pickled(layer, used):
    x = torch.randn(4, 6)
    if used != "never":
        out = layer(x)
        if used == "backward":
            out.sum().backward()
    expected = gradient(copy.copy(layer), x)
    buffer = io.BytesIO()
    torch.save(layer, buffer)
    buffer.seek(0)
    copies = [
        copy.deepcopy(layer),
        pickle.loads(pickle.dumps(layer)),
        torch.load(buffer, weights_only=False),
    ]
    for other in copies:
        assert other.solver == layer.solver
        assert other.adjoint == layer.adjoint
        assert_equal_all(gradient(other, x), expected)


def test_state_dict_holds_the_cell_alone(layer):
    layer(torch.randn(4, 6))
    assert set(layer.state_dict()) == {"cell.linear.weight", "cell.linear.bias"}
    other = ImplicitLayer(Cell())
    other.load_state_dict(layer.state_dict())


def test_layer_passes_more_arguments_and_a_start(layer):
    x = torch.randn(4, 6)
    scale = torch.tensor(2.0, requires_grad=True)
    value = layer(x, scale)
    value.sum().backward()
    assert scale.grad is not None
    with torch.no_grad():
        again = layer(x, scale, z0=value)
    assert layer.report.evaluations == 1
    torch.testing.assert_close(again, value)


def test_layer_takes_a_pytree():
    class PairCell(nn.Module):
        def forward(self, z, x):
            return {"a": 0.5 * z["b"] + x["a"], "b": 0.2 * z["a"] + x["b"]}

    x = {"a": torch.randn(3, 2), "b": torch.randn(3, 2, requires_grad=True)}
    value = ImplicitLayer(PairCell())(x)
    assert value["a"].shape == (3, 2)
    value["a"].sum().backward()
    torch.testing.assert_close(x["b"].grad, torch.full((3, 2), 0.5 / 0.9), rtol=1e-3, atol=1e-3)


def test_layer_says_what_it_is():
    layer = ImplicitLayer(Cell(), Picard(max_steps=7), Phantom(steps=2))
    text = repr(layer)
    assert "max_steps=7" in text
    assert "Phantom(steps=2" in text


def test_layer_learns(layer):
    """The whole way: a few steps of an optimizer lower the loss."""
    torch.manual_seed(0)
    x = torch.randn(32, 6)
    target = torch.tanh(x.roll(1, 1))
    optimizer = torch.optim.Adam(layer.parameters(), lr=0.05)
    losses = []
    for _ in range(10):
        optimizer.zero_grad()
        loss = (layer(x) - target).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]


def test_gradient_clipping_and_accumulation_see_ordinary_gradients(layer):
    x = torch.randn(4, 6)
    whole = gradient(layer, x)
    layer.zero_grad()
    for part in x.split(2):
        layer(part).square().sum().backward()
    for got, expected in zip((p.grad for p in layer.parameters()), whole, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
    assert nn.utils.clip_grad_norm_(layer.parameters(), 1.0) > 0
