"""How pictures become the input of an exported file: a record for its metadata, and an example."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lion_models.backbones import FrozenBackbone
from lion_models.data.levels import Levels
from lion_models.data.transforms import LONGEST, LUMINANCE, Geometry

__all__ = ["example", "preprocessing"]


def preprocessing(
    backbone: FrozenBackbone,
    transform: str,
    levels: Levels | None = None,
    draft: bool = False,
) -> dict[str, Any]:
    """What is done to a picture before the exported network sees it, in the order of the keys.

    Args:
        backbone: takes the pictures.
        transform: how they are fitted to its square; see `Geometry`.
        levels: how its data's pictures of more than 8 bits were read.
        draft: whether large JPEG files are decoded at a part of their size.

    Returns:
        `draft` (the least width and height that a JPEG is decoded at, by halving; None for all of
        it), `orientation`, `bits`, `ground` (the colour under transparency), `mode` (Pillow's
        name) and `grey_weights`, `longest` (more than so many times the shorter side is cut off
        the ends), `resize` (before `crop`), `scale`, `layout` and `dtype`. `normalisation` is
        inside of the network, and said for those who compare.
    """
    geometry = Geometry(backbone.channels, backbone.image_size, transform, levels, draft)
    grey, side, keeps = backbone.channels == 1, backbone.image_size, geometry.keeps_shape
    mean, std = (
        list(value) if isinstance(value, tuple) else [value] * backbone.channels
        for value in backbone.normalisation
    )
    resize: dict[str, Any] = {"kernel": "bilinear", "antialias": True}
    if keeps:
        resize["shorter_side"] = geometry.training_size
    else:
        resize |= {"height": side, "width": side}
    return {
        "draft": list(geometry.draft_size) if geometry.draft_size else None,
        "orientation": "exif",
        "bits": _bits(levels),
        "ground": [255, 255, 255],
        "mode": "L" if grey else "RGB",
        "grey_weights": list(LUMINANCE) if grey else None,
        "longest": LONGEST if keeps else None,
        "resize": resize,
        "crop": {"height": side, "width": side, "place": "middle"} if keeps else None,
        "scale": 1 / 255,
        "layout": "batch, channel, height, width",
        "dtype": "float32",
        "normalisation": {"inside": True, "mean": mean, "std": std},
    }


def _bits(levels: Levels | None) -> str:
    if levels is None:
        return "8; grey of 16 bits is divided by 257"
    ranges = (f"{kind} {low:g} to {high:g}" for kind, (low, high) in levels.to_dict().items())
    return f"8; of more than 8 bits {', '.join(ranges)} become 0 to 255"


_PREPARE = """\
import json

import numpy as np
{imports}
from PIL import Image, ImageOps


def prepare(path, how):
    image = Image.open(path)
    if how["draft"]:
        image.draft(None, how["draft"])
    image = ImageOps.exif_transpose(image).convert("RGBA")
    ground = Image.new("RGBA", image.size, (*how["ground"], 255))
    image = Image.alpha_composite(ground, image).convert(how["mode"])
    if how["crop"]:
        wide, high = (min(side, how["longest"] * min(image.size)) for side in image.size)
        image = middle(image, wide, high)
        scale = how["resize"]["shorter_side"] / min(image.size)
        size = [round(side * scale) for side in image.size]
        image = image.resize(size, Image.Resampling.BILINEAR)
        image = middle(image, how["crop"]["width"], how["crop"]["height"])
    else:
        size = how["resize"]["width"], how["resize"]["height"]
        image = image.resize(size, Image.Resampling.BILINEAR)
    pixels = np.atleast_3d(np.asarray(image, np.float32)) * how["scale"]
    return pixels.transpose(2, 0, 1)[None].astype(np.float32)


def middle(image, wide, high):
    left, top = (image.width - wide) // 2, (image.height - high) // 2
    return image.crop((left, top, left + wide, top + high))


"""
_USE = {
    "onnx": """\
session = onnxruntime.InferenceSession({file!r})
about = session.get_modelmeta().custom_metadata_map
classes, how = json.loads(about["classes"]), json.loads(about["preprocessing"])
[logits] = session.run(["logits"], {{"images": prepare({picture!r}, how)}})
""",
    "torch-export": """\
extra = {{"lion.json": ""}}
network = torch.export.load({file!r}, extra_files=extra).module()
about = json.loads(extra["lion.json"])
classes, how = about["classes"], about["preprocessing"]
logits = network(torch.from_numpy(prepare({picture!r}, how))).detach().numpy()
""",
}
_IMPORTS = {"onnx": "import onnxruntime", "torch-export": "import torch"}


def example(path: Path, form: str, picture: str = "photo.jpg") -> str:
    """Python that needs no package of ours and prints the class of a picture.

    Args:
        path: of the exported file.
        form: `onnx` or `torch-export`.
        picture: file to read.
    """
    use = _USE[form].format(file=str(path), picture=picture)
    return _PREPARE.format(imports=_IMPORTS[form]) + use + "print(classes[logits[0].argmax()])\n"
