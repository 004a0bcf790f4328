"""Robust training: the rule against one written by hand, and its traps."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import nn

from lion_models.prompts.cdr import CDR, RobustOptimizer

LR, STEPS = 0.05, 12
Make = Callable[[list[nn.Parameter]], torch.optim.Optimizer]

BASES: dict[str, Make] = {
    "sgd": lambda p: torch.optim.SGD(p, lr=LR),
    "momentum": lambda p: torch.optim.SGD(p, lr=LR, momentum=0.9),
    "adamw": lambda p: torch.optim.AdamW(p, lr=LR, weight_decay=0.0),
}


def oracle_directions(base: str) -> Callable[[np.ndarray], np.ndarray]:
    """gradient -> what the learning rate multiplies, from the optimizers' papers."""
    memory: dict[str, np.ndarray] = {}
    count = 0

    def direction(gradient: np.ndarray) -> np.ndarray:
        nonlocal count
        count += 1
        if base == "sgd":
            return gradient
        if base == "momentum":
            memory["b"] = gradient if count == 1 else 0.9 * memory["b"] + gradient
            return memory["b"]
        memory["m"] = 0.9 * memory.get("m", 0) + 0.1 * gradient
        memory["v"] = 0.999 * memory.get("v", 0) + 0.001 * gradient**2
        mean, square = memory["m"] / (1 - 0.9**count), memory["v"] / (1 - 0.999**count)
        return mean / (np.sqrt(square) + 1e-8)

    return direction


def oracle(
    weight: np.ndarray, gradients: list[np.ndarray], base: str, rule: CDR
) -> tuple[np.ndarray, list[np.ndarray]]:
    """The documented rule for one tensor, element by element; weights and critical sets."""
    weight, direction, sets = weight.copy(), oracle_directions(base), []
    total = np.zeros_like(weight)
    for step, gradient in enumerate(gradients, 1):
        tau = rule.tau * min(1, step / (rule.ramp + 1))
        floor = rule.floor * np.sqrt((weight**2).mean())
        score = np.abs(gradient) * np.maximum(np.abs(weight), floor)
        move = direction(gradient)
        if rule.fix_after is not None:
            if step <= rule.fix_after:
                total += score
            if step < rule.fix_after:
                weight = weight - LR * move
                continue
            score, share = total, rule.tau
        else:
            share = tau
        kept = max(1, round((1 - share) * weight.size))
        critical = np.zeros(weight.size, bool)
        critical[np.argsort(-score.ravel(), kind="stable")[:kept]] = True
        critical = critical.reshape(weight.shape)
        sets.append(critical)
        new = weight.copy()
        for index in np.ndindex(*weight.shape):
            pull = LR * rule.decay * np.sign(weight[index])
            if critical[index]:
                new[index] = weight[index] - (LR * (1 - tau) * move[index] + pull)
            elif abs(pull) >= abs(weight[index]):
                new[index] = 0
            else:
                new[index] = weight[index] - pull
        weight = new
    return weight, sets


def problem(seed: int = 0) -> tuple[nn.Parameter, list[torch.Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(5, 7, generator=generator, dtype=torch.float64)
    gradients = torch.randn(STEPS, 5, 7, generator=generator, dtype=torch.float64)
    return nn.Parameter(weight), list(gradients)


def run(
    weight: nn.Parameter, gradients: list[torch.Tensor], optimizer: torch.optim.Optimizer
) -> torch.Tensor:
    for gradient in gradients:
        weight.grad = gradient.clone()
        optimizer.step()
    return weight.detach()


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize(
    "rule",
    [
        CDR(0.5, 0.3),
        CDR(0.8, 0.3, ramp=5),
        CDR(0.6, 0.3, fix_after=4),
        CDR(0.6, 0.3, fix_after=1),
        CDR(0.7, 0.0, floor=0.0),
    ],
    ids=["step", "ramp", "fixed", "fixed at once", "as published"],
)
def test_rule_is_that_of_a_hand_written_oracle(base: str, rule: CDR):
    weight, gradients = problem()
    expected, _ = oracle(weight.detach().numpy(), [g.numpy() for g in gradients], base, rule)
    found = run(weight, gradients, RobustOptimizer(BASES[base]([weight]), [weight], rule))
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("base", BASES)
def test_weights_that_are_not_critical_only_fade(base: str):
    """Where a gradient's mask alone stops nothing: momentum would go on moving them."""
    weight, gradients = problem()
    optimizer = RobustOptimizer(BASES[base]([weight]), [weight], CDR(0.6, 0.1, fix_after=4))
    run(weight, gradients[:4], optimizer)
    other = ~optimizer.fixed[0]
    assert 0.5 < other.double().mean() < 0.7
    for gradient in gradients[4:]:
        before = weight.detach().clone()
        run(weight, [gradient], optimizer)
        faded = before.sign() * (before.abs() - LR * 0.1).clamp_min(0)
        assert torch.equal(weight.detach()[other], faded[other])


@pytest.mark.parametrize("base", ["momentum", "adamw"])
def test_masking_the_gradient_would_not_have_stopped_them(base: str):
    """The naive version fails the test above: this is the trap, shown."""
    weight, gradients = problem()
    optimizer = BASES[base]([weight])
    run(weight, gradients[:4], optimizer)
    before = weight.detach().clone()
    run(weight, [torch.zeros_like(gradients[0])], optimizer)
    assert (weight.detach() - before).abs().min() > 0


def test_share_of_the_step_is_kept_under_adam():
    """Scaling the gradient would leave Adam's step as it is."""
    weight, gradients = problem()
    plain, start = copy.deepcopy(weight), weight.detach().clone()
    run(plain, gradients[:1], BASES["adamw"]([plain]))
    rule = CDR(0.75, 0.0)
    optimizer = RobustOptimizer(BASES["adamw"]([weight]), [weight], rule)
    critical = rule.critical([rule.scores(weight.detach(), gradients[0])], 0.75)[0]
    run(weight, gradients[:1], optimizer)
    moved, whole = (weight.detach() - start)[critical], (plain.detach() - start)[critical]
    torch.testing.assert_close(moved, 0.25 * whole)


@pytest.mark.parametrize("floor", [0.0, 0.01])
def test_weight_at_zero_can_come_back_only_with_the_floor(floor: float):
    weight = nn.Parameter(torch.tensor([[0.0, 1.0, 1.0, 1.0]]))
    # Four times the rest of the gradient would not do without the floor: 4 x 0 is 0.
    gradient = torch.tensor([[1000.0, 1.0, 0.5, 0.2]])
    optimizer = RobustOptimizer(
        torch.optim.SGD([weight], lr=1e-3), [weight], CDR(0.5, 0.0, floor=floor)
    )
    run(weight, [gradient] * 3, optimizer)
    assert (weight[0, 0].item() != 0) == (floor > 0)


def test_tensor_of_zeros_is_scored_by_its_gradient():
    gradient = torch.tensor([[3.0, -5.0, 1.0, 2.0]])
    zeros = torch.zeros(1, 4)
    assert torch.equal(CDR().scores(zeros, gradient), gradient.abs())
    assert torch.equal(CDR(floor=0.0).scores(zeros, gradient), zeros)


def test_global_threshold_takes_the_share_of_all_tensors():
    large, small = torch.full((2, 3), 5.0), torch.full((2, 3), 1.0)
    each = CDR(threshold="layer").critical([large, small], 0.5)
    assert [int(mask.sum()) for mask in each] == [3, 3]
    both = CDR(threshold="global").critical([small, large], 0.5)
    assert [int(mask.sum()) for mask in both] == [0, 6]


@pytest.mark.parametrize("tau", [0.0, 0.3, 0.99])
def test_share_of_critical_weights_is_rounded_and_never_empty(tau: float):
    (mask,) = CDR().critical([torch.rand(4, 5)], tau)
    assert int(mask.sum()) == {0.0: 20, 0.3: 14, 0.99: 1}[tau]


def test_tau_rises_to_its_value_and_stays():
    rule = CDR(0.8, ramp=3)
    assert [rule.tau_at(step) for step in (1, 2, 3, 4, 9)] == pytest.approx(
        [0.2, 0.4, 0.6, 0.8, 0.8]
    )
    assert CDR(0.8).tau_at(1) == 0.8


@pytest.mark.parametrize("base", BASES)
def test_tau_of_zero_without_decay_is_the_base_optimizer(base: str):
    weight, gradients = problem()
    plain = copy.deepcopy(weight)
    run(plain, gradients, BASES[base]([plain]))
    run(weight, gradients, RobustOptimizer(BASES[base]([weight]), [weight], CDR(0.0, 0.0)))
    torch.testing.assert_close(weight, plain, rtol=1e-12, atol=1e-14)


def test_parameters_outside_the_rule_are_left_to_the_base():
    weight, gradients = problem()
    other, plain = copy.deepcopy(weight), copy.deepcopy(weight)
    groups = [{"params": [weight], "weight_decay": 0.0}, {"params": [other]}]
    base = torch.optim.AdamW(groups, lr=LR, weight_decay=0.1)
    alone = torch.optim.AdamW([plain], lr=LR, weight_decay=0.1)
    optimizer = RobustOptimizer(base, [weight], CDR(0.5, 0.1))
    for gradient in gradients:
        for p in (weight, other, plain):
            p.grad = gradient.clone()
        optimizer.step()
        alone.step()
    assert torch.equal(other, plain)
    assert not torch.equal(weight, plain)


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("fix_after", [None, 3, 9])
def test_state_round_trip_goes_on_bit_for_bit(base: str, fix_after: int | None):
    rule = CDR(0.6, 0.1, ramp=8, fix_after=fix_after)
    weight, gradients = problem()
    start = copy.deepcopy(weight)
    expected = run(weight, gradients, RobustOptimizer(BASES[base]([weight]), [weight], rule))
    first = RobustOptimizer(BASES[base]([start]), [start], rule)
    run(start, gradients[:5], first)
    file = io.BytesIO()
    torch.save(first.state_dict(), file)
    file.seek(0)
    resumed = nn.Parameter(start.detach().clone())
    second = RobustOptimizer(BASES[base]([resumed]), [resumed], rule)
    second.load_state_dict(torch.load(file, weights_only=True))
    for group in second.param_groups:
        assert group["lr"] == LR
    assert torch.equal(run(resumed, gradients[5:], second), expected)


def test_rate_set_on_the_wrapper_reaches_the_base_even_after_loading():
    weight, gradients = problem()
    optimizer = RobustOptimizer(BASES["momentum"]([weight]), [weight], CDR(0.5, 0.1))
    run(weight, gradients[:2], optimizer)
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    before = weight.detach().clone()
    assert torch.equal(run(weight, gradients[2:4], optimizer), before)
    optimizer.zero_grad()
    assert weight.grad is None


def test_state_of_a_plain_optimizer_is_refused():
    weight, _ = problem()
    optimizer = RobustOptimizer(BASES["sgd"]([weight]), [weight], CDR())
    with pytest.raises(ValueError, match="not of a RobustOptimizer"):
        optimizer.load_state_dict(optimizer.base.state_dict())


def test_parameters_with_weight_decay_or_of_others_are_refused():
    weight, other = nn.Parameter(torch.ones(2, 2)), nn.Parameter(torch.ones(2, 3))
    decayed = torch.optim.AdamW([weight], weight_decay=0.1)
    with pytest.raises(ValueError, match=r"shape \(2, 2\) has weight decay 0.1"):
        RobustOptimizer(decayed, [weight], CDR())
    with pytest.raises(ValueError, match=r"shape \(2, 3\) is not in the base optimizer"):
        RobustOptimizer(decayed, [other], CDR())
    with pytest.raises(ValueError, match="none; robust training needs weights"):
        RobustOptimizer(decayed, [], CDR())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tau": 1.0}, "`tau`: expected a share from 0 to below 1"),
        ({"tau": float("nan")}, "`tau`: expected a share"),
        ({"decay": -1.0}, "`decay`: expected 0 or more"),
        ({"ramp": -1}, "`ramp`: expected 0 or more, got -1"),
        ({"fix_after": 0}, "`fix_after`: expected 1 or more, got 0"),
        ({"threshold": "both"}, "`threshold`: expected one of global, layer, got 'both'"),
        ({"floor": 1.0}, "`floor`: expected a share"),
    ],
)
def test_bad_rules_are_named(options: dict[str, object], message: str):
    with pytest.raises(ValueError, match=message):
        CDR(**options)
