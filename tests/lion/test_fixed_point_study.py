"""`benchmarks.lion_fixed_point`: what it measures is what it says."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from benchmarks.lion_fixed_point import FORMS, TEST_STEPS, auroc, look, run_trial, solves, summary
from benchmarks.lion_fixed_point_plots import draw
from lion_models import Lion, open_source
from lion_models.backbones import FrozenBackbone


def test_a_trial_of_each_form_is_measured_summed_up_and_drawn(
    image_folder: Path, backbone: FrozenBackbone, tmp_path: Path
):
    source = open_source(str(image_folder), 1, 12)
    other = torch.rand(9, 1, 12, 12)
    results = [
        run_trial(backbone, source, other, (seed, "folder", 3, form), epochs=1)
        for seed in (1, 2)
        for form in FORMS
    ]
    for one in results:  # as trained is one of the numbers of steps
        assert one["by_steps"][one["form"]] == one["accuracy"]
    kept = {one["form"]: one["kept_bytes"] for one in results}
    assert kept["1"] < kept["2"] < kept["4"]
    means = summary([*results, results[0] | {"seed": 3}])
    assert means["settings"] == [[1, "folder", 3], [2, "folder", 3]]  # seed 3 lacks three forms
    gap = means["1"]["equilibrium_minus_this"]
    pairs = [results[at]["accuracy"] - results[at + 1]["accuracy"] for at in (0, 4)]
    assert gap["mean"] == pytest.approx(sum(pairs) / 2)
    assert gap["error"] == pytest.approx(abs(pairs[0] - pairs[1]) / 2)
    draw(tmp_path, results, means)
    assert len(list(tmp_path.glob("lion_fixed_point_*.png"))) == 4


def test_looking_at_a_model_leaves_it_as_it_was_trained(backbone: FrozenBackbone):
    images, truth = torch.rand(6, 1, 12, 12), torch.arange(6) % 3
    for iterations in (None, 2):
        model = Lion(backbone, 3, iterations=iterations)
        looked = look(model, images, truth, images)
        assert set(looked["by_steps"]) == {*map(str, TEST_STEPS), "equilibrium"}
        assert ("steps, input" in looked["other"]) == (iterations is None)
        assert set(looked["solves"]) == ({"input", "output"} if iterations is None else set())
        # The same pictures twice cannot be told apart.
        assert looked["other"]["softmax"] == 0.5
        assert all(prompt.iterations == iterations for prompt in model.implicit_layers.values())


def test_first_application_of_a_linear_cell_is_off_by_its_share_of_the_sum(
    backbone: FrozenBackbone,
):
    class Half(torch.nn.Module):
        def forward(self, z: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
            return 0.5 * z + x  # z* = 2 x, and the first application gives x

    model = Lion(backbone, 3)
    for prompt in model.implicit_layers.values():
        prompt.layer.cell = Half()
    with torch.no_grad():
        for one in solves(model, torch.rand(4, 1, 12, 12)).values():
            assert one["first_is_off_by"] == pytest.approx(0.5, abs=1e-3)
            assert one["steps"] >= 2


def test_area_counts_ties_half_and_needs_both_kinds():
    kinds = torch.tensor([False, False, True, True])
    assert auroc(kinds, torch.tensor([1.0, 2.0, 3.0, 4.0])) == 1
    assert auroc(kinds, torch.ones(4)) == 0.5
    assert auroc(torch.ones(4, dtype=torch.bool), torch.ones(4)) is None
