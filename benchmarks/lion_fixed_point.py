"""What LION's fixed point gives, against a few explicit applications of the same cell.

    python -m benchmarks.lion_fixed_point --output results.json --pictures docs/images

Four questions on one set of models: accuracy; memory of a training step; accuracy with more steps
at test than in training; and whether solver steps and residuals tell wrong answers, and pictures
of another data set. Every model is kept in `--folder` as a file, so that the same command goes on
where it was ended. The test images of a model are read once, when it has been trained; nothing is
chosen by them.
"""

from __future__ import annotations

import argparse
import itertools
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from sklearn.metrics import roc_auc_score
from torch import Tensor
from tqdm import tqdm

from benchmarks.lion_fixed_point_plots import draw
from deqcore import ImplicitLayer
from lion_models import Lion, LionConfig, TrainingConfig, fit, load_backbone, open_source
from lion_models.backbones import FrozenBackbone
from lion_models.base.files import make_folder, write_json
from lion_models.data import Source
from lion_models.data.splits import split_source, take_task
from lion_models.run.memory import kept_bytes

FORMS: dict[str, int | None] = {"equilibrium": None, "1": 1, "2": 2, "4": 4}
TEST_STEPS = (1, 2, 3, 4, 8, 32)
OTHER = "fashion-mnist"  # pictures of no class of digits
BATCH = 64  # of the step whose memory is counted
IMAGES = 50  # of a class in the test set, or of the other data in proportion


def trials(options: argparse.Namespace) -> list[tuple[int, str, int, str]]:
    """Seeds first, so that what is there when a session ends is balanced."""
    return list(itertools.product(options.seeds, options.data, options.shots, FORMS))


def run_trial(
    backbone: FrozenBackbone, source: Source, other: Tensor, trial: tuple[int, str, int, str],
    epochs: int,
) -> dict[str, Any]:  # fmt: skip
    """Train one model and look at it on its test images, and on those of another data set."""
    seed, data, shots, form = trial
    split = split_source(source, seed, shots, test_cap=IMAGES)
    torch.manual_seed(seed)
    model = LionConfig(form="ends", iterations=FORMS[form]).build(backbone, len(source.classes))
    assert isinstance(model, Lion)  # of the form `ends`
    state = fit(model, take_task(source, split), TrainingConfig(seed=seed, epochs=epochs))
    best = state.history[state.best_epoch - 1]
    images, truth = source.load(split.test).float() / 255, source.labels[split.test]
    result = {
        "seed": seed, "data": data, "shots": shots, "form": form, "epochs": epochs,
        "test_images": len(truth), "validation_accuracy": best["validation_accuracy"],
        **look(model, images, truth, other),
    }  # fmt: skip
    kept = kept_bytes(model, images[:BATCH])
    return result | {"kept_bytes": kept, "lambda": strengths(model)}


@torch.no_grad()
def look(model: Lion, images: Tensor, truth: Tensor, other: Tensor) -> dict[str, Any]:
    """Accuracy as trained and by the number of steps at test, and what tells wrong answers."""
    model.eval()
    trained = next(iter(model.implicit_layers.values())).iterations
    logits, signs = answers(model, images)
    wrong = logits.argmax(1) != truth
    _, other_signs = answers(model, other)
    by_steps = {}
    for steps in TEST_STEPS:
        with_iterations(model, steps)
        by_steps[str(steps)] = accuracy(model(images), truth)
    with_iterations(model, None)
    by_steps["equilibrium"] = accuracy(model(images), truth)
    with_iterations(model, trained)
    return {
        "accuracy": accuracy(logits, truth),
        "by_steps": by_steps,
        "solves": solves(model, images),
        "wrong": {name: auroc(wrong, sign) for name, sign in signs.items()},
        "other": {
            name: auroc(
                torch.arange(len(images) + len(other)) >= len(images),
                torch.cat([sign, other_signs[name]]),
            )
            for name, sign in signs.items()
        },
    }


def answers(model: Lion, images: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """Logits, and for each image the signs of a wrong answer, larger where it is likelier."""
    parts = [_answers(model, batch) for batch in images.split(500)]
    names = parts[0][1]
    return torch.cat([logits for logits, _ in parts]), {
        name: torch.cat([signs[name] for _, signs in parts]) for name in names
    }


def _answers(model: Lion, images: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    fixed = model.frozen(images)
    logits = model.tuned(fixed)
    signs = {"softmax": -logits.softmax(1).amax(1)}
    for side, prompt in model.implicit_layers.items():
        report = prompt.layer.report
        if prompt.iterations is None and report is not None:
            signs[f"steps, {side}"] = report.steps.float()
            signs[f"residual, {side}"] = report.residual.float()
    for side, trace in model.residual_traces(fixed).items():
        signs[f"second residual, {side}"] = trace[:, 1]
    return logits, signs


def solves(model: Lion, images: Tensor) -> dict[str, dict[str, float]]:
    """Of each equilibrium: mean solver steps, and how far from it the first application is."""
    found: dict[str, dict[str, float]] = {}

    def record(side: str) -> Callable[..., None]:
        def hook(layer: ImplicitLayer, inputs: tuple[Tensor], z: Tensor) -> None:
            gap = (layer.cell(torch.zeros_like(z), *inputs) - z).flatten(1).norm(dim=1)
            report = layer.report
            assert report is not None
            found[side] = {
                "steps": report.steps.double().mean().item(),
                "first_is_off_by": (gap / z.flatten(1).norm(dim=1)).mean().item(),
            }

        return hook

    hooks = [
        prompt.layer.register_forward_hook(record(side))
        for side, prompt in model.implicit_layers.items()
        if prompt.iterations is None
    ]
    model(images)
    for hook in hooks:
        hook.remove()
    return found


def with_iterations(model: Lion, steps: int | None) -> None:
    for prompt in model.implicit_layers.values():
        prompt.iterations = steps


def strengths(model: Lion) -> dict[str, float]:
    return {side: prompt.strength.item() for side, prompt in model.implicit_layers.items()}


def accuracy(logits: Tensor, truth: Tensor) -> float:
    return (logits.argmax(1) == truth).double().mean().item()


def auroc(positive: Tensor, score: Tensor) -> float | None:
    """Area under the ROC curve, ties counted half; None where all images are of one kind."""
    if positive.all() or not positive.any():
        return None
    return float(roc_auc_score(positive.numpy(), score.nan_to_num().double().numpy()))


def mean_and_error(values: Sequence[float]) -> dict[str, float]:
    numbers = torch.tensor(values, dtype=torch.float64)
    spread = numbers.std().item() if len(values) > 1 else 0.0
    return {"mean": numbers.mean().item(), "error": spread / len(values) ** 0.5, "n": len(values)}


def summary(results: list[dict[str, Any]]) -> dict[str, Any]:
    """Means and standard errors over data, shots and seeds, and differences in pairs."""
    found: dict[tuple[int, str, int], dict[str, dict[str, Any]]] = {}
    for one in results:
        found.setdefault((one["seed"], one["data"], one["shots"]), {})[one["form"]] = one
    whole = {key: forms for key, forms in found.items() if len(forms) == len(FORMS)}
    by_form = {form: [forms[form] for forms in whole.values()] for form in FORMS}
    solved = by_form["equilibrium"]
    means: dict[str, Any] = {"settings": [list(key) for key in whole]}
    for form, ones in by_form.items():
        differences = [e["accuracy"] - o["accuracy"] for e, o in zip(solved, ones, strict=True)]
        gains = {
            steps: mean_and_error([o["by_steps"][steps] - o["accuracy"] for o in ones])
            for steps in ones[0]["by_steps"]
        }
        means[form] = {
            "accuracy": mean_and_error([o["accuracy"] for o in ones]),
            "equilibrium_minus_this": mean_and_error(differences),
            "equilibrium_wins": sum(d > 0 for d in differences),
            "equilibrium_loses": sum(d < 0 for d in differences),
            "kept_mib": sum(o["kept_bytes"] for o in ones) / len(ones) / 2**20,
            "by_steps": {
                steps: mean_and_error([o["by_steps"][steps] for o in ones]) for steps in gains
            },
            "gain_by_steps": gains,
        }
    means["solves"] = {
        side: {
            figure: mean_and_error([one["solves"][side][figure] for one in solved])
            for figure in ("steps", "first_is_off_by")
        }
        for side in solved[0]["solves"]
    }
    for question in ("wrong", "other"):
        means[question] = {
            form: {
                name: mean_and_error(
                    [o[question][name] for o in ones if o[question][name] is not None]
                )
                for name in ones[0][question]
            }
            for form, ones in by_form.items()
        }
    return means


def finished(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """The result of every trial, those that are there already as they are."""
    backbone = load_backbone("tiny-vit")
    shape = backbone.channels, backbone.image_size
    sources = {data: open_source(data, *shape) for data in options.data}
    clothes = open_source(OTHER, *shape)
    generator = torch.Generator().manual_seed(0)
    rows = torch.randperm(len(clothes), generator=generator)[: 10 * IMAGES]
    other = clothes.load(rows).float() / 255
    make_folder(options.folder)
    for trial in tqdm(trials(options), unit="model"):
        path = options.folder / ("-".join(map(str, trial)) + f"-{options.epochs}.json")
        if not path.exists():
            source = sources[trial[1]]
            write_json(path, run_trial(backbone, source, other, trial, options.epochs))
        yield json.loads(path.read_text())


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", nargs="+", default=["mnist5k", "digits"])
    parser.add_argument("--shots", nargs="+", type=int, default=[5, 20])
    parser.add_argument("--seeds", nargs="+", type=int, default=[42, 44, 82, 100, 800])
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--folder", type=Path, default=Path("build/lion_fixed_point"))
    parser.add_argument("--output", type=Path)
    parser.add_argument("--pictures", type=Path, help="folder for four PNG files")
    options = parser.parse_args(arguments)
    results = list(finished(options))
    report: dict[str, Any] = {
        "torch": torch.__version__,
        "summary": summary(results),
        "runs": results,
    }
    print(json.dumps(report["summary"], indent=2))
    if options.output:
        write_json(options.output, report)
    if options.pictures:
        draw(options.pictures, results, report["summary"])


if __name__ == "__main__":
    main()
