"""Where in a picture a classifier finds its answer: a smoothed gradient, laid over the picture."""

from __future__ import annotations

import inspect
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from lion_models.base.files import save_figure
from lion_models.methods.base import TunedClassifier

__all__ = ["draw_saliency", "saliency"]

SAMPLES, NOISE = 16, 0.15


def saliency(model: TunedClassifier, image: Tensor, label: int) -> Tensor:
    """How strongly a class's logit depends on each pixel (SmoothGrad; Smilkov et al., 2017).

    The mean over noisy copies of the squared gradient (as Hooker et al., 2019), its root, summed
    over the channels and smoothed a little. It goes through the implicit layers by their own
    gradient.

    Args:
        model: in eval mode.
        image: float (C, S, S) in [0, 1], on the model's device.
        label: the class.

    Returns:
        (S, S) from 0 to 1, on the CPU.
    """
    generator = torch.Generator().manual_seed(0)
    noise = NOISE * torch.randn(SAMPLES, *image.shape, generator=generator)
    copies = (image + noise.to(image)).requires_grad_()
    # The frozen part has no gradient in training, and is what looks at the pixels here.
    fixed = inspect.unwrap(type(model).frozen)(model, copies)
    [gradient] = torch.autograd.grad(model.tuned(fixed)[:, label].sum(), copies)
    strength = gradient.square().mean(0).sum(0).sqrt().cpu()
    width = max(3, strength.shape[0] // 14) | 1
    blurred = F.avg_pool2d(strength[None, None], width, 1, width // 2, count_include_pad=False)[
        0, 0
    ]
    return blurred / blurred.max().clamp(min=torch.finfo(blurred.dtype).tiny)


def draw_saliency(path: Path, image: Tensor, strength: Tensor, title: str) -> None:
    """Draw what the backbone sees, and the same with the places that count in colour.

    Args:
        path: PNG to write.
        image: uint8 (C, S, S).
        strength: (S, S), of `saliency`.
        title: above both.
    """
    # Imported here: matplotlib takes longer to load than the gradient to compute.
    from lion_models.run.lettering import drawn, lettering
    from lion_models.run.plots import middle_out, new_figure

    @drawn
    def draw(path: Path, title: str) -> None:
        figure, [[plain, marked]] = new_figure(8.2, 4.6, columns=2)
        grey = image.float().mean(0)
        shown = (image[0] if len(image) == 1 else image.permute(1, 2, 0)).numpy()
        plain.imshow(shown, cmap="gray", vmin=0, vmax=255)
        plain.set_title("what the backbone sees", fontsize=10)
        marked.imshow(grey.numpy(), cmap="gray", vmin=0, vmax=255)
        marked.imshow(strength.numpy(), cmap="inferno", alpha=0.6, vmin=0, vmax=1)
        marked.set_title("where the answer depends on it", fontsize=10)
        for axis in (plain, marked):
            axis.set_axis_off()
        figure.suptitle(lettering(middle_out(title, 80)), fontsize=11)
        save_figure(path, figure)

    draw(path, title)
