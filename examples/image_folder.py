"""LION through its Python API: from a folder of images to an ONNX file and its predictions.

The folder has one sub-folder a class; here it is drawn: 30 pictures each of four shapes, tilted,
shaded and noisy. LION tunes two implicit prompts and a head around a frozen tiny vision transformer
that was pretrained on pictures of clothes, with ten training images a class. The run is measured on
images that it has not seen, exported, and new pictures are answered twice: by the run, and by
onnxruntime from the file alone, prepared as its metadata says.

    pip install 'deqcore[lion,export]'
    python examples/image_folder.py [--small] [--out FOLDER]
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from PIL import Image, ImageDraw
from tqdm import tqdm

from lion_models import Run, RunConfig, load_run
from lion_models.run.export import export_run
from lion_models.run.predict import predict

CORNERS = {"circle": 60, "square": 4, "star": 10, "triangle": 3}


def draw_shape(kind: str, random: np.random.Generator) -> Image.Image:
    """A light shape on a dark ground, of any place, size and shade, tilted a little, with noise."""
    corners = CORNERS[kind]
    turn = np.pi * (0.25 if kind == "square" else 0.5) + random.uniform(-0.2, 0.2)
    angles = 2 * np.pi * np.arange(corners) / corners - turn
    radii = np.full(corners, random.uniform(18, 28))
    if kind == "star":
        radii[1::2] *= 0.45
    points = random.uniform(28, 36, 2)[:, None] + radii * np.stack([np.cos(angles), np.sin(angles)])
    image = Image.new("L", (64, 64), int(random.integers(0, 60)))
    outline = [(float(x), float(y)) for x, y in points.T]
    ImageDraw.Draw(image).polygon(outline, fill=int(random.integers(140, 256)))
    noisy = np.asarray(image) + random.normal(0, 15, (64, 64))
    return Image.fromarray(noisy.clip(0, 255).astype("uint8"))


def draw_folder(folder: Path, count: int, seed: int) -> list[Path]:
    random = np.random.default_rng(seed)
    paths = []
    for kind in CORNERS:
        (folder / kind).mkdir(parents=True)
        for number in range(count):
            paths.append(folder / kind / f"{number:03}.png")
            draw_shape(kind, random).save(paths[-1])
    return paths


def tune(images: Path, folder: Path, epochs: int) -> tuple[Run, dict[str, Any]]:
    """A finished run in ``folder``, measured on its test set once."""
    run = Run(folder, RunConfig.of(str(images), "lion", shots=10, epochs=epochs, seed=1))
    with tqdm(total=epochs, desc="training", leave=False) as bar:
        return run, run.train(plot=False, on_epoch=lambda state: bar.update())


def answers_of_file(file: Path, paths: list[Path]) -> list[str]:
    """What onnxruntime makes of the pictures; nothing of torch or of this package is asked."""
    session = onnxruntime.InferenceSession(str(file))
    about = session.get_modelmeta().custom_metadata_map
    classes, size = json.loads(about["classes"]), session.get_inputs()[0].shape[2:]
    pictures = [
        Image.open(path).convert("L").resize(size, Image.Resampling.BILINEAR) for path in paths
    ]
    pixels = np.stack([np.asarray(picture, "float32") / 255 for picture in pictures])[:, None]
    [logits] = session.run(["logits"], {"images": pixels})
    return [classes[best] for best in logits.argmax(1)]


def draw(folder: Path, paths: list[Path], answers: list[str], chances: list[float]) -> None:
    from matplotlib.figure import Figure

    columns = len(paths) // len(CORNERS)
    figure = Figure(figsize=(1.25 * columns, 1.5 * len(CORNERS)), layout="constrained")
    panels = figure.subplots(len(CORNERS), columns).flat
    for axes, path, answer, chance in zip(panels, paths, answers, chances, strict=True):
        axes.imshow(Image.open(path), cmap="gray", vmin=0, vmax=255)
        colour = "black" if answer == path.parent.name else "#D55E00"
        axes.set_title(f"{answer} {chance:.0%}", fontsize=10, color=colour)
        axes.axis("off")
    folder.mkdir(parents=True, exist_ok=True)
    figure.savefig(folder / "image_folder.png", dpi=80)


def main(arguments: list[str] | None = None) -> dict[str, float]:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--small", action="store_true", help="fewer epochs, a few seconds")
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="for image_folder.png")
    options = parser.parse_args(arguments)

    with tempfile.TemporaryDirectory() as place:
        images, new = Path(place) / "shapes", Path(place) / "new"
        draw_folder(images, count=30, seed=0)
        run, result = tune(images, Path(place) / "run", 4 if options.small else 40)
        test = result["test"]["accuracy"]
        print(f"test accuracy {test:.1%} after {result['best_epoch']} epochs")

        file = run.folder / "model.onnx"
        exported = export_run(load_run(run.folder), run.validation_images(32), file, "onnx")
        steps, difference = (exported.metadata[key] for key in ("steps", "difference"))
        print(
            f"{file.name}: {file.stat().st_size / 1e3:.0f} kB, {steps} plain iterations a layer, "
            f"logits within {difference:.1e} of the trained model's"
        )

        paths = draw_folder(new, count=8, seed=1)
        predictions = list(predict(load_run(run.folder), paths))
        ours = [run.source.classes[prediction.best] for prediction in predictions]
        theirs = answers_of_file(file, paths)
        right = sum(answer == path.parent.name for answer, path in zip(theirs, paths, strict=True))
        same = sum(a == b for a, b in zip(ours, theirs, strict=True))
        print(f"new pictures: the file is right on {right} of {len(paths)}, ", end="")
        print(f"and says what the run says on {same}")
        if options.out is not None:
            chances = [prediction.probabilities[prediction.best] for prediction in predictions]
            draw(options.out, paths, ours, chances)
    return {"test": test, "right": right / len(paths), "same": same / len(paths)}


if __name__ == "__main__":
    main()
